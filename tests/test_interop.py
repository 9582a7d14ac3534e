"""To PyTorch, safetensors, StableHLO and ONNX, and back: the same outputs, or an error that says why not."""

import collections
import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path

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
from fashion_jax.model import FashionMLP
from fashion_jax.networks import NormalizedMLP
from fashion_jax.steps import init_state

TOLERANCE = {"rtol": 0, "atol": 1e-5}
SMALL = TrainConfig(model=FashionMLP((16,)))


@pytest.fixture(scope="module")
def params():
    return init_state(jax.random.key(0)).params


@pytest.fixture(scope="module")
def images(splits):
    return splits.test.images[:100]


def sequential(*widths, names=None) -> torch.nn.Sequential:
    """A perceptron with layers 1, 3, ... as in `nn.Sequential`, or with names of their own."""
    torch.manual_seed(0)
    layers: list[tuple[str, torch.nn.Module]] = [("flat", torch.nn.Flatten())]
    for i, pair in enumerate(itertools.pairwise(widths)):
        layers += [(names[i] if names else str(2 * i + 1), torch.nn.Linear(*pair)), (f"relu{i}", torch.nn.ReLU())]
    return torch.nn.Sequential(collections.OrderedDict([*layers[:-1], ("softmax", torch.nn.Softmax(dim=1))]))


@pytest.mark.parametrize(
    ("widths", "names", "ambiguous"),
    [
        # Names sort as text in a safetensors file: 10 before 2.
        ((784, *[20] * 11, 10), None, None),
        ((784, *[20] * 12, 10), [*(f"hidden{i}" for i in range(12)), "output"], None),
        ((784, 20, 30, 20, 10), ["z0", "a0", "z1", "a1"], None),
        ((784, 20, 20, 20, 10), ["stem", "body", "mid", "a"], "(body and mid|mid and body)"),
        ((784, 20, 20, 20, 10), ["y0", "z0", "y1", "z1"], "(y1 and z0|z0 and y1)"),
    ],
)
def test_layers_are_put_into_the_network_s_order(tmp_path, images, widths, names, ambiguous):
    """PyTorch's own files keep it, whatever the names; a mapping that has lost it is an error if they do not tell."""
    model = sequential(*widths, names=names)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    found = [interop.load_torch(tmp_path / "model.pth")]
    tensors = {name: np.asarray(tensor) for name, tensor in model.state_dict().items()}
    for lost in (dict(sorted(tensors.items())), safetensors.numpy.load(safetensors.numpy.save(tensors)), tensors):
        if ambiguous:
            with pytest.raises(ValueError, match=f"the order of the layers {ambiguous} is ambiguous; number them"):
                interop.from_torch(lost)
        else:
            found.append(interop.from_torch(lost))
    expected = model((torch.tensor(images) / 255 - 0.5) / 0.5).detach()
    for params in found:
        probabilities = predict(params, images, config=TrainConfig(model=interop.model_for(params)))
        np.testing.assert_allclose(probabilities, expected, **TOLERANCE)


def linear(inputs, outputs, name="fc1"):
    return {f"{name}.weight": torch.zeros(outputs, inputs), f"{name}.bias": torch.zeros(outputs)}


class Dangerous:
    def __reduce__(self):
        return Path.touch, (Path("trace"),)


def test_pytorch_files_execute_nothing_and_what_is_no_state_dict_is_named(tmp_path, monkeypatch, unchecked):
    monkeypatch.chdir(tmp_path)
    path, contents = Path("model.pth"), [pickle.dumps(Dangerous())]
    for value in ({"fc1.weight": Dangerous()}, torch.nn.Linear(2, 2), linear(3, 2)):
        torch.save(value, path)
        contents.append(path.read_bytes())
    whole = contents.pop()
    for content in (*contents, *(whole[:n] for n in range(0, len(whole), len(whole) // 20))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.pth is damaged, or holds more than tensors[^\n]*$"):
            interop.load_torch(path)
    assert not Path("trace").exists()
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"model\.pth: state_dict must be a mapping, .* got list"):
        interop.load_torch(path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_safetensors_file_gives_back_the_same_bytes_and_pytorch_reads_it(tmp_path, params, dtype):
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
    same(interop.from_torch(there), jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))


def test_an_exported_network_compiles_once_a_size_and_runs_without_this_package(tmp_path, params, images):
    interop.export(tmp_path / "network", params)
    network, expected = interop.load_exported(tmp_path / "network"), predict(params, images)
    for n in (1, 7, 100, 7, 1, 100):
        np.testing.assert_allclose(network(images[:n]), expected[:n], **TOLERANCE)
    assert network._cache_size() == 3  # pyright: ignore[reportFunctionMemberAccess]
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
    np.testing.assert_allclose(json.loads(output), expected[:5], **TOLERANCE)


def test_networks_for_other_images_and_classes_go_everywhere(tmp_path):
    odd = np.random.default_rng(0).integers(256, size=(4, 8, 6), dtype=np.uint8)
    for model in (FashionMLP((5, 4), 3), FashionMLP((), 2), NormalizedMLP(norm="layer")):
        config = TrainConfig(model=model)
        params = init_state(jax.random.key(0), config=config, image_shape=(8, 6)).params
        expected = predict(params, odd, config=config)
        interop.export(tmp_path / "network", params, config=config, image_shape=(8, 6))
        np.testing.assert_allclose(interop.load_exported(tmp_path / "network")(odd), expected, **TOLERANCE)
        if isinstance(model, FashionMLP):
            same(interop.from_torch(interop.to_torch(params)), params)
            interop.export_onnx(tmp_path / "onnx", params, config=config, image_shape=(8, 6))
            session = onnxruntime.InferenceSession(tmp_path / "onnx", providers=["CPUExecutionProvider"])
            (probabilities,) = session.run(["probabilities"], {"images": odd})
            np.testing.assert_allclose(probabilities, expected, **TOLERANCE)


@pytest.mark.parametrize("ours", ["safetensors", "exported"])
def test_damage_and_files_of_other_kinds_are_named(tmp_path, ours):
    path, params = tmp_path / "network", init_state(jax.random.key(0), config=SMALL).params
    read, write, other = interop.load_safetensors, interop.save_safetensors, interop.export
    if ours == "exported":
        read, write, other = interop.load_exported, other, write
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
    for config in (SMALL, TrainConfig(model=NormalizedMLP(norm="layer"))):
        with pytest.raises(ValueError, match=r"params are those of|do not fit the model|is for a FashionMLP"):
            write(tmp_path / "network", params, config=config)
    with pytest.raises(ValueError, match="class_names must name 10 classes, got 2"):
        interop.save_safetensors(tmp_path / "network", params, class_names=["a", "b"])
    assert not list(tmp_path.iterdir())
