"""Networks to and from other programs: PyTorch, safetensors, StableHLO, ONNX."""

import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from fashion_jax import _checks, _model_checks, files
from fashion_jax.config import TrainConfig
from fashion_jax.data import CLASS_NAMES
from fashion_jax.model import FashionMLP
from fashion_jax.steps import Number
from fashion_jax.types import Params, Trained, variables

FilePath = str | os.PathLike[str]


class Network(NamedTuple):
    """A network from a file.

    Attributes:
        params: The model's parameters.
        config: The default, except for the model, which has the dropout rate used in training.
        class_names: Name of each class.
    """

    params: Params
    config: TrainConfig
    class_names: tuple[str, ...]


def from_torch(state_dict: Mapping[str, Any]) -> Params:
    """Convert the weights of a PyTorch perceptron: `nn.Linear` layers with ReLU between, on normalized pixels.

    Layers may have any names. Each must fit the next, and numbers ascend where names differ in their numbers only. If
    several orders are left, that of `model.state_dict()` counts; other mappings, as from safetensors, have lost it.

    Args:
        state_dict: Weight [out, in] and bias [out] of each layer by name, from `model.state_dict()`.

    Raises:
        TypeError: It does not map names to tensors.
        ValueError: The tensors are not those of a perceptron, or the order of the layers is ambiguous.

    >>> tensors = {"0.weight": np.zeros((32, 784)), "0.bias": np.zeros(32)}
    >>> params = from_torch(tensors | {"2.weight": np.zeros((10, 32)), "2.bias": np.zeros(10)})
    >>> params["fc1"]["kernel"].shape, model_for(params).hidden
    ((784, 32), (32,))
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping, such as model.state_dict(), got {type(state_dict).__name__}")
    for name, value in state_dict.items():
        if isinstance(value, Mapping) and any(str(key).endswith("weight") for key in value):
            raise TypeError(f"state_dict holds more than weights; pass its entry {name!r}")
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in state_dict.items():
        layer, _, part = str(name).rpartition(".")
        try:
            # float64 holds all floats of PyTorch, of which NumPy lacks bfloat16.
            dense = tensor.detach().cpu().double().numpy() if hasattr(tensor, "detach") else tensor
            array = np.asarray(dense, jnp.result_type(float))
        except Exception as error:  # Sparse, quantized and meta tensors each raise their own.
            raise TypeError(f"state_dict[{name!r}] is no dense tensor of numbers: {type(tensor).__name__}") from error
        if array.ndim != {"weight": 2, "bias": 1}.get(part):
            raise ValueError(f"state_dict[{name!r}] is no weight or bias of an nn.Linear; its shape is {array.shape}")
        layers.setdefault(layer, {})[part] = array
    missing = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias") if part not in layers[layer]]
    if missing or not layers:
        raise ValueError(f"state_dict lacks {', '.join(missing) or 'layers'}")
    widths = {name: parts["weight"].shape[::-1] for name, parts in layers.items()}
    order = _in_order(widths, given=hasattr(state_dict, "_metadata"))  # PyTorch's own mappings have it.
    return _params([(layers[name]["weight"], layers[name]["bias"]) for name in order])


def to_torch(params: Params) -> dict[str, Any]:
    """Convert the parameters of one `FashionMLP` to a `state_dict` for PyTorch, with layers fc1, fc2, ...

    For a model with other names, `dict(zip(model.state_dict(), to_torch(params).values()))`.

    >>> list(to_torch({"fc1": {"kernel": np.zeros((784, 10)), "bias": np.zeros(10)}})["fc1.weight"].shape)
    [10, 784]
    """
    import torch

    # By way of float64, because PyTorch does not read NumPy's bfloat16.
    return {
        name: torch.from_numpy(array.astype(np.float64)).to(getattr(torch, array.dtype.name))
        for name, array in _tensors(params).items()
    }


def load_torch(path: FilePath) -> Params:
    """Read a `state_dict` that `torch.save` wrote, as `from_torch` does; nothing in the file is executed.

    Raises:
        ValueError: The file is damaged, or holds something else.
    """
    import torch

    content = _checks.path("path", path).read_bytes()
    try:
        state_dict = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # Those of zip files and of pickle, and PyTorch's own.
        raise ValueError(f"{path} is damaged, or holds more than tensors; save model.state_dict() alone") from error
    try:
        return from_torch(state_dict)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def model_for(params: Params) -> FashionMLP:
    """Return the `FashionMLP` that parameters belong to, for `TrainConfig(model=...)`.

    >>> model_for({"fc1": {"kernel": np.zeros((784, 10)), "bias": np.zeros(10)}}).classes
    10
    """
    *hidden, classes = (len(array) for name, array in _tensors(params).items() if name.endswith("bias"))
    return FashionMLP(hidden=tuple(hidden), classes=classes)


def save_safetensors(
    path: FilePath,
    params: Params,
    *,
    config: TrainConfig = TrainConfig(),
    class_names: Sequence[str] = CLASS_NAMES,
    dropout_rate: float | None = None,
) -> None:
    """Write a `FashionMLP` as one safetensors file; PyTorch reads its tensors as those of `to_torch`.

    Args:
        path: Where to; an existing file is replaced as a whole.
        params: The parameters of one network.
        config: The model.
        class_names: Name of each class.
        dropout_rate: Rate of the training, for Monte Carlo dropout; that of the model by default.

    Raises:
        ValueError: Parameters, model and class names do not fit together.

    >>> import tempfile
    >>> from fashion_jax.steps import init_state
    >>> path = tempfile.mkdtemp() + "/network.safetensors"
    >>> save_safetensors(path, init_state(jax.random.key(0)).params, dropout_rate=0.2)
    >>> network = load_safetensors(path)
    >>> network.config.model.dropout_rate, network.class_names[9]
    (0.2, 'Ankle boot')
    """
    model = _check_perceptron(params, config)
    if len(class_names) != model.classes:
        raise ValueError(f"class_names must name {model.classes} classes, got {len(class_names)}")
    rate = _checks.rate("dropout_rate", model.dropout_rate if dropout_rate is None else dropout_rate)
    fields = {"hidden": model.hidden, "classes": model.classes, "dropout_rate": rate, "dtype": model.dtype}
    metadata = {"model": json.dumps(fields), "class_names": json.dumps(list(class_names))}
    files.save_tensors(path, _tensors(params), metadata)


def load_safetensors(path: FilePath) -> Network:
    """Read a network that `save_safetensors` wrote, and verify its digest.

    Raises:
        ValueError: The file is damaged, or holds something else.
    """
    tensors, metadata = files.load_tensors(path)
    if "model" not in metadata:
        raise ValueError(f"{path} holds no network of save_safetensors")
    fields = json.loads(metadata["model"])
    model = FashionMLP(**fields | {"hidden": tuple(fields["hidden"])})
    params = _params([(tensors[f"fc{i}.weight"], tensors[f"fc{i}.bias"]) for i in range(1, len(model.hidden) + 2)])
    return Network(params, TrainConfig(model=model), tuple(json.loads(metadata["class_names"])))


def export(
    path: FilePath, params: Trained, *, config: TrainConfig = TrainConfig(), image_shape: tuple[int, ...] = (28, 28)
) -> None:
    """Write a network as one StableHLO program for CPU and CUDA, whatever its model: images in, probabilities out.

    The file is a safetensors file. `jax.export.deserialize(bytearray(tensors["program"])).call(images)` runs it without
    this package; JAX promises to read it for six months.

    Args:
        path, params, config: As for `save_safetensors` and `predict`.
        image_shape: Shape of one image; the number of images stays open.

    Raises:
        ValueError: Parameters and model do not fit together.

    >>> import tempfile
    >>> from fashion_jax.steps import init_state
    >>> path = tempfile.mkdtemp() + "/network.stablehlo"
    >>> export(path, init_state(jax.random.key(0)).params)
    >>> load_exported(path)(np.zeros((3, 28, 28), np.uint8)).shape
    (3, 10)
    """
    if _model_checks.variables(found := variables(params), _model_checks.variable_shapes(config.model, image_shape)):
        raise ValueError("params must be those of one network; select it first, as by result.at(seed=0)")

    # One by one, for models that ask for the number of images.
    @jax.vmap
    def probabilities(image):
        return jnp.exp(cast(Array, config.model.apply(found, image[None], deterministic=True)))[0]

    images = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), *image_shape), jnp.uint8)
    program = jax.export.export(jax.jit(probabilities), platforms=("cpu", "cuda"))(images).serialize()
    files.save_tensors(path, {"program": np.frombuffer(program, np.uint8)}, {"jax": jax.__version__})


def load_exported(path: FilePath) -> Callable[[Any], Array]:
    """Read a program that `export` wrote, and verify its digest.

    Returns:
        A function from uint8 images [n, height, width] to probabilities [n, classes], compiled once for each n.

    Raises:
        ValueError: The file is damaged or holds something else, or this version of JAX does not read it.
    """
    tensors, metadata = files.load_tensors(path)
    if "program" not in tensors:
        raise ValueError(f"{path} holds no program of export")
    try:
        return jax.jit(jax.export.deserialize(bytearray(tensors["program"])).call)
    except Exception as error:  # ValueError, struct.error, or one of flatbuffers.
        raise ValueError(f"{path} is of jax {metadata['jax']}, which jax {jax.__version__} does not read") from error


def export_onnx(
    path: FilePath, params: Params, *, config: TrainConfig = TrainConfig(), image_shape: tuple[int, ...] = (28, 28)
) -> None:
    """Write a `FashionMLP` as an ONNX graph: `images`, uint8 [n, 28, 28], in; `probabilities`, float32 [n, 10], out.

    Arguments and errors are those of `export`. The package onnx comes with `pip install "fashion_jax[onnx]"`.
    """
    import onnx

    classes, last = _check_perceptron(params, config).classes, len(params)
    gemm = "fc{0} = Gemm <transB = 1> (x{0}, weight{0}, bias{0})"
    layers = [f"x{i} = Relu(fc{i - 1}) {gemm.format(i)}" for i in range(2, last + 1)]
    # Runtimes of several years read opset 17 in IR version 8.
    model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
        fashion_jax (uint8[n, {", ".join(map(str, image_shape))}] images) => (float[n, {classes}] probabilities)
        <float white = {{255}}, float half = {{0.5}}> {{
            pixels = Cast <to = 1> (images)
            scaled = Div(pixels, white)
            shifted = Sub(scaled, half)
            normalized = Div(shifted, half)
            x1 = Flatten <axis = 1> (normalized)
            {gemm.format(1)} {" ".join(layers)}
            probabilities = Softmax <axis = 1> (fc{last})
        }}""")
    for name, array in _tensors(params).items():
        layer, part = name.removeprefix("fc").split(".")
        model.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), part + layer))
    onnx.checker.check_model(model, full_check=True)
    files.write(path, model.SerializeToString())


def torch_adam(
    learning_rate: Number | optax.Schedule, b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-8
) -> optax.GradientTransformation:
    """Build Adam with exact bias corrections, for comparisons with PyTorch in float32 step by step.

    `optax.adam` computes 1 - b2**t in float32, which is off by 1.3e-5 in the first steps, and divides every moment by
    such a number. Here both are factors of a step: two divisions of three are saved, 4% of an epoch on two cores.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, algorithm 1 in the more efficient
    order that follows it.

    >>> optimizer = torch_adam(1.0)
    >>> gradient = jnp.array([0.5, -2.0])
    >>> updates, _ = optimizer.update(gradient, optimizer.init(gradient))
    >>> [f"{update:.6f}" for update in updates]
    ['-1.000000', '1.000000']
    """

    def update(updates, state, params=None):
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        steps = jnp.asarray(count, jnp.result_type(float))
        correction = -jnp.expm1(steps * jnp.log1p(b1 - 1))
        root = jnp.sqrt(-jnp.expm1(steps * jnp.log1p(b2 - 1)))
        updates = jax.tree.map(lambda m, v: root / correction * (m / (jnp.sqrt(v) + eps * root)), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    adam = optax.GradientTransformation(optax.scale_by_adam().init, update)
    return optax.chain(adam, optax.scale_by_learning_rate(learning_rate))


def _in_order(widths: Mapping[str, tuple[int, ...]], *, given: bool) -> list[str]:
    """Return the names of layers from first to last, by the inputs and outputs of each, and the mapping's if given."""
    families = {name: re.sub(r"\d+", "#", name) for name in widths}
    numbers = {name: [int(digits) for digits in re.findall(r"\d+", name)] for name in widths}

    def orders(left: list[str], last: int | None = None) -> Iterator[list[str]]:
        if not left:
            yield []
        for name in left:
            lower = [other for other in left if families[other] == families[name] and numbers[other] < numbers[name]]
            if not lower and last in (None, widths[name][0]):
                rest = [other for other in left if other != name]
                yield from ([name, *order] for order in orders(rest, widths[name][1]))

    found = list(itertools.islice(orders(list(widths)), 2))
    if not found:
        raise ValueError(f"state_dict holds no chain of layers; their inputs and outputs are {dict(widths)}")
    # The first order found is the mapping's own, if that fits.
    if len(found) > 1 and not (given and found[0] == list(widths)):
        a, b = next(pair for pair in zip(*found, strict=True) if pair[0] != pair[1])
        raise ValueError(f"the order of the layers {a} and {b} is ambiguous; number them, or pass model.state_dict()")
    return found[0]


def _params(layers: list[tuple[np.ndarray, np.ndarray]]) -> Params:
    pairs = enumerate(layers, start=1)
    return {f"fc{i}": {"kernel": jnp.asarray(weight.T), "bias": jnp.asarray(bias)} for i, (weight, bias) in pairs}


def _tensors(params: Params) -> dict[str, np.ndarray]:
    """Return the weights of a `FashionMLP` in PyTorch's names and axes."""
    tensors = {}
    try:
        for name in (f"fc{i}" for i in range(1, len(params) + 1)):
            tensors[f"{name}.weight"] = np.asarray(params[name]["kernel"]).T
            tensors[f"{name}.bias"] = np.asarray(params[name]["bias"])
    except (KeyError, TypeError):
        tensors.clear()
    if not tensors or tensors["fc1.bias"].ndim != 1:
        raise ValueError(
            "params must be those of one FashionMLP, such as run.best.params or result.at(...).best.params"
        )
    return tensors


def _check_perceptron(params: Params, config: TrainConfig) -> FashionMLP:
    found, model = model_for(params), config.model
    if type(model) is not FashionMLP:
        raise ValueError(f"this format is for a FashionMLP, and export for any model; config.model is {model}")
    if (found.hidden, found.classes) != (model.hidden, model.classes):
        raise ValueError(f"params are those of {found}, and config.model is {model}")
    return model
