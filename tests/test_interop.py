"""To PyTorch, safetensors, StableHLO and ONNX, and back: the same outputs, or an error that says why not."""

import collections
import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import onnxruntime
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from sweep_worker import same

from fashion_jax import interop
from fashion_jax.config import TrainConfig
from fashion_jax.inference import predict
from fashion_jax.model import FashionMLP, normalize
from fashion_jax.steps import init_state

TOLERANCE = {"rtol": 0, "atol": 1e-5}
SMALL = TrainConfig(model=FashionMLP((16,)))


@pytest.fixture(scope="module")
def params(trained):
    return trained.best.params


@pytest.fixture(scope="module")
def images(splits):
    return splits.test.images[:1_000]


@pytest.fixture(scope="module")
def ours(params, images):
    return predict(params, images)


class Convolution(nn.Module):
    """Any network but a perceptron."""

    @nn.compact
    def __call__(self, images, *, deterministic):
        x = nn.relu(nn.Conv(4, (3, 3), strides=4)(normalize(images)[..., None]))
        return nn.log_softmax(nn.Dense(3)(x.reshape(len(x), -1)))


def sequential(*widths, names=None) -> torch.nn.Sequential:
    """A perceptron with layers 1, 3, ... as in `nn.Sequential`, or with names of their own."""
    torch.manual_seed(0)
    linear = [torch.nn.Linear(*pair) for pair in itertools.pairwise(widths)]
    layers: list[tuple[str, torch.nn.Module]] = [("flat", torch.nn.Flatten())]
    for i, layer in enumerate(linear):
        layers += [(names[i] if names else str(2 * i + 1), layer), (f"relu{i}", torch.nn.ReLU())]
    return torch.nn.Sequential(collections.OrderedDict([*layers[:-1], ("softmax", torch.nn.Softmax(dim=1))]))


@torch.inference_mode()
def by_torch(model, images) -> np.ndarray:
    return model((torch.tensor(images) / 255 - 0.5) / 0.5).numpy()


def by_jax(params, images) -> np.ndarray:
    return predict(params, images, config=TrainConfig(model=interop.model_for(params)))


def in_lost_orders(model) -> list[dict[str, np.ndarray]]:
    """Orders that safetensors or others may give back: layers sorted as text, at random, and in the network's order."""
    tensors = {name: np.asarray(tensor) for name, tensor in model.state_dict().items()}
    return [dict(sorted(tensors.items())), safetensors.numpy.load(safetensors.numpy.save(tensors)), tensors]


# PyTorch


def test_our_weights_there_and_theirs_here(tmp_path, params, images, ours):
    model = sequential(784, 256, 128, 64, 10, names=["fc1", "fc2", "fc3", "fc4"])
    torch.save(model.state_dict(), tmp_path / "model.pth")
    theirs = interop.load_torch(tmp_path / "model.pth")
    np.testing.assert_allclose(predict(theirs, images), by_torch(model, images), **TOLERANCE)
    back = interop.to_torch(theirs)
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())
    model.load_state_dict(interop.to_torch(params))
    np.testing.assert_allclose(by_torch(model, images), ours, **TOLERANCE)


HIDDEN = [f"hidden_layers.{i}" for i in range(12)]


@pytest.mark.parametrize(
    ("widths", "names"),
    [
        ((784, *[20] * 11, 10), None),
        ((784, *[20] * 12, 10), [*HIDDEN, "output"]),
        ((784, *[10] * 12, 10), ["input", *HIDDEN]),
        ((784, 20, 20, 10), ["stem", "body", "a"]),
        ((784, 20, 30, 20, 10), ["z.0", "a.0", "z.1", "a.1"]),
    ],
)
def test_layers_are_put_into_the_network_s_order(images, widths, names):
    """Names sort as text in a safetensors file: 10 before 2."""
    names = names and [name.replace(".", "_") for name in names]
    model = sequential(*widths, names=names)
    expected = by_torch(model, images)
    for tensors in (model.state_dict(), *in_lost_orders(model)):
        np.testing.assert_allclose(by_jax(interop.from_torch(tensors), images), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("widths", "names", "ambiguous"),
    [
        ((784, 20, 20, 20, 10), ["stem", "body", "mid", "a"], "(body and mid|mid and body)"),
        ((784, 20, 20, 20, 10), ["y0", "z0", "y1", "z1"], "(y1 and z0|z0 and y1)"),
        ((784, *[10] * 12, 10), [*HIDDEN, "output"], ".* and .*"),
    ],
)
def test_an_order_that_names_do_not_tell_is_taken_from_pytorch_alone(tmp_path, images, widths, names, ambiguous):
    model = sequential(*widths, names=[name.replace(".", "_") for name in names])
    torch.save(model.state_dict(), tmp_path / "model.pth")
    params = interop.load_torch(tmp_path / "model.pth")
    np.testing.assert_allclose(by_jax(params, images), by_torch(model, images), **TOLERANCE)
    for tensors in in_lost_orders(model):
        with pytest.raises(ValueError, match=f"the order of the layers {ambiguous} is ambiguous; number them"):
            interop.from_torch(tensors)


def linear(inputs, outputs, name="fc1"):
    return {f"{name}.weight": torch.zeros(outputs, inputs), f"{name}.bias": torch.zeros(outputs)}


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({}, ValueError, "state_dict lacks layers"),
        ({"fc1.weight": torch.zeros(2, 3)}, ValueError, r"lacks fc1\.bias"),
        (linear(3, 4) | linear(5, 2, "fc2"), ValueError, r"no chain of layers; .*'fc2': \(5, 2\)"),
        (linear(3, 2) | {"conv.weight": torch.zeros(2, 1, 3, 3)}, ValueError, r"\['conv\.weight'\].* \(2, 1, 3, 3\)"),
        ({"epoch": 3, "state_dict": linear(3, 2)}, TypeError, "pass its entry 'state_dict'"),
        ({"fc1.weight": torch.zeros(2, 2).to_sparse()}, TypeError, r"\['fc1\.weight'\] is no dense tensor"),
        (torch.nn.Linear(2, 2), TypeError, r"must be a mapping, such as model\.state_dict\(\), got Linear"),
    ],
)
def test_what_is_no_perceptron_is_named(unchecked, tensors, error, message):
    with pytest.raises(error, match=message):
        interop.from_torch(tensors)


class Dangerous:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pytorch_files_execute_nothing_and_what_is_no_state_dict_is_named(tmp_path, unchecked):
    path, trace, contents = tmp_path / "model.pth", tmp_path / "trace", []
    for value in ({"fc1.weight": Dangerous(trace)}, torch.nn.Linear(2, 2), linear(3, 2)):
        torch.save(value, path)
        contents.append(path.read_bytes())
    whole = contents.pop()
    contents += [pickle.dumps(Dangerous(trace)), *(whole[:n] for n in range(0, len(whole), len(whole) // 20))]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.pth is damaged, or holds more than tensors[^\n]*$"):
            interop.load_torch(path)
    assert not trace.exists()
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"model\.pth: state_dict must be a mapping, .* got list"):
        interop.load_torch(path)


# Files of ours


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_safetensors_file_gives_back_the_same_bytes_and_pytorch_reads_it(tmp_path, params, images, dtype):
    path = tmp_path / "deep" / "größe.safetensors"
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    names = tuple(f"class {i}" for i in range(10))
    config = TrainConfig(model=FashionMLP(dtype="bfloat16"), batch_size=7)
    interop.save_safetensors(path, params, config=config, class_names=names, dropout_rate=0.5)
    network = interop.load_safetensors(path)
    same(network.params, params)
    assert network.params["fc2"]["bias"].dtype == dtype
    assert network.config == TrainConfig(model=FashionMLP(dtype="bfloat16", dropout_rate=0.5))
    assert network.class_names == names
    there, here = safetensors.torch.load_file(path), interop.to_torch(params)
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], tensor) and there[name].dtype == tensor.dtype for name, tensor in here.items())
    expected = predict(params, images)
    np.testing.assert_allclose(predict(interop.from_torch(there), images), expected, rtol=0, atol=1e-3)


def test_an_exported_network_compiles_once_for_each_number_of_images(tmp_path, params, images, ours):
    interop.export(tmp_path / "network", params)
    network = interop.load_exported(tmp_path / "network")
    for n in (1, 7, 1_000, 7, 1, 1_000):
        np.testing.assert_allclose(network(images[:n]), ours[:n], **TOLERANCE)
    assert network._cache_size() == 3  # pyright: ignore[reportFunctionMemberAccess]


def test_an_exported_network_runs_without_this_package(tmp_path, params, images, ours):
    interop.export(tmp_path / "network", params)
    np.save(tmp_path / "images.npy", images[:5])
    code = """
import sys
sys.modules.update(dict.fromkeys(["flax", "optax", "torch", "onnx", "fashion_jax"]))
import jax.export, numpy, safetensors.numpy
program = safetensors.numpy.load_file(sys.argv[1])["program"]
print(jax.export.deserialize(bytearray(program)).call(numpy.load(sys.argv[2])).tolist())
"""
    command = [sys.executable, "-c", code, str(tmp_path / "network"), str(tmp_path / "images.npy")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    np.testing.assert_allclose(json.loads(output), ours[:5], **TOLERANCE)


def by_onnx(path, images) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["probabilities"], {"images": np.asarray(images)})[0])


def test_networks_for_other_images_and_classes_go_everywhere(tmp_path, params, images, ours):
    interop.export_onnx(tmp_path / "onnx", params)
    np.testing.assert_allclose(by_onnx(tmp_path / "onnx", images), ours, **TOLERANCE)
    odd = np.random.default_rng(0).integers(256, size=(4, 8, 6), dtype=np.uint8)
    for model in (FashionMLP((5,), 3), FashionMLP((), 2), Convolution()):
        config = TrainConfig(model=model)
        params = init_state(jax.random.key(0), config=config, image_shape=(8, 6)).params
        expected = predict(params, odd, config=config)
        interop.export(tmp_path / "network", params, config=config, image_shape=(8, 6))
        np.testing.assert_allclose(interop.load_exported(tmp_path / "network")(odd), expected, **TOLERANCE)
        if isinstance(model, FashionMLP):
            same(interop.from_torch(interop.to_torch(params)), params)
            interop.export_onnx(tmp_path / "onnx", params, config=config, image_shape=(8, 6))
            np.testing.assert_allclose(by_onnx(tmp_path / "onnx", odd), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("write", "read", "other"),
    [
        (interop.save_safetensors, interop.load_safetensors, interop.export),
        (interop.export, interop.load_exported, interop.save_safetensors),
    ],
)
def test_damage_and_files_of_other_kinds_are_named(tmp_path, write, read, other):
    path, params = tmp_path / "network", init_state(jax.random.key(0), config=SMALL).params
    write(path, params, config=SMALL)
    whole = path.read_bytes()
    for position in range(8, len(whole), len(whole) // 20):
        flipped = bytes([whole[position] ^ 4])
        for content in (whole[:position], whole[:position] + flipped + whole[position + 1 :]):
            path.write_bytes(content)
            with pytest.raises(ValueError, match="network is damaged"):
                read(path)
    other(path, params, config=SMALL)
    with pytest.raises(ValueError, match=r"network holds no (network|program)"):
        read(path)


@pytest.mark.parametrize("write", [interop.save_safetensors, interop.export, interop.export_onnx])
def test_what_does_not_fit_together_is_not_written(tmp_path, unchecked, params, write):
    lanes = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), params)
    state = init_state(jax.random.key(0), config=SMALL if write is interop.export else TrainConfig())
    for wrong in (lanes, state, None):
        with pytest.raises(ValueError, match=r"params (must be those of one|do not fit the model)"):
            write(tmp_path / "network", wrong)
    for config in (SMALL, TrainConfig(model=Convolution())):
        with pytest.raises(ValueError, match=r"params are those of|do not fit the model|is for a FashionMLP"):
            write(tmp_path / "network", params, config=config)
    with pytest.raises(ValueError, match="class_names must name 10 classes, got 2"):
        interop.save_safetensors(tmp_path / "network", params, class_names=["a", "b"])
    assert not list(tmp_path.iterdir())


# Adam


# Adam


def test_torch_adam_equals_pytorch_s_in_float64():
    # From far below eps to far above it.
    scales = 10.0 ** np.arange(-12, 6, 2)
    gradients = (np.random.default_rng(0).standard_normal((2000, 9)) * scales).astype(np.float32)
    theirs, optimizer = torch.zeros(9, dtype=torch.float64, requires_grad=True), interop.torch_adam(0.003)
    adam, expected = torch.optim.Adam([theirs], lr=0.003), []
    for gradient in gradients:
        theirs.grad = torch.tensor(gradient).double()
        adam.step()
        expected.append(theirs.detach().numpy().copy())

    def step(carry, gradient):
        position, state = carry
        update, state = optimizer.update(gradient, state)
        return (position + update, state), position + update

    start = jnp.zeros(9)
    ours = jax.lax.scan(step, (start, optimizer.init(start)), gradients)[1]
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-6)
    # The first step shows the bias corrections alone.
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-6)
