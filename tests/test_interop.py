"""To PyTorch, safetensors, StableHLO and ONNX, and back: with the same outputs, or with an error that says why not."""

import itertools
import json
import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import onnx
import onnxruntime
import optax
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from benchmarks.reference import TutorialMLP, standardise
from fashion_jax import CLASS_NAMES, TrainConfig, interop
from fashion_jax.predict import predict
from fashion_jax.train import init_state, negative_log_likelihood

TOLERANCE = 1e-5
EXPORT = Path(__file__).parents[1] / "examples" / "export.py"


@pytest.fixture(scope="module")
def params(trained):
    return trained.state.params


@pytest.fixture(scope="module")
def ours(params, splits):
    return predict(params, splits.test.images)


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


@torch.inference_mode()
def by_torch(model, images) -> np.ndarray:
    return model.eval()(standardise(torch.tensor(images))).exp().numpy()


def sequential(*widths) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = [torch.nn.Flatten()]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1], torch.nn.LogSoftmax(dim=1))


def test_our_weights_in_pytorch(params, ours, splits):
    model = TutorialMLP(0.2)
    model.load_state_dict(interop.to_torch(params))
    np.testing.assert_allclose(by_torch(model, splits.test.images), ours, rtol=0, atol=TOLERANCE)


def test_pytorch_s_weights_here(tmp_path, splits):
    torch.manual_seed(0)
    model = TutorialMLP(0.2)
    path = tmp_path / "model.pth"
    torch.save(model.state_dict(), path)
    params = interop.load_torch(path)
    assert_same(params, interop.from_torch(model.state_dict(), config=TrainConfig()))
    expected = by_torch(model, splits.test.images)
    np.testing.assert_allclose(predict(params, splits.test.images), expected, rtol=0, atol=TOLERANCE)
    back = interop.to_torch(params)
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_a_chain_of_any_length_and_names(splits):
    """Twelve layers: sorted as text, layer 11 comes before layer 3."""
    torch.manual_seed(0)
    widths = (784, *range(40, 29, -1), 10)
    model = sequential(*widths)
    in_text_order = {f"net.{name}": tensor for name, tensor in sorted(model.state_dict().items())}
    params = interop.from_torch(in_text_order)
    assert interop.hidden_units(params) == widths[1:-1]
    images, config = splits.test.images[:500], TrainConfig(hidden=interop.hidden_units(params))
    np.testing.assert_allclose(predict(params, images, config=config), by_torch(model, images), rtol=0, atol=TOLERANCE)
    names = [f"{i}" for i in range(1, 24, 2)]
    model.load_state_dict(interop.to_torch(params, names=names))


def test_names_that_differ_in_more_than_numbers_keep_their_order(splits):
    model = torch.nn.Sequential()
    for name, layer in (
        ("stem", torch.nn.Linear(784, 20)),
        ("body", torch.nn.Linear(20, 20)),
        ("a", torch.nn.Linear(20, 10)),
    ):
        model.add_module(name, layer)
    params = interop.from_torch(model.state_dict())
    for i, layer in enumerate(model, start=1):
        np.testing.assert_array_equal(params[f"fc{i}"]["kernel"], layer.weight.detach().numpy().T)


@pytest.mark.parametrize("names", ["fc{0}{0}", "block{0}.fc{0}", "net.{0}", "fc0{0}", "layer{0}.fc1"])
def test_other_numbers_and_prefixes_are_read(names):
    tensors = {name: np.asarray(tensor) for name, tensor in TutorialMLP(0.0).state_dict().items()}
    named = {f"{names.format(name[2])}.{name.partition('.')[2]}": tensor for name, tensor in tensors.items()}
    assert_same(interop.from_torch(named, config=TrainConfig()), interop.from_torch(tensors))
    left_out = [*named][1]
    del named[left_out]
    with pytest.raises(ValueError, match=f"{left_out} is missing"):
        interop.from_torch(named)


def test_half_precision_is_read():
    tensors = {name: tensor.bfloat16() for name, tensor in TutorialMLP(0.0).state_dict().items()}
    params = interop.from_torch(tensors)
    np.testing.assert_array_equal(params["fc2"]["bias"], tensors["fc2.bias"].float().numpy())


def changed(**changes):
    tensors = {name: np.asarray(tensor) for name, tensor in TutorialMLP(0.0).state_dict().items()}
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    return tensors


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (changed(fc2__bias=None), None, "fc2.bias is missing"),
        (changed(fc3__weight=None, fc3__bias=None), None, "fc3.weight is missing; fc3.bias is missing"),
        (changed(fc4__weight=None, fc4__bias=None), TrainConfig(), "fc4.weight is missing; fc4.bias is missing"),
        (changed(fc4__weight=None, fc4__bias=None), None, r"fc3.weight must have shape \[10, 128\], got \[64, 128\]"),
        (changed(fc2__weight=np.zeros((128, 255))), None, r"fc2.weight must have shape \[128, 256\], got \[128, 255\]"),
        (changed(fc2__weight=np.zeros(128)), None, r"fc2.weight must have 2 axes, got shape \[128\]"),
        (changed(fc2__bias=np.zeros(127)), TrainConfig(), r"fc2.bias must have shape \[128\], got \[127\]"),
        (changed(fc1__bias=np.full(256, np.nan)), None, "fc1.bias holds a number that is not finite"),
        (changed(fc1__bias=np.full(256, 1e300)), None, "fc1.bias holds a number that is not finite"),
        (changed(bn__running_mean=np.zeros(3)), None, "bn.running_mean is neither a weight nor a bias"),
        (
            changed(fc5__weight=np.zeros((10, 10)), fc5__bias=np.zeros(10)),
            TrainConfig(),
            "fc5.weight and fc5.bias are not part of the network",
        ),
        ({"0.weight": np.zeros((10, 784)), "0.bias": np.zeros(10)}, TrainConfig(), "layer 2 of 4 is missing"),
        ({}, None, "fc1.weight is missing"),
    ],
)
def test_missing_extra_and_misshapen_tensors_are_named(tensors, config, message):
    with pytest.raises(ValueError, match=message):
        interop.from_torch(tensors, config=config)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"model": {"fc1.weight": np.zeros((2, 2))}, "epoch": 3},
            r"state_dict\['model'\] is a mapping.*pass that entry",
        ),
        ({"epoch": 3}, r"state_dict\['epoch'\] must be a tensor of floats, got int64"),
        ({"fc1.weight": torch.zeros((2, 2), dtype=torch.int32)}, "must be a tensor of floats, got int32"),
        (torch.nn.Linear(2, 2), r"state_dict must be a mapping, such as model\.state_dict\(\), got Linear"),
        (None, "state_dict must be a mapping, .* got NoneType"),
        ([], "state_dict must be a mapping, .* got list"),
        ({"fc1.weight": "zeros"}, "must be a tensor of floats"),
    ],
)
def test_what_is_no_tensor_is_refused(tensors, message, unchecked):
    with pytest.raises(TypeError, match=message):
        interop.from_torch(tensors)


class Dangerous:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pytorch_files_execute_nothing(tmp_path, unchecked):
    path, trace = tmp_path / "model.pth", tmp_path / "trace"
    torch.save({"fc1.weight": Dangerous(trace)}, path)
    with pytest.raises(ValueError, match=r"model\.pth is not a file of PyTorch weights alone"):
        interop.load_torch(path)
    path.write_bytes(pickle.dumps(Dangerous(trace)))
    with pytest.raises(ValueError, match=r"model\.pth is not a file of PyTorch weights alone"):
        interop.load_torch(path)
    assert not trace.exists()
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.pth"):
        interop.load_torch(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"model\.pth: state_dict must be a mapping, .* got list"):
        interop.load_torch(path)
    with pytest.raises(FileNotFoundError):
        interop.load_torch(tmp_path / "none.pth")


def test_pytorch_files_that_are_cut_off_are_named(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(sequential(784, 16, 10).state_dict(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 100):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.pth is not a file of PyTorch weights alone, or is damaged"):
            interop.load_torch(path)


def test_to_torch_refuses_other_params_and_names(params, unchecked):
    for wrong in (init_state(jax.random.key(0)), None, [params]):
        with pytest.raises(ValueError, match=r"params must be those of a model, such as state\.params, got"):
            interop.to_torch(wrong)
    with pytest.raises(ValueError, match=r"missing: fc4\.kernel, fc4\.bias|missing: fc2\.kernel, fc2\.bias"):
        interop.to_torch({name: params[name] for name in ("fc1", "fc3", "fc4")})
    for names in (["0", "2"], ["0", "2", "2", "4"]):
        with pytest.raises(ValueError, match="names must name each of the 4 layers once"):
            interop.to_torch(params, names=names)


def test_safetensors_gives_back_the_same_bytes(tmp_path, params):
    config = TrainConfig(learning_rate=0.001, train_eval_size=None)
    path = tmp_path / "deep" / "größe.safetensors"
    names = [f"class {i}" for i in range(10)]
    interop.save_safetensors(path, params, config=config, class_names=names, dropout_rate=0.5)
    network = interop.load_safetensors(path)
    assert network.dropout_rate == 0.5
    assert_same(network.params, params)
    assert network.config == config
    assert network.class_names[3] == "class 3"
    model = TutorialMLP(0.2)
    model.load_state_dict(safetensors.torch.load_file(path))
    assert torch.equal(model.fc4.bias, interop.to_torch(params)["fc4.bias"])
    with pytest.raises(ValueError, match=r"params do not fit the config: .*fc1\.kernel must have shape \[784, 32\]"):
        interop.save_safetensors(path, params, config=TrainConfig(hidden=(32, 128, 64)))
    with pytest.raises(ValueError, match=r"dropout_rate must lie in \[0, 1\), got 1.5"):
        interop.save_safetensors(path, params, dropout_rate=1.5)
    assert_same(interop.load_safetensors(path).params, params)
    interop.save_safetensors(path, params)
    assert interop.load_safetensors(path).dropout_rate is None


def test_weights_that_are_not_finite_are_not_written(tmp_path, params):
    wrong = params | {"fc2": {**params["fc2"], "bias": params["fc2"]["bias"].at[3].set(np.nan)}}
    for write in (
        lambda: interop.save_safetensors(tmp_path / "network", wrong),
        lambda: interop.export(wrong, TrainConfig(), tmp_path / "network"),
        lambda: interop.export_onnx(wrong, TrainConfig(), tmp_path / "network"),
    ):
        with pytest.raises(ValueError, match=r"params hold numbers that are not finite, in fc2\.bias$"):
            write()
    assert not list(tmp_path.iterdir())


def damaged(whole: bytes, trials: int):
    """Give files with one flipped bit, more of them in the header than by chance, and files that are cut off."""
    rng = np.random.default_rng(0)
    for trial in range(trials):
        content = bytearray(whole)
        end = 3000 if trial % 2 else len(whole)
        content[rng.integers(end)] ^= 1 << int(rng.integers(8))
        yield bytes(content)
    for length in (0, 1, 7, 8, 20, 100, 1000, len(whole) // 2, len(whole) - 1):
        yield whole[:length]
    yield whole + b"\0"


def test_damaged_safetensors_are_refused(tmp_path):
    config = TrainConfig(hidden=(16,))
    path = tmp_path / "network.safetensors"
    params = init_state(jax.random.key(0), config=config).params
    interop.save_safetensors(path, params, config=config)
    accepted = 0
    for content in damaged(path.read_bytes(), 400):
        path.write_bytes(content)
        try:
            network = interop.load_safetensors(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            continue
        # A flipped bit in the white space that fills up the header changes nothing.
        assert_same(network.params, params)
        assert (network.config, network.class_names) == (config, CLASS_NAMES)
        accepted += 1
    assert accepted < 20
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"network\.safetensors"):
        interop.load_safetensors(path)


def test_foreign_safetensors_are_refused_and_can_still_be_read(tmp_path, params):
    path = tmp_path / "model.safetensors"
    model = TutorialMLP(0.2)
    safetensors.torch.save_file(model.state_dict(), path)
    with pytest.raises(ValueError, match=r"has no digest, so another program wrote it.* sorts by name"):
        interop.load_safetensors(path)
    assert_same(interop.from_torch(safetensors.numpy.load_file(path)), interop.from_torch(model.state_dict()))


@pytest.fixture(scope="module")
def program(params, tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "network.stablehlo"
    interop.export(params, TrainConfig(), path)
    return path


def test_stablehlo_runs_on_any_number_of_images(program, ours, splits, unchecked):
    network = interop.load_exported(program)
    assert network.class_names == CLASS_NAMES
    assert set(network.exported.platforms) == {"cpu", "cuda"}
    for n in (1, 7, 10_000):
        np.testing.assert_allclose(network(splits.test.images[:n]), ours[:n], rtol=0, atol=TOLERANCE)
    with pytest.raises(TypeError, match="must be uint8 pixels from 0 to 255, got float32"):
        network(np.zeros((1, 28, 28), np.float32))
    for shape in ((28, 28), (0, 28, 28), (1, 14, 56)):
        with pytest.raises(ValueError, match=r"\[n, 28, 28\] with n at least 1"):
            network(np.zeros(shape, np.uint8))


def test_stablehlo_runs_without_the_model(program, ours, splits, tmp_path):
    np.save(tmp_path / "images.npy", splits.test.images[:5])
    code = """
import sys
sys.modules.update(dict.fromkeys(["flax", "optax", "torch", "onnx"]))
import numpy as np
from fashion_jax.interop import load_exported
print(load_exported(sys.argv[1])(np.load(sys.argv[2])).tolist())
"""
    command = [sys.executable, "-W", "error", "-c", code, str(program), str(tmp_path / "images.npy")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    np.testing.assert_allclose(json.loads(output), ours[:5], rtol=0, atol=TOLERANCE)


def test_damaged_programs_are_refused(tmp_path, program):
    path = tmp_path / "network.stablehlo"
    for content in damaged(program.read_bytes(), 200):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"network\.stablehlo"):
            interop.load_exported(path)
    with pytest.raises(FileNotFoundError):
        interop.load_exported(tmp_path / "none")


def test_onnx_against_onnxruntime(tmp_path, params, ours, splits):
    path = tmp_path / "network.onnx"
    interop.export_onnx(params, TrainConfig(), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n in (1, 10_000):
        theirs = session.run(["probabilities"], {"images": np.asarray(splits.test.images[:n])})[0]
        np.testing.assert_allclose(theirs, ours[:n], rtol=0, atol=TOLERANCE)
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(properties["class_names"]) == list(CLASS_NAMES)


def test_the_example_takes_every_route(tmp_path, params):
    path = tmp_path / "network.safetensors"
    interop.save_safetensors(path, params)
    command = [sys.executable, str(EXPORT), str(path), "--output", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = [line.split("|") for line in result.stdout.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 5
    assert all(line.startswith("|") for line in result.stdout.splitlines())
    assert result.stderr.splitlines()[-1] == f"the files are in {tmp_path / 'out'}"
    assert all(float(row[2]) <= TOLERANCE for row in rows)
    assert len({row[3] for row in rows}) == 1
    names = ["network.onnx", "network.pth", "network.safetensors", "network.stablehlo", "report.md"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_the_example_keeps_the_classes_and_the_rate(tmp_path, capsys):
    config, names = TrainConfig(hidden=(8,), classes=4), tuple("abcd")
    path, out = tmp_path / "network.safetensors", tmp_path / "out"
    params = init_state(jax.random.key(0), config=config).params
    interop.save_safetensors(path, params, config=config, class_names=names, dropout_rate=0.5)
    example = runpy.run_path(str(EXPORT))
    assert example["main"](example["Flags"](path, output=out)) == 0
    network = interop.load_safetensors(out / "network.safetensors")
    assert (network.class_names, network.dropout_rate) == (names, 0.5)
    assert interop.load_exported(out / "network.stablehlo").class_names == names
    (classes,) = onnx.load(out / "network.onnx").metadata_props
    assert json.loads(classes.value) == list(names)
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[3].strip() for row in rows] == ["-"] * 6


WRITERS = {
    "safetensors": lambda params, config, path, **names: interop.save_safetensors(path, params, config=config, **names),
    "stablehlo": interop.export,
    "onnx": interop.export_onnx,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_does_not_fit_together_is_not_written(tmp_path, params, kind):
    path = tmp_path / "network"
    with pytest.raises(ValueError, match=r"params do not fit the config: .*fc1\.kernel must have shape \[784, 32\]"):
        WRITERS[kind](params, TrainConfig(hidden=(32, 128, 64)), path)
    for names in (CLASS_NAMES[:9], (*CLASS_NAMES, "Hat")):
        with pytest.raises(ValueError, match=f"class_names must name 10 classes, got {len(names)}"):
            WRITERS[kind](params, TrainConfig(), path, class_names=names)
    assert not path.exists()


def test_functions_are_not_kept_in_a_file(tmp_path):
    """They are for training alone."""
    config = TrainConfig(hidden=(8,), loss=negative_log_likelihood, optimiser=optax.sgd)
    path = tmp_path / "network.safetensors"
    interop.save_safetensors(path, init_state(jax.random.key(0), config=config).params, config=config)
    assert interop.load_safetensors(path).config == TrainConfig(hidden=(8,))


def test_networks_for_other_images_and_classes_go_everywhere(tmp_path):
    config = TrainConfig(hidden=(5,), image_shape=(8, 6), classes=3)
    params = init_state(jax.random.key(0), config=config).params
    images = np.random.default_rng(0).integers(256, size=(4, 8, 6), dtype=np.uint8)
    expected, names = predict(params, images, config=config), ["a", "b", "c"]
    assert_same(interop.from_torch(interop.to_torch(params), config=config), params)
    for kind, write in WRITERS.items():
        write(params, config, tmp_path / kind, class_names=names)
    assert interop.load_safetensors(tmp_path / "safetensors")[1:3] == (config, ("a", "b", "c"))
    program = interop.load_exported(tmp_path / "stablehlo")
    np.testing.assert_allclose(program(images), expected, rtol=0, atol=TOLERANCE)
    session = onnxruntime.InferenceSession(tmp_path / "onnx", providers=["CPUExecutionProvider"])
    assert [port.shape for port in (*session.get_inputs(), *session.get_outputs())] == [["n", 8, 6], ["n", 3]]
    theirs = session.run(["probabilities"], {"images": images})[0]
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=TOLERANCE)


def test_state_dicts_without_names_or_numbers_are_refused(unchecked):
    with pytest.raises(TypeError, match=r"state_dict must have names such as 'fc1\.weight', got 0"):
        interop.from_torch({0: torch.zeros(2, 2)})
    with pytest.raises(TypeError, match=r"state_dict\['fc1.weight'\] has a shape and no numbers: .* device meta"):
        interop.from_torch({"fc1.weight": torch.zeros(2, 2, device="meta")})


def test_a_network_that_cannot_be_read_is_told_from_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        interop.load_safetensors(tmp_path / "none.safetensors")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        interop.load_safetensors(tmp_path)
