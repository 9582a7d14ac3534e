"""Mistakes of callers: one line that names the argument and the value found, before anything is trained."""

import functools
import inspect
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from sweep_worker import LINEAR, ROOT, equal, history

from fashion_jax import FashionMLP, TrainConfig, _checks, devices, hold_out, load, plot, predict, predict_mc, subset
from fashion_jax.calibration import detection, entropy, score
from fashion_jax.callbacks import Progress
from fashion_jax.checkpoint import Checkpoints
from fashion_jax.devices import join_machines
from fashion_jax.interop import from_torch
from fashion_jax.loggers import TensorBoard, WandB
from fashion_jax.model import normalize
from fashion_jax.networks import NormalizedMLP
from fashion_jax.steps import evaluate, init_state
from fashion_jax.train import fit, sweep
from fashion_jax.types import Batch, Best

pytestmark = pytest.mark.usefixtures("unchecked")
KEY = jax.random.key(0)
T, V = TypeError, ValueError
ONCE = "must hold at least one value, and none twice, got"
HALVES = np.full(2, 0.5)
SGD = TrainConfig(model=LINEAR.model, optimizer=optax.sgd)
FIXED = TrainConfig(optimizer=lambda: optax.sgd(0.1))
FREE = TrainConfig(model=LINEAR.model, optimizer=optax.contrib.schedule_free_sgd)
RENAMED = {"fc2": {"bias": np.zeros(10), "kernel": np.zeros((784, 10))}}


@pytest.fixture(scope="module")
def data(data) -> Batch:
    return data[0]


def run(data, train=None, **changes):
    return fit(*(train or (data, data)), **{"key": KEY, "config": LINEAR, "epochs": 1} | changes)


def grid(data, **changes):
    return sweep(data, data, **{"seeds": [0], "config": LINEAR, "epochs": 1} | changes)


def structure(data, **fields):
    return TrainConfig(**fields)


def measured(data, **metrics):
    return run(data, config=TrainConfig(model=LINEAR.model, metrics=metrics))


def sampled(data, images=lambda images: images, **changes):
    options = {"key": KEY, "samples": 2, "dropout_rate": 0.2, "config": LINEAR} | changes
    return predict_mc(init_state(KEY, config=LINEAR).params, images(data.images), **options)


def classify(image, probabilities):
    return plot.classification(image, probabilities, class_names=["a", "b"])


def linear(inputs, outputs, name="fc1"):
    return {f"{name}.weight": torch.zeros(outputs, inputs), f"{name}.bias": torch.zeros(outputs)}


class Logits(nn.Module):
    @nn.compact
    def __call__(self, images, *, deterministic):
        return nn.Dense(10)(normalize(images).reshape(len(images), -1))


def assert_raises(error, message, call, *arguments, **named):
    with pytest.raises(error, match=message) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)


DATA = [
    (lambda d: d._replace(images=d.images.astype(np.float32)), T, r"\.images must be uint8 .* float32 from 0 to 255"),
    (lambda d: d._replace(images=np.ma.masked_less(d.images, 9)), T, r"\.images is a masked array"),
    (lambda d: d._replace(labels=d.labels.tolist()), T, r"\.labels must be .* got list; np\.asarray converts it"),
    (lambda d: d._replace(labels=torch.tensor(d.labels)), T, r"\.labels must be .* got Tensor; \.numpy\(\) converts"),
    (lambda d: d._replace(labels=d.labels * 1.0), T, r"\.labels must be integers, got float64"),
    (lambda d: d._replace(labels=np.eye(10, dtype=int)[d.labels]), V, r" must hold .* and labels \[n\], got"),
    (lambda d: Batch(d.images[:0], d.labels[:0]), V, " must hold at least one example, got none"),
    (lambda d: d._replace(labels=d.labels - 9), V, r"\.labels must lie in 0\.\..*, got -9\.\.0"),
    (lambda d: d.images, T, r" must be a Batch\(images, labels\), got ndarray"),
]


@pytest.mark.parametrize(("spoil", "error", "message"), DATA)
def test_bad_data_is_named(data, spoil, error, message):
    assert_raises(error, f"^train{message}", run, data, (spoil(data), data))
    assert_raises(error, f"^validation{message}", run, data, (data, spoil(data)))
    assert_raises(error, f"^batch{message}", subset, spoil(data), 1, key=KEY)


FIT = [
    ({"key": 0}, T, r"^key must be one typed key, from jax\.random\.key\(seed\); got 0"),
    ({"key": jax.random.PRNGKey(0)}, T, "^key must be one typed key"),
    ({"wd": 0.1, "config": TrainConfig()}, T, r"hyperparameter 'wd'; .*; did you mean weight_decay of optax\.adamw\?$"),
    ({"classes": 26}, T, r"'classes'; the model has dropout_rate; the .*; did you mean classes of FashionMLP\?$"),
    ({"nesterov": 1, "config": SGD}, T, "'nesterov'; .*; the optimizer has learning_rate, momentum, .*; did you mean"),
    ({"learning_rate": 1.0, "config": FIXED}, T, "'learning_rate'; the model has dropout_rate; the optimizer has none"),
    ({"epoch": 3}, T, r"hyperparameter 'epoch'; .*; did you mean epochs\?$"),
    ({"learning_rate": float("nan")}, V, "^learning_rate must be finite, got nan"),
    ({"learning_rate": [0.1, 0.2]}, T, r"^learning_rate must be a number, got \[0\.1, 0\.2\]"),
    ({"epochs": 0}, V, "^epochs must be at least 1, got 0"),
    ({"config": {"batch_size": 3}}, T, "^config must be a TrainConfig, got {'batch_size': 3}"),
    ({"progress": "yes"}, T, "^progress must be True, False or None, got 'yes'"),
    ({"callbacks": [Progress]}, T, r"^callbacks must be a list of functions, got \[<class"),
    ({"checkpoint": 5}, T, "^checkpoint must be a path, got 5"),
    ({"checkpoint": __file__}, OSError, f"File exists: '{__file__}'"),
    ({"checkpoint": "gs://bucket/run"}, V, "^checkpoint must be a local path, got 'gs://bucket/run'"),
    ({"checkpoint": Checkpoints("no", every=0)}, V, r"^checkpoint\.every must be at least 1, got 0"),
    ({"start": {"fc1": {}}}, T, "^start must be a TrainState or a Best, such as run.best, got dict"),
    ({"start": Best({"fc1": {}}, 1.0, 1)}, V, r"^params do not fit the model: fc1\.bias is missing"),
    ({"start": init_state(KEY, config=SGD)}, V, "^start does not fit the config: its optimizer state is another"),
    ({"config": TrainConfig(model=Logits())}, V, r"^the model must return log-prob.* sum to .*\.log_softmax"),
    ({"config": TrainConfig(optimizer=lambda learning_rate: None)}, T, "^optimizer must return an optax.*, got None"),
    ({"config": TrainConfig(optimizer=lambda momentum: None)}, T, "^the optimizer needs momentum: numbers here, the"),
    ({"config": FREE}, V, "^this optimizer keeps an average to evaluate; pass eval_params=optax"),
    ({"config": TrainConfig(loss=lambda p, y: p.sum())}, V, r"^loss must return one number an example, \[n\], got"),
    ({"config": TrainConfig(model=FashionMLP(classes=5))}, V, r"^train\.labels must lie in 0\.\.4, got 0\.\.9"),
]
FIELDS = [
    ({"model": FashionMLP}, T, r"^model must be a flax\.linen\.Module such as FashionMLP\(\), .*; got <class"),
    ({"optimizer": optax.lion(0.1)}, T, "^optimizer must be a factory, .*; pass optax.adam, not opt"),
    ({"optimizer": 0.1}, T, r"^optimizer must be a function, got 0\.1"),
    ({"loss": None}, T, "^loss must be a function, got None"),
    ({"batch_size": None}, T, "^batch_size must be an integer, got None"),
    ({"eval_batch_size": True}, T, "^eval_batch_size must be an integer, got True"),
    ({"train_eval_size": 0}, V, "^train_eval_size must be at least 1, got 0"),
    ({"model": FashionMLP(hidden=(np.ones(1),))}, T, "^every field must be hashable, such as .*: Failed to hash"),
    ({"metrics": 3}, T, "^metrics must be a dictionary of functions, got 3"),
    ({"lr": 0.1}, T, "^TrainConfig has no field 'lr'; .* you mean learning_rate of fit and sweep"),
]
SWEEP = [
    ({"seeds": 3}, T, r"^seeds must be a sequence such as range\(8\), got 3"),
    ({"seeds": [2**32]}, V, r"^seeds must be at most 4294967295, got 4294967296"),
    ({"seed": (1, 2)}, T, r"^there is no hyperparameter 'seed'; .*; did you mean seeds of sweep\?$"),
    ({"dropout_rate": (0.0, 1.0)}, V, r"^dropout_rate must lie in \[0, 1\), got 1\.0"),
    ({"learning_rate": ()}, V, rf"^learning_rate {ONCE} \[\]"),
    ({"learning_rate": (0.3, 0.1 + 0.2)}, V, f"^learning_rate {ONCE}"),
    ({"lanes_at_once": 0}, V, "^lanes_at_once must be at least 1, got 0"),
]
METRICS = [
    ({"ece": lambda a, b: 0.0}, T, r"^metrics\['ece'\] must be a function of log_probs and labels, or of grads"),
    ({"ece": 5}, T, r"^metrics\['ece'\] must be a function .* got 5"),
    ({"loss": lambda log_probs, labels: 0.0}, V, "^metrics must have names of their own, got 'loss'"),
    ({"train_loss": lambda grads, updates: 0.0}, V, "^metrics must have names of their own, got 'train_loss'"),
    ({"dropout_rate": lambda grads, updates: 0.0}, V, "own, and 'dropout_rate' is a hyperparameter"),
    ({"all": lambda log_probs, labels: log_probs}, V, r"^metrics\['all'\] must return a number, got shape \[1, 10\]"),
    ({"all": lambda grads, updates: grads["fc1"]["bias"]}, V, r"^metrics\['all'\] must .*, got shape \[10\]"),
]
SAMPLES = [
    ({"images": lambda images: images.tolist()}, T, "^images must be a NumPy or JAX array, got list"),
    ({"images": lambda images: images[0]}, V, r"^images must have shape \[n, height, width\], got \[28, 28\]"),
    ({"images": lambda images: images[:, ::2]}, V, r"fc1\.kernel must have shape \[392, 10\], got \[784, 10\]"),
    ({"samples": 0}, V, "^samples must be at least 1, got 0"),
    ({"dropout_rate": 1.0}, V, r"^dropout_rate must lie in \[0, 1\), got 1\.0"),
]
OUTSIDE = "is traced by jax.jit or jax.vmap; call this outside"
OTHER = [
    (lambda d: jax.jit(lambda key: run(d, key=key))(KEY), T, f"^key {OUTSIDE}"),
    (lambda d: jax.vmap(lambda rate: run(d, b1=rate))(jnp.ones(2)), T, f"^b1 {OUTSIDE}"),
    (lambda d: run(d, (d, d._replace(images=d.images[:, ::2]))), V, r"^validation\.images must .* got \[200, 14, 28\]"),
    (lambda d: jax.jit(functools.partial(fit, key=KEY))(d, d), T, r"^train\.images is traced by jax\.jit or jax\.vmap"),
    (lambda d: load(source="web"), V, "^source must be one of auto, idx, tfds, download; got 'web'"),
    (lambda d: join_machines("host:1", processes=2), V, "^coordinator, processes and process belong together, got 'h"),
    (lambda d: TensorBoard("s3://bucket"), V, "^directory must be a local path, got 's3://bucket'"),
    (lambda d: WandB(dir="s3://bucket"), V, "^dir must be a local path, got 's3://bucket'"),
    (
        lambda d: load(data_dir="/no"),
        OSError,
        "^data_dir, or .* is not a directory: /no; .* `python -m fashion_jax.data",
    ),
    (lambda d: load("/no/such"), V, "^name must be one of .*, got '/no/such'; pass a directory as data_dir="),
    (lambda d: load(Path("/no/such")), T, "^name must be one of .*, got PosixPath.*; pass a directory as data_dir="),
    (lambda d: load(data_dir="gs://bucket"), V, "^data_dir must be a local path, got 'gs://bucket'"),
    *((lambda d, f=f: hold_out(d, f, key=KEY), V, "^fraction must leave examples in both") for f in (1.0, -0.2, 1e-9)),
    (lambda d: subset(d, 0, key=KEY), V, "^size must be at least 1, got 0"),
    (lambda d: subset(d, 201, key=KEY), V, "^size must be at most 200, the number of examples, got 201"),
    (lambda d: classify(d.images[0] / 255, HALVES), T, "^image must be uint8 pixels from 0 to 255, got float64"),
    (lambda d: classify(d.images[0], HALVES[None]), V, r"^probabilities must have shape \[2\] .*, got \[1, 2\]"),
    (lambda d: classify(d.images[0], np.log(HALVES)), V, r"must lie in \[0, 1\], got -0.69.* undoes a log"),
    (lambda d: classify(d.images[0], HALVES * np.nan), V, r"^probabilities must lie in \[0, 1\], got nan"),
    (lambda d: plot.samples(d.images[0]), V, r"^images must have shape \[n, height, width\]"),
    (lambda d: plot.samples(d.images, columns=0), V, "^columns must be at least 1, got 0"),
    (lambda d: plot.losses({"arm": history(2, 3, 5)}), V, r"^arms\['arm'\] must have leaves \[epochs\] or \[seeds, ep"),
    (lambda d: score(HALVES[None], np.zeros(2, int)), V, r"labels \[n\], got \(1, 2\) and \(2,\)"),
    (lambda d: score(np.zeros((0, 2)), np.zeros(0, int)), V, r"labels \[n\], got \(0, 2\) and \(0,\)"),
    (lambda d: score(np.stack([HALVES] * 3), np.array([0, 2, -1])), V, r"^labels must lie in 0\.\.1, got \[-1, 2\]"),
    (lambda d: entropy(np.full((3, 2), np.nan)), V, "sum to 1 over the classes"),
    (lambda d: entropy(HALVES), V, r"must be \[\.\.\., n, classes\]"),
    (lambda d: detection(np.zeros(0), np.zeros(3)), V, "at least one example each"),
    (lambda d: normalize(jnp.ones(2)), T, "^images must be raw uint8 pixels, which the model normalizes, got float32"),
    (lambda d: from_torch(torch.nn.Linear(2, 2)), T, r"must be a mapping, such as model\.state_dict\(\), got Linear"),
    (lambda d: from_torch({}), V, "^state_dict lacks layers"),
    (lambda d: from_torch({"fc1.weight": torch.zeros(2, 3)}), V, r"^state_dict lacks fc1\.bias"),
    (lambda d: from_torch(linear(3, 4) | linear(5, 2, "fc2")), V, r"no chain of layers; .*'fc2': \(5, 2\)"),
    (lambda d: from_torch({"c.weight": torch.zeros(2, 1, 3, 3)}), V, r"^state_dict\['c\.weight'\].* \(2, 1, 3, 3\)"),
    (lambda d: from_torch({"epoch": 3, "net": linear(3, 2)}), T, "^state_dict holds more .* pass its entry 'net'"),
    (lambda d: from_torch({"weight": torch.eye(2).to_sparse()}), T, r"^state_dict\['weight'\] is no dense tensor"),
    (lambda d: NormalizedMLP(dropout=0.2), T, "^NormalizedMLP has no field 'dropout'; .*; did you mean dropout_rate"),
    (lambda d: evaluate(RENAMED, d, config=LINEAR), V, r"^params .* fc1\.bias is missing; .*fc2\.bias is not part of"),
    (lambda d: predict({"fc1": {}}, d.images / 255), T, "^images must be uint8 pixels from 0 to 255, got float64"),
]
TABLES = [(run, FIT), (grid, SWEEP), (structure, FIELDS), (measured, METRICS), (sampled, SAMPLES)]
CASES = [(call, *row) for call, rows in TABLES for row in rows] + [(call, {}, *row) for call, *row in OTHER]


@pytest.mark.parametrize(("call", "changes", "error", "message"), CASES)
def test_bad_arguments_are_named(data, call, changes, error, message):
    assert_raises(error, message, call, data, **changes)


def test_those_who_are_said_to_have_an_argument_have_it():
    has = {place: {*inspect.signature(place).parameters} for place in (fit, sweep, TrainConfig, optax.adamw, optax.sgd)}
    both = (has[fit] & has[sweep]) | has[optax.adamw] | {*_checks.fields(FashionMLP)}
    owned = {"fit": has[fit], "sweep": has[sweep], "fit and sweep": both, "TrainConfig": has[TrainConfig]}
    owned |= {"optax.adamw": has[optax.adamw], "optax.sgd": has[optax.sgd], "FashionMLP": {*_checks.fields(FashionMLP)}}
    assert all({*names} <= owned[owner] for owner, names in _checks.OWNERS.items())


def test_other_kinds_of_the_same_are_accepted(data):
    numbers = {"learning_rate": 0.125, "dropout_rate": 0.5}
    expected = run(data, **numbers)
    for other in (
        data._replace(labels=data.labels.astype(np.uint8), images=np.asfortranarray(data.images)),
        Batch(*map(jnp.array, data)),
        tuple(data),
    ):
        equal(run(data, (other, other), **numbers), expected)
    kinds = {"learning_rate": Fraction(1, 8), "dropout_rate": jnp.float16(0.5), "epochs": np.int64(1)}
    equal(run(data, **kinds, callbacks=(print for _ in range(0))), expected)
    lanes = grid(data, seeds=np.arange(2), learning_rate=jnp.array([0.125, 0.25]), dropout_rate=[0, 1 / 2])
    assert lanes.axes == {"learning_rate": (0.125, 0.25), "dropout_rate": (0.0, 0.5), "seed": (0, 1)}


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 2), ("150000 100000", 1), ("50000 100000", 1), (None, 2)])
def test_cores_are_those_that_a_container_may_use(monkeypatch, tmp_path, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5}, raising=False)
    monkeypatch.setattr(devices, "CPU_QUOTA", tmp_path / "cpu.max")
    if quota:
        (tmp_path / "cpu.max").write_text(quota)
    chosen = mock.Mock()
    monkeypatch.setattr(jax.config, "update", chosen)
    devices.use_all_cores()
    chosen.assert_called_once_with("jax_num_cpu_devices", cores)


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there may be a GPU")
def test_a_platform_that_is_not_there_is_one_line(tmp_path):
    command = [sys.executable, "examples/compare_overfit.py", "--epochs", "1", "--output", str(tmp_path)]
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == "error: JAX finds no device for JAX_PLATFORMS=cuda; unset it"
    assert "Traceback" not in run.stderr
