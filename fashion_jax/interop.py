"""Take a network elsewhere and back: PyTorch, safetensors, StableHLO, ONNX.

What this module writes itself carries a digest of its content, which is checked when it is read: the formats notice a
flipped bit by luck only. Reading needs neither Flax nor, but for PyTorch's own files, PyTorch.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Array, Float, UInt8

from fashion_jax.config import TrainConfig
from fashion_jax.data import CLASS_NAMES, check_pixels
from fashion_jax.files import write_atomically

if TYPE_CHECKING:
    import torch

MAGIC = b"fashion_jax StableHLO 1\n"
DIGEST_CHARACTERS = 64
# The oldest opset whose Softmax is the usual one is 13; 17 is what runtimes of several years read.
ONNX_OPSET, ONNX_IR = 17, 8


class Network(NamedTuple):
    """A network that was read from a file.

    Attributes:
        params: The model's parameters.
        config: What it was trained with, but for `loss` and `optimiser`: functions are not kept.
        class_names: Name of each class.
        dropout_rate: Share of hidden units that were dropped while it was trained; None if the file does not tell.
    """

    params: dict[str, Any]
    config: TrainConfig
    class_names: tuple[str, ...]
    dropout_rate: float | None = None


class ExportedNetwork(NamedTuple):
    """A network as one compiled function, without the model that it was made from: call it with images.

    Attributes:
        exported: The function as `jax.export` has it.
        class_names: Name of each class.
    """

    exported: jax.export.Exported
    class_names: tuple[str, ...]

    def __call__(self, images: UInt8[Array | np.ndarray, "n height width *channels"]) -> Float[np.ndarray, "n classes"]:
        """Compute the probability of each class; the first call with another number of images compiles.

        Args:
            images: Pixels, 0 to 255, at least one image.

        Raises:
            TypeError: The images are not `uint8`.
            ValueError: The images' shape is wrong.
        """
        check_pixels(images, "images")
        _, *shape = self.exported.in_avals[0].shape
        if list(images.shape[1:]) != shape or not len(images):
            expected = ", ".join(map(str, ("n", *shape)))
            raise ValueError(f"images must have shape [{expected}] with n at least 1, got {list(images.shape)}")
        return np.asarray(jax.jit(self.exported.call)(jnp.asarray(images)))


def hidden_units(params: Mapping[str, Any]) -> tuple[int, ...]:
    """Tell the units of each hidden layer, for a `TrainConfig`.

    Args:
        params: The model's parameters.

    >>> hidden_units({"fc1": {"bias": np.zeros(32)}, "fc2": {"bias": np.zeros(10)}})
    (32,)
    """
    return tuple(len(params[f"fc{i}"]["bias"]) for i in range(1, len(params)))


def from_torch(state_dict: Mapping[str, Any], *, config: TrainConfig | None = None) -> dict[str, Any]:
    """Take the weights of a PyTorch network: a chain of `nn.Linear` with ReLU in between, on standardised pixels.

    Layers may have any names: fc1, fc2, ... as in the tutorial, 0, 2, ... from `nn.Sequential`, with any prefix. Names
    that differ in their numbers only are taken in the order of the numbers, others in the order of the mapping. After
    fc1 no number may be left out, so that a layer that is missing is noticed.

    Args:
        state_dict: Name and tensor (or array) of each weight [out, in] and bias [out], from `model.state_dict()`. A
            safetensors file gives them sorted by name; put layers that are not numbered into the network's order.
        config: Gives the widths; if left out, they are those of the tensors, from 784 inputs to 10 outputs.

    Returns:
        Parameters in the form of `Run.state.params`. `hidden_units` tells the widths for a `TrainConfig`.

    Raises:
        TypeError: It is not a mapping, or an entry is not a tensor of floats.
        ValueError: A tensor is missing, is one too many, has the wrong shape or holds a number that is not finite; or
            the config has a model of its own.

    >>> tensors = {"0.weight": np.zeros((32, 784)), "0.bias": np.zeros(32)}
    >>> tensors |= {"2.weight": np.zeros((10, 32)), "2.bias": np.zeros(10)}
    >>> hidden_units(from_torch(tensors))
    (32,)
    >>> del tensors["2.bias"]
    >>> from_torch(tensors)
    Traceback (most recent call last):
    ValueError: state_dict does not hold a chain of nn.Linear: 2.bias is missing
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping, such as model.state_dict(), got {type(state_dict).__name__}")
    if config is not None:
        _check_perceptron(config)
    layers: dict[str, dict[str, np.ndarray]] = {}
    wrong: list[str] = []
    for name, tensor in state_dict.items():
        if not isinstance(name, str):
            raise TypeError(f"state_dict must have names such as 'fc1.weight', got {name!r}")
        array = _as_numpy(name, tensor)
        layer, _, part = name.rpartition(".")
        axes = {"weight": 2, "bias": 1}.get(part)
        if axes is None:
            wrong.append(f"{name} is neither a weight nor a bias")
        elif array.ndim != axes:
            wrong.append(f"{name} must have {axes} {'axes' if axes > 1 else 'axis'}, got shape {list(array.shape)}")
        elif not np.isfinite(array).all():
            wrong.append(f"{name} holds a number that is not finite")
        else:
            layers.setdefault(layer, {})[part] = array
    layers = {layer: layers[layer] for layer in _in_order(layers)}
    wrong += _missing(layers, state_dict, config)
    if not wrong:
        wrong += _misfits(layers, config)
    if wrong:
        raise ValueError(f"state_dict does not hold a chain of nn.Linear: {'; '.join(wrong)}")
    return {
        f"fc{i}": {"kernel": jnp.array(parts["weight"].T), "bias": jnp.array(parts["bias"])}
        for i, parts in enumerate(layers.values(), start=1)
    }


def to_torch(params: Mapping[str, Any], *, names: Sequence[str] | None = None) -> "dict[str, torch.Tensor]":
    """Give the weights as a `state_dict` for PyTorch: `model.load_state_dict(to_torch(params))`.

    Args:
        params: The model's parameters.
        names: Name of each layer, such as ["0", "2", "4", "6"] for an `nn.Sequential`; by default the tutorial's fc1,
            fc2, ...

    Raises:
        ImportError: PyTorch is not installed.
        ValueError: The parameters are not those of a `FashionMLP`, or `names` does not name each layer once.

    >>> from fashion_jax.train import init_state
    >>> list(to_torch(init_state(jax.random.key(0)).params)["fc1.weight"].shape)
    [256, 784]
    """
    import torch

    return {name: torch.from_numpy(array) for name, array in _tensors(params, names).items()}


def load_torch(path: str | os.PathLike[str], *, config: TrainConfig | None = None) -> dict[str, Any]:
    """Read a `state_dict` that `torch.save` wrote (.pth, .pt), and take its weights as `from_torch` does.

    It is read with `weights_only=True`: nothing in the file is executed. Such a file has no digest, so damage that
    leaves it readable goes unnoticed.

    Args:
        path: The file.
        config: Gives the widths; if left out, they are those of the tensors.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: PyTorch is not installed.
        ValueError: The file holds something else than tensors, is damaged, or they are not those of a chain.

    >>> import tempfile, torch
    >>> from fashion_jax.train import init_state
    >>> params = init_state(jax.random.key(0)).params
    >>> path = Path(tempfile.mkdtemp()) / "network.pth"
    >>> torch.save(to_torch(params), path)
    >>> bool((load_torch(path)["fc4"]["bias"] == params["fc4"]["bias"]).all())
    True
    """
    import torch

    content = Path(path).read_bytes()
    try:
        state_dict = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged or a dangerous file makes torch.load raise its own, the unpickler's and zlib's errors, and OSError.
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} is not a file of PyTorch weights alone, or is damaged: {reason}") from error
    try:
        return from_torch(state_dict, config=config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def save_safetensors(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    *,
    config: TrainConfig = TrainConfig(),
    class_names: Sequence[str] = CLASS_NAMES,
    dropout_rate: float | None = None,
) -> None:
    """Write a network as one safetensors file, with config, class names, rate and a digest in its metadata.

    The tensors have PyTorch's names and axes, so that PyTorch reads the file too:
    `model.load_state_dict(safetensors.torch.load_file(path))`.

    Args:
        path: Where to; an existing file is replaced as a whole.
        params: The model's parameters.
        config: What it was trained with.
        class_names: Name of each class.
        dropout_rate: Share of hidden units that were dropped in training, which Monte Carlo dropout needs; in [0, 1).

    Raises:
        OSError: The file cannot be written.
        TypeError: The rate is no number.
        ValueError: The parameters do not fit the config, hold a number that is not finite, or are not those of a
            `FashionMLP`; or the rate is out of range.

    >>> import tempfile
    >>> from fashion_jax.train import init_state
    >>> params = init_state(jax.random.key(0)).params
    >>> path = Path(tempfile.mkdtemp()) / "network.safetensors"
    >>> save_safetensors(path, params, dropout_rate=0.2)
    >>> network = load_safetensors(path)
    >>> network.config == TrainConfig(), network.class_names[9], network.dropout_rate
    (True, 'Ankle boot', 0.2)
    """
    from fashion_jax.model import check_rate

    _check_perceptron(config)
    _check_network(params, config, class_names)
    tensors = _tensors(params)
    about = dataclasses.replace(config, loss=None, optimiser=None).as_dict()
    metadata = {"config": json.dumps(about), "class_names": json.dumps(list(class_names))}
    if dropout_rate is not None:
        check_rate(dropout_rate)
        metadata["dropout_rate"] = json.dumps(float(dropout_rate))
    metadata["sha256"] = _digest(tensors, metadata)
    write_atomically(path, safetensors.numpy.save(tensors, metadata))


def load_safetensors(path: str | os.PathLike[str]) -> Network:
    """Read a network that `save_safetensors` wrote, and check its digest.

    Args:
        path: The file.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: The file is damaged, or another program wrote it.
    """
    path = Path(path)
    # safetensors says of a file that may not be read, and of a directory, that there is none.
    with path.open("rb"):
        pass
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:
        # Besides SafetensorError, a damaged header makes NumPy raise.
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    if "sha256" not in metadata:
        raise ValueError(
            f"{path} has no digest, so another program wrote it; read it with safetensors.numpy.load_file, which sorts "
            "by name, put layers that are not numbered into the network's order, and take the weights with from_torch"
        )
    if _digest(tensors, metadata) != metadata["sha256"]:
        raise ValueError(f"{path} is damaged: its content does not have the digest that it was written with")
    try:
        config, class_names = TrainConfig.from_dict(json.loads(metadata["config"])), json.loads(metadata["class_names"])
        rate = json.loads(metadata.get("dropout_rate", "null"))
        return Network(from_torch(tensors, config=config), config, tuple(class_names), rate)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} was written by another version of fashion_jax: {error}") from error


def export(
    params: Mapping[str, Any],
    config: TrainConfig,
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str] = CLASS_NAMES,
) -> None:
    """Write a network as one StableHLO program: any number of `uint8` images in, probabilities out, on CPU and CUDA.

    The weights are part of the program. `load_exported` runs it, without Flax and without this package's model. JAX
    promises to read such a program for six months after the version that wrote it.

    Args:
        params: The model's parameters.
        config: Gives the widths.
        path: Where to; an existing file is replaced as a whole.
        class_names: Name of each class.

    Raises:
        OSError: The file cannot be written.
        ValueError: The parameters do not fit the config, or hold a number that is not finite.

    >>> import tempfile
    >>> from fashion_jax.train import init_state
    >>> path = Path(tempfile.mkdtemp()) / "network.stablehlo"
    >>> export(init_state(jax.random.key(0)).params, TrainConfig(), path)
    >>> load_exported(path)(np.zeros((3, 28, 28), np.uint8)).shape
    (3, 10)
    """
    from fashion_jax.predict import probabilities

    _check_network(params, config, class_names)
    weights = jax.tree.map(jnp.asarray, dict(params))
    images = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), *config.image_shape), jnp.uint8)
    program = jax.jit(lambda images: probabilities(weights, images, config=config))
    exported = jax.export.export(program, platforms=("cpu", "cuda"))(images)
    about = {"class_names": list(class_names), "config": config.as_dict(), "jax": jax.__version__}
    content = json.dumps(about).encode() + b"\n" + exported.serialize()
    write_atomically(path, MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def load_exported(path: str | os.PathLike[str]) -> ExportedNetwork:
    """Read a program that `export` wrote, and check its digest.

    Args:
        path: The file.

    Returns:
        The network; call it with images.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or something else, or this version of JAX does not read it.
    """
    file = Path(path).read_bytes()
    if not file.startswith(MAGIC):
        raise ValueError(f"{path} is not a program that fashion_jax exported, or is damaged: its first line is another")
    digest, content = file[len(MAGIC) :][:DIGEST_CHARACTERS], file[len(MAGIC) + DIGEST_CHARACTERS + 1 :]
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise ValueError(f"{path} is damaged: its content does not have the digest that it was written with")
    line, _, program = content.partition(b"\n")
    about = json.loads(line)
    try:
        exported = jax.export.deserialize(bytearray(program))
    except Exception as error:
        # Undamaged, so it is the version; jax raises ValueError, struct.error or flatbuffers' errors.
        raise ValueError(
            f"{path} was written by jax {about['jax']}, and jax {jax.__version__} does not read it: {error}"
        ) from error
    return ExportedNetwork(exported, tuple(about["class_names"]))


def export_onnx(
    params: Mapping[str, Any],
    config: TrainConfig,
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str] = CLASS_NAMES,
) -> None:
    """Write a network as an ONNX graph: `images`, uint8 [n, 28, 28], in; `probabilities`, float32 [n, 10], out.

    Args:
        params: The model's parameters.
        config: Gives the widths.
        path: Where to; an existing file is replaced as a whole.
        class_names: Name of each class, kept in the graph's metadata.

    Raises:
        ImportError: The package onnx is not installed; `pip install '.[onnx]'` in a clone installs it.
        OSError: The file cannot be written.
        ValueError: The parameters do not fit the config, hold a number that is not finite, or are not those of a
            `FashionMLP`.

    >>> import tempfile
    >>> from fashion_jax.train import init_state
    >>> path = Path(tempfile.mkdtemp()) / "network.onnx"
    >>> export_onnx(init_state(jax.random.key(0)).params, TrainConfig(), path)
    >>> path.stat().st_size > 4 * 242_762
    True
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    _check_perceptron(config)
    _check_network(params, config, class_names)
    tensors = {name: array.astype(np.float32) for name, array in _tensors(params).items()}
    constants = {"white": np.float32(255), "half": np.float32(0.5)}
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["pixels", "white"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "half"], ["shifted"]),
        helper.make_node("Div", ["shifted", "half"], ["standardised"]),
        helper.make_node("Flatten", ["standardised"], ["x0"], axis=1),
    ]
    last = len(config.hidden) + 1
    for i in range(1, last + 1):
        inputs = [f"x{i - 1}", f"fc{i}.weight", f"fc{i}.bias"]
        nodes.append(helper.make_node("Gemm", inputs, [f"fc{i}"], transB=1))
        if i < last:
            nodes.append(helper.make_node("Relu", [f"fc{i}"], [f"x{i}"]))
    nodes.append(helper.make_node("Softmax", [f"fc{last}"], ["probabilities"], axis=1))
    graph = helper.make_graph(
        nodes,
        "fashion_jax",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", *config.image_shape])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", len(class_names)])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants | tensors).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", ONNX_OPSET)], ir_version=ONNX_IR)
    helper.set_model_props(model, {"class_names": json.dumps(list(class_names))})
    onnx.checker.check_model(model, full_check=True)
    write_atomically(path, model.SerializeToString())


def _check_perceptron(config: TrainConfig) -> None:
    """Refuse a network of the user's own, whatever its layers are called: what it computes cannot be seen in them."""
    if config.model is not None:
        raise ValueError(
            f"config.model is {config.as_dict()['model']}: formats with PyTorch's names are for the perceptron alone; "
            "export takes any network"
        )


def _as_dict(params: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(params, Mapping):
        raise ValueError(f"params must be those of a model, such as state.params, got {type(params).__name__}")
    return dict(params)


def _check_network(params: Mapping[str, Any], config: TrainConfig, class_names: Sequence[str]) -> None:
    from fashion_jax.model import check_params

    params = _as_dict(params)
    check_params(params, config)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    wrong = [
        jax.tree_util.keystr(path, simple=True, separator=".") for path, leaf in leaves if not np.isfinite(leaf).all()
    ]
    if wrong:
        raise ValueError(f"params hold numbers that are not finite, in {', '.join(wrong)}")
    if len(class_names) != config.classes:
        raise ValueError(f"class_names must name {config.classes} classes, got {len(class_names)}")


def _as_numpy(name: str, tensor) -> np.ndarray:
    if isinstance(tensor, Mapping):
        raise TypeError(f"state_dict[{name!r}] is a mapping and not a tensor; pass that entry if it is the state_dict")
    if getattr(tensor, "is_meta", False):
        raise TypeError(f"state_dict[{name!r}] has a shape and no numbers: it is on PyTorch's device meta")
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        # float64 holds every other float type, bfloat16 too, which NumPy lacks.
        tensor = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    array = np.asarray(tensor)
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"state_dict[{name!r}] must be a tensor of floats, got {array.dtype}")
    with np.errstate(over="ignore"):
        return array.astype(jnp.result_type(float))


def _in_order(names: Mapping[str, Any]) -> list[str]:
    """Sort names that differ in their numbers only; files sort 10 before 2."""
    if len({re.sub(r"\d+", "#", name) for name in names}) > 1:
        return list(names)
    return sorted(names, key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)])


def _missing(layers: Mapping[str, Any], given: Mapping[str, Any], config: TrainConfig | None) -> list[str]:
    """Name the tensors that are not there, as far as names tell."""
    names = list(layers) or ["fc1"]
    if first := re.fullmatch(r"(.*\bfc)1", names[0]):
        # The tutorial's names tell which layers there ought to be.
        numbers = [re.fullmatch(rf"{re.escape(first[1])}(\d+)", name) for name in names]
        if all(numbers):
            last = max([len(config.hidden) + 1 if config else 1, *(int(number[1]) for number in numbers if number)])
            names += [f"{first[1]}{i}" for i in range(1, last + 1)]
    tensors = [f"{name}.{part}" for name in dict.fromkeys(names) for part in ("weight", "bias")]
    return [f"{name} is missing" for name in tensors if name not in given]


def _misfits(layers: Mapping[str, dict[str, np.ndarray]], config: TrainConfig | None) -> list[str]:
    """Tell which tensors do not have the shape that the config, or the layer before, asks for."""
    outputs = list(config.hidden) if config else [len(parts["bias"]) for parts in layers.values()][:-1]
    like = config or TrainConfig()
    widths = list(itertools.pairwise((math.prod(like.image_shape), *outputs, like.classes)))
    wrong = [f"{name}.weight and {name}.bias are not part of the network" for name in list(layers)[len(widths) :]]
    wrong += [f"layer {i} of {len(widths)} is missing" for i in range(len(layers) + 1, len(widths) + 1)]
    for (name, parts), (inputs, units) in zip(layers.items(), widths, strict=False):
        for part, shape in (("weight", (units, inputs)), ("bias", (units,))):
            if parts[part].shape != shape:
                wrong.append(f"{name}.{part} must have shape {list(shape)}, got {list(parts[part].shape)}")
    return wrong


def _tensors(params: Mapping[str, Any], names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Give weights in PyTorch's names and axes, each an array of its own."""
    params = _as_dict(params)
    layers = [f"fc{i}" for i in range(1, len(params) + 1)]
    wrong = [f"{layer}.{part}" for layer in layers for part in ("kernel", "bias") if part not in params.get(layer, {})]
    if wrong or not layers:
        raise ValueError(f"params must be those of a FashionMLP; missing: {', '.join(wrong) or 'all of them'}")
    names = layers if names is None else list(names)
    if len(names) != len(layers) or len(set(names)) < len(names):
        raise ValueError(f"names must name each of the {len(layers)} layers once, got {names}")
    tensors = {}
    for name, layer in zip(names, layers, strict=True):
        tensors[f"{name}.weight"] = np.array(np.asarray(params[layer]["kernel"]).T, order="C")
        tensors[f"{name}.bias"] = np.array(params[layer]["bias"])
    return tensors


def _digest(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Compute SHA-256 over names, types, shapes and bytes of all tensors, and over the metadata."""
    about = {name: text for name, text in metadata.items() if name != "sha256"}
    shapes = {name: [array.dtype.str, *array.shape] for name, array in tensors.items()}
    digest = hashlib.sha256(json.dumps([about, shapes], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()
