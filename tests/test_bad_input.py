"""What callers get wrong: each mistake ends in an error that names the argument, or changes nothing."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import compare, distribution, harness, lanes, rounding
from fashion_jax import Batch, FashionMLP, History, Metrics, TrainConfig, data, evidence, fit, plot, report, train
from fashion_jax.checkpoint import Checkpoints
from fashion_jax.files import write_atomically
from fashion_jax.model import check_rate, standardise
from fashion_jax.predict import predict, predict_mc
from fashion_jax.sweep import sweep

pytestmark = pytest.mark.usefixtures("unchecked")
ROOT = Path(__file__).parents[1]
KEY = jax.random.key(0)
CONFIG = TrainConfig(hidden=(8,))
NAN = float("nan")


@pytest.fixture(scope="module")
def tiny(small) -> Batch:
    return Batch(*(leaf[:50] for leaf in small))


@pytest.fixture(scope="module")
def state():
    return train.init_state(KEY, config=CONFIG)


def assert_trees_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


# What takes a data set, as (batch) -> result. `train_step` and `train_epoch` look at types and shapes only.
def takers(state, batch):
    step = {"config": CONFIG, "dropout_rate": 0.2}
    return {
        "hold_out": lambda batch: data.hold_out(batch, 0.5, key=KEY),
        "subset": lambda batch: data.subset(batch, 1, key=KEY),
        "fit, train": lambda wrong: fit(wrong, batch, key=KEY, config=CONFIG, epochs=1),
        "fit, validation": lambda wrong: fit(batch, wrong, key=KEY, config=CONFIG, epochs=1),
        "sweep": lambda wrong: sweep(wrong, batch, seeds=[0], dropout_rates=[0.0], config=CONFIG, epochs=1),
        "evaluate": lambda batch: train.evaluate(state.params, batch, config=CONFIG),
        "eval_step": lambda batch: train.eval_step(state.params, batch, config=CONFIG),
        "train_eval_part": lambda batch: train.train_eval_part(batch, CONFIG),
        "train_step": lambda batch: train.train_step(state, batch, KEY, **step),
        "train_epoch": lambda batch: train.train_epoch(state, batch, KEY, **step),
        "train_and_evaluate_epoch": lambda wrong: train.train_and_evaluate_epoch(
            train.start_lane(state), wrong, batch, batch, KEY, **step
        ),
    }


TAKERS = list(takers(None, None))
TRACED = {"train_step", "train_epoch", "train_and_evaluate_epoch"}
BAD_BATCHES = {
    "scaled to [0, 1]": (
        lambda b: b._replace(images=(b.images / 255).astype(np.float32)),
        TypeError,
        r"images must be uint8 pixels from 0 to 255.*float32",
    ),
    "floats in [0, 255]": (
        lambda b: b._replace(images=b.images.astype(np.float32)),
        TypeError,
        r"images must be uint8 pixels from 0 to 255.*float32",
    ),
    "int images": (lambda b: b._replace(images=b.images.astype(np.int32)), TypeError, "images must be uint8 pixels"),
    "float labels": (lambda b: b._replace(labels=b.labels * 1.0), TypeError, "labels must be integers, got float"),
    "no batch axis": (lambda b: Batch(b.images[0], b.labels[0]), ValueError, r"images \[n, height, width\]"),
    "flat images": (lambda b: b._replace(images=b.images.reshape(50, -1)), ValueError, r"images \[n, height, width\]"),
    "one label less": (lambda b: b._replace(labels=b.labels[1:]), ValueError, r"got \(50, 28, 28\) and \(49,\)"),
    "one-hot labels": (
        lambda b: b._replace(labels=np.eye(10, dtype=np.int32)[b.labels]),
        ValueError,
        r"labels \[n\], got",
    ),
    "empty": (lambda b: Batch(b.images[:0], b.labels[:0]), ValueError, "must hold at least one example, got none"),
    "no Batch": (lambda b: b.images, TypeError, "must be a Batch of two arrays"),
    "a list": (lambda b: [b.images, b.labels], TypeError, "must be a Batch of two arrays, got list"),
    "a tuple": (tuple, TypeError, "must be a Batch of two arrays, got tuple"),
    "lists inside": (lambda b: Batch(b.images.tolist(), b.labels.tolist()), TypeError, "must be a Batch of two arrays"),
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("mistake", BAD_BATCHES)
def test_bad_data_is_refused(tiny, state, taker, mistake):
    spoil, error, message = BAD_BATCHES[mistake]
    with pytest.raises(error, match=message):
        takers(state, tiny)[taker](spoil(tiny))


@pytest.mark.parametrize("taker", [name for name in TAKERS if name not in TRACED])
@pytest.mark.parametrize("label", [-1, 10, 255])
def test_labels_out_of_range_are_refused(tiny, state, taker, label):
    labels = np.array(tiny.labels)
    labels[3] = label
    wrong = tiny._replace(labels=labels)
    # What takes no config does not know how many classes there are.
    any_class = taker in ("hold_out", "subset")
    if any_class and label > 0:
        assert takers(state, tiny)[taker](wrong) is not None
        return
    expected = "be at least 0" if any_class else r"lie in 0\.\.9"
    with pytest.raises(ValueError, match=rf"labels must {expected}, got {min(0, label)}\.\.{max(9, label)}"):
        takers(state, tiny)[taker](wrong)


@pytest.mark.parametrize("label", [-1, 10, 255])
def test_labels_out_of_range_make_a_compiled_step_s_loss_nan(tiny, state, label):
    labels = np.array(tiny.labels)
    labels[3] = label
    batch = tiny._replace(labels=labels)
    for taker in ("train_step", "train_epoch"):
        _, measured = takers(state, tiny)[taker](batch)
        assert np.isnan(jax.tree.leaves(measured)[0]).all()


@pytest.mark.parametrize("taker", [name for name in TAKERS if name not in ("hold_out", "subset", "train_eval_part")])
def test_images_of_another_size_are_refused(tiny, state, taker):
    wrong = tiny._replace(images=tiny.images[:, ::2, ::2])
    with pytest.raises(ValueError, match=r"images must have shape \[n, 28, 28\] for this config, got \[50, 14, 14\]"):
        takers(state, tiny)[taker](wrong)


@pytest.mark.parametrize(
    ("scale", "advice"),
    [
        (1 / 255, r"float32 from 0 to 1\. These look scaled"),
        (1, r"float32 from 0 to 255\. If these are unscaled pixels, convert them with \.astype\(np\.uint8\)"),
        (-1 / 255, r"float32 from -1 to .*0\. The model standardises pixels itself"),
    ],
)
def test_float_images_are_told_what_they_look_like(small, scale, advice):
    wrong = small._replace(images=small.images.astype(np.float32) * np.float32(scale))
    with pytest.raises(TypeError, match=advice):
        fit(wrong, small, key=KEY, epochs=1)


# Keys


def key_takers(state, batch):
    step = {"config": CONFIG, "dropout_rate": 0.2}
    return {
        "hold_out": lambda key: data.hold_out(batch, 0.5, key=key),
        "subset": lambda key: data.subset(batch, 5, key=key),
        "fit": lambda key: fit(batch, batch, key=key, config=CONFIG, epochs=1),
        "split_key": train.split_key,
        "init_state": train.init_state,
        "train_step": lambda key: train.train_step(state, batch, key, **step),
        "train_epoch": lambda key: train.train_epoch(state, batch, key, **step),
        "train_and_evaluate_epoch": lambda key: train.train_and_evaluate_epoch(
            train.start_lane(state), batch, batch, batch, key, **step
        ),
    }


@pytest.mark.parametrize("taker", key_takers(None, None))
@pytest.mark.parametrize("key", [jax.random.PRNGKey(0), 0, np.uint32(7), None, "seed", jax.random.split(KEY, 2)])
def test_what_is_not_one_typed_key_is_refused(tiny, state, taker, key):
    with pytest.raises(TypeError, match=r"key must be one typed key, from jax\.random\.key\(seed\); got"):
        key_takers(state, tiny)[taker](key)


# Rates


def rate_takers(state, batch):
    return {
        "check_rate": check_rate,
        "FashionMLP": lambda rate: FashionMLP(dropout_rate=rate),
        "fit": lambda rate: fit(batch, batch, key=KEY, config=CONFIG, dropout_rate=rate, epochs=1),
        "sweep": lambda rate: sweep(batch, batch, seeds=[0], dropout_rates=[rate], config=CONFIG, epochs=1),
        "train_step": lambda rate: train.train_step(state, batch, KEY, config=CONFIG, dropout_rate=rate),
        "train_epoch": lambda rate: train.train_epoch(state, batch, KEY, config=CONFIG, dropout_rate=rate),
        "train_and_evaluate_epoch": lambda rate: train.train_and_evaluate_epoch(
            train.start_lane(state), batch, batch, batch, KEY, config=CONFIG, dropout_rate=rate
        ),
    }


@pytest.mark.parametrize("taker", rate_takers(None, None))
@pytest.mark.parametrize("rate", [-0.2, 1.0, 1.5, NAN, float("inf"), 1 - 1e-12, np.float32(1), jnp.float32(-0.2)])
def test_rates_out_of_range_are_refused(tiny, state, taker, rate):
    with pytest.raises(ValueError, match=r"dropout_rates? must lie in \[0, 1\), got"):
        rate_takers(state, tiny)[taker](rate)


@pytest.mark.parametrize("taker", rate_takers(None, None))
@pytest.mark.parametrize("rate", ["0.2", b"0.2", None, True, np.False_, jnp.array(False), [0.1, 0.2]])
def test_rates_of_a_wrong_type_are_refused(tiny, state, taker, rate):
    with pytest.raises(TypeError, match=r"dropout_rates? must be one number"):
        rate_takers(state, tiny)[taker](rate)


# States and parameters


def params_takers(state, batch):
    step = {"config": CONFIG, "dropout_rate": 0.2}
    return {
        "evaluate": lambda params: train.evaluate(params, batch, config=CONFIG),
        "eval_step": lambda params: train.eval_step(params, batch, config=CONFIG),
        "train_step": lambda params: train.train_step(state._replace(params=params), batch, KEY, **step),
        "train_epoch": lambda params: train.train_epoch(state._replace(params=params), batch, KEY, **step),
    }


BAD_PARAMS = {
    "another network's": (lambda params: train.init_state(KEY).params, r"fc1\.bias must have shape \[8\], got \[256\]"),
    "one layer more": (lambda params: {**params, "fc3": params["fc2"]}, r"fc3\.kernel is not part of the network"),
    "one layer less": (lambda params: {"fc1": params["fc1"]}, r"fc2\.kernel is missing"),
    "a whole state": (lambda params: train.init_state(KEY, config=CONFIG), r"fc1\.kernel is missing"),
}


@pytest.mark.parametrize("taker", params_takers(None, None))
@pytest.mark.parametrize("mistake", BAD_PARAMS)
def test_parameters_that_do_not_fit_are_refused(tiny, state, taker, mistake):
    spoil, message = BAD_PARAMS[mistake]
    with pytest.raises(ValueError, match=f"params do not fit the config: .*{message}"):
        params_takers(state, tiny)[taker](spoil(state.params))


def test_what_is_no_state_is_refused(tiny, state):
    for take in (train.train_step, train.train_epoch):
        with pytest.raises(TypeError, match="state must be a TrainState, as init_state gives it, got dict"):
            take(state.params, tiny, KEY, config=CONFIG, dropout_rate=0.2)


def test_an_optimiser_s_state_of_another_config_is_refused(tiny, state):
    averaged = dataclasses.replace(CONFIG, average_decay=0.9)
    for take in (train.train_step, train.train_epoch):
        with pytest.raises(
            ValueError, match=r"state does not fit the config: state\.opt_state\[.*average.* is missing"
        ):
            take(state, tiny, KEY, config=averaged, dropout_rate=0.2)
        with pytest.raises(ValueError, match=r"state\.opt_state\[.*average.* is one too many"):
            take(train.init_state(KEY, config=averaged), tiny, KEY, config=CONFIG, dropout_rate=0.2)
    with pytest.raises(ValueError, match=r"state holds no averaged parameters, which config\.average_decay asks for"):
        train.evaluated_params(state, config=averaged)


def test_what_is_no_config_is_refused_where_images_are_classified(tiny, state):
    for call in (predict, partial(predict_mc, key=KEY, samples=2, dropout_rate=0.2)):
        with pytest.raises(TypeError, match=r"config must be a TrainConfig, got \{'hidden': 8\}"):
            call(state.params, tiny.images, config={"hidden": 8})


def test_an_epoch_does_not_start_within_one(tiny, state):
    """It would take that epoch's order and masks again."""
    step = {"config": TrainConfig(hidden=(8,), batch_size=20), "dropout_rate": 0.2}
    with pytest.raises(ValueError, match=r"state\.step must be a multiple of the 3 steps of an epoch, got 2"):
        train.train_epoch(state._replace(step=jnp.int32(2)), tiny, KEY, **step)
    after, _ = jax.jit(lambda state: train.train_epoch(state, Batch(*map(jnp.array, tiny)), KEY, **step))(state)
    assert train.train_epoch(after, tiny, KEY, **step)[0].step == 6


# Runs


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"epochs": -3}, ValueError, "epochs must be at least 1, got -3"),
        ({"epochs": 2.0}, TypeError, "epochs must be an int, got 2.0"),
        ({"epochs": True}, TypeError, "epochs must be an int, got True"),
        ({"config": {"batch_size": 64}}, TypeError, "config must be a TrainConfig, got {'batch_size': 64}"),
        ({"config": None}, TypeError, "config must be a TrainConfig"),
        ({"on_epoch": 3}, TypeError, "on_epoch must be callable, got 3"),
    ],
)
def test_fit_and_sweep_refuse_the_same_arguments(tiny, options, error, message):
    options = {"config": CONFIG, "epochs": 1} | options
    with pytest.raises(error, match=message):
        fit(tiny, tiny, key=KEY, **options)
    with pytest.raises(error, match=message):
        sweep(tiny, tiny, seeds=[0], dropout_rates=[0.0], **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seeds": []}, ValueError, r"seeds must name at least one, and none twice; got \[\]"),
        ({"seeds": [0, 0]}, ValueError, "seeds must name at least one, and none twice"),
        ({"seeds": [-1]}, ValueError, r"seeds must lie between 0 and 2\*\*32 - 1, got -1"),
        ({"seeds": [2**32]}, ValueError, "seeds must lie between"),
        ({"seeds": [10**30]}, ValueError, "seeds must lie between"),
        ({"seeds": [1.0]}, TypeError, "seeds must be ints, got 1.0"),
        ({"seeds": [True]}, TypeError, "seeds must be ints, got True"),
        ({"seeds": 3}, TypeError, "seeds must be a sequence of numbers, got 3"),
        ({"seeds": "012"}, TypeError, "seeds must be a sequence of numbers, got '012'"),
        ({"seeds": np.int64(3)}, TypeError, "seeds must be a sequence"),
        ({"seeds": [[0], [1]]}, TypeError, r"seeds must be ints, got \[0\]"),
        ({"dropout_rates": []}, ValueError, "dropout_rates must name at least one"),
        ({"dropout_rates": 0.2}, TypeError, "dropout_rates must be a sequence of numbers, got 0.2"),
        ({"dropout_rates": [0.2, 0.2]}, ValueError, r"dropout_rates must name at least one, and none twice"),
        ({"dropout_rates": [0.2, 0.2 + 1e-12]}, ValueError, r"none twice"),
        ({"train_sizes": []}, ValueError, "train_sizes must name at least one"),
        ({"train_sizes": 10}, TypeError, "train_sizes must be a sequence"),
        ({"train_sizes": [51]}, ValueError, r"train_sizes must lie between 1 and the 50 examples .*, got \[51\]"),
        ({"train_sizes": [0]}, ValueError, "train_sizes must be at least 1, got 0"),
        ({"train_sizes": [10.0]}, TypeError, "train_sizes must be an int, got 10.0"),
        ({"lanes_at_once": 0}, ValueError, "lanes_at_once must be at least 1, got 0"),
        ({"lanes_at_once": 1.5}, TypeError, "lanes_at_once must be an int, got 1.5"),
        ({"devices": []}, ValueError, "devices must name at least one"),
        ({"devices": jax.devices()[0]}, TypeError, "devices must be a sequence of devices, got"),
        ({"devices": "cpu"}, TypeError, "devices must be a sequence of devices, got 'cpu'"),
        ({"devices": [0]}, TypeError, r"devices must be some of jax\.devices\(\), got \[0\]"),
        ({"devices": jax.devices() * 2}, ValueError, "devices must name at least one, and none twice"),
    ],
)
def test_sweep_refuses_bad_arguments(tiny, options, error, message):
    options = {"seeds": [0], "dropout_rates": [0.0], "config": CONFIG, "epochs": 1} | options
    with pytest.raises(error, match=message):
        sweep(tiny, tiny, **options)


@pytest.mark.parametrize("rate", [0, 0.0, -0.0, -0.003, NAN, float("inf")])
def test_learning_rates_out_of_range_are_refused(rate):
    with pytest.raises(ValueError, match="learning_rate must be positive and finite, got"):
        TrainConfig(learning_rate=rate)


@pytest.mark.parametrize("field", ["batch_size", "eval_batch_size", "train_eval_size"])
@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("64", TypeError)])
def test_sizes_out_of_range_are_refused(field, value, error):
    with pytest.raises(error, match=f"{field} must be"):
        TrainConfig(**{field: value})


@pytest.mark.parametrize("size", [1, 7, 50, 10_000])
def test_any_batch_size_trains_on_every_example(tiny, size):
    config = TrainConfig(hidden=(8,), batch_size=size, eval_batch_size=size, train_eval_size=size)
    run = fit(tiny, tiny, key=KEY, config=config, epochs=1)
    assert int(run.state.step) == -(-50 // size)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.history))
    expected = train.eval_step(run.state.params, tiny, config=config).loss
    assert run.history.validation.loss[0] == pytest.approx(float(expected), rel=1e-5)


def test_numbers_of_other_kinds_are_kept_as_python_s(tiny, tmp_path):
    """So that a checkpoint, and a file with weights, can tell them."""
    fields = {"hidden": (np.int64(8),), "batch_size": np.int32(16), "learning_rate": Fraction(3, 1000), "max_norm": 2}
    config = TrainConfig(**fields)
    assert config == TrainConfig(hidden=(8,), batch_size=16, learning_rate=0.003, max_norm=2.0)
    assert json.loads(json.dumps(config.as_dict())) == config.as_dict()
    assert [type(value) for value in (config.hidden[0], config.batch_size, config.max_norm)] == [int, int, float]
    checkpoint = Checkpoints(tmp_path / "fit", every=np.int64(2), keep=np.int8(1))
    ends = []
    options = {"epochs": np.int64(1), "on_epoch": ends.append}
    fit(tiny, tiny, key=KEY, config=config, dropout_rate=Fraction(1, 5), **options, checkpoint=checkpoint)
    lanes = {
        "seeds": np.arange(1),
        "dropout_rates": np.zeros(1),
        "train_sizes": np.array([50]),
        "lanes_at_once": np.int8(1),
    }
    sweep(tiny, tiny, **lanes, config=config, **options, checkpoint=tmp_path / "sweep")
    assert [(type(end.epochs), type(end.train_size)) for end in ends] == [(int, int)] * 2
    params = train.init_state(KEY, config=CONFIG).params
    options = {"key": KEY, "dropout_rate": 0.2, "config": CONFIG}
    assert_trees_equal(*(predict_mc(params, tiny.images, samples=n, **options) for n in (3, np.int8(3))))


def test_a_label_of_eight_bits_that_names_no_class_gives_no_number():
    log_probs = jnp.log(jnp.full((3, 200), 1 / 200))
    loss = train.negative_log_likelihood(log_probs, np.array([-1, 100, 127], np.int8))
    assert np.isnan(loss).tolist() == [True, False, False]


def test_weights_that_are_no_array_are_refused(tiny, state, unchecked):
    with pytest.raises(TypeError, match=r"weights must be an array, got \["):
        train.train_step(state, tiny, KEY, config=CONFIG, dropout_rate=0.0, weights=[1.0] * 50)


def test_weights_of_another_length_are_refused(tiny, state):
    with pytest.raises(ValueError, match=r"weights must have shape \[50\], got \[49\]"):
        train.train_step(state, tiny, KEY, config=CONFIG, dropout_rate=0.0, weights=jnp.ones(49))


# What the caller does to its arrays


def aligned(array) -> np.ndarray:
    """Copy to an address that JAX could use as it is, without a copy of its own."""
    buffer = np.empty(array.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


@pytest.mark.parametrize(
    "run",
    [
        partial(fit, key=KEY),
        partial(sweep, seeds=[0, 1], dropout_rates=[0.0, 0.2]),
        partial(sweep, seeds=[0], dropout_rates=[0.2], train_sizes=[50]),
    ],
)
def test_arrays_that_the_caller_changes_do_not_change_the_run(tiny, run):
    options = {"config": CONFIG, "epochs": 3}
    expected = run(tiny, tiny, **options)
    batches = [Batch(*map(aligned, tiny)) for _ in range(2)]

    def spoil(_):
        for batch in batches:
            batch.images[:], batch.labels[:] = 0, 0

    assert_trees_equal(run(*batches, **options, on_epoch=spoil), expected)


def test_parts_are_copies(tiny):
    images = np.array(tiny.images)
    parts = [*data.hold_out(Batch(images, tiny.labels), 0.5, key=KEY)]
    parts.append(data.subset(Batch(images, tiny.labels), 50, key=KEY))
    before = [part.images.copy() for part in parts]
    images[:] = 0
    for part, kept in zip(parts, before, strict=True):
        np.testing.assert_array_equal(part.images, kept)


# 64-bit numbers


def test_a_run_with_64_bit_numbers_works():
    code = """
import jax, numpy as np
from fashion_jax import Batch, TrainConfig, data, fit
from fashion_jax.sweep import sweep
assert jax.config.jax_enable_x64
rng = np.random.default_rng(0)
batch = Batch(rng.integers(256, size=(50, 28, 28), dtype=np.uint8), rng.integers(10, size=50))
rest, held_out = data.hold_out(batch, 0.2, key=jax.random.key(0))
config = TrainConfig(hidden=(8,), batch_size=8)
close = sweep(rest, held_out, seeds=[0], dropout_rates=[0.2, 0.2 + 1e-12], epochs=1, config=config)
assert len(close.history.running_loss) == 2
one = fit(rest, held_out, key=jax.random.key(0), dropout_rate=0.2, epochs=2, config=config)
many = sweep(rest, held_out, seeds=[0], dropout_rates=[0.2], epochs=2, config=config)
assert {leaf.dtype for leaf in jax.tree.leaves(many.history)} == {np.dtype(np.float64)}
assert one.state.params["fc1"]["kernel"].dtype == np.float64
np.testing.assert_allclose(many.history.validation.loss[0, 0], one.history.validation.loss, rtol=1e-12)
with jax.enable_x64(False):
    narrow = fit(rest, held_out, key=jax.random.key(0), dropout_rate=0.2, epochs=2, config=config)
assert narrow.state.params["fc1"]["kernel"].dtype == np.float32
# The same weights, order and masks, so that only rounding differs.
np.testing.assert_allclose(one.history.running_loss, narrow.history.running_loss, rtol=1e-5)
"""
    environment = os.environ | {"JAX_ENABLE_X64": "1"}
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# The model


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int32, np.int8, np.bool_])
def test_the_model_takes_stored_pixels_only(dtype):
    wrong = jnp.zeros((2, 28, 28), dtype)
    for take in (standardise, lambda x: FashionMLP().init(KEY, x, deterministic=True)):
        with pytest.raises(TypeError, match=r"images must be uint8 pixels from 0 to 255, got .* do not scale them"):
            take(wrong)


# Files


@pytest.mark.parametrize("path", [3, None, [], 1.5])
def test_paths_of_a_wrong_type_are_refused(path):
    for read in (data.read_idx, report.read_curves, lambda path: write_atomically(path, "content")):
        with pytest.raises(TypeError, match="PathLike"):
            read(path)
    if path is not None:
        with pytest.raises(TypeError, match="data_dir must be a path, got"):
            data.load(path)


def test_missing_files_are_named(tmp_path):
    for read in (data.read_idx, report.read_curves):
        with pytest.raises(FileNotFoundError, match="missing"):
            read(tmp_path / "missing")
        with pytest.raises(IsADirectoryError, match=str(tmp_path)):
            read(tmp_path)


@pytest.mark.parametrize("source", [None, 3, "", "IDX", ["idx"]])
def test_unknown_sources_are_refused(source):
    with pytest.raises(ValueError, match="source must be one of auto, idx, tfds, download; got"):
        data.load(source=source)


@pytest.mark.parametrize("content", [3, None, ["a"], np.zeros(3)])
def test_what_is_not_text_is_not_written(tmp_path, content):
    with pytest.raises(TypeError, match="content must be bytes or str, got"):
        write_atomically(tmp_path / "file", content)
    assert not list(tmp_path.iterdir())


COLUMNS = "run,dropout_rate,epoch,running_train_loss,test_loss,test_accuracy\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "lacks the columns dropout_rate, epoch, run"),
        (COLUMNS.encode() + b"a,0.2,1,x,0.5,0.9\n", "line 2: running_train_loss must be a number, got 'x'"),
        (COLUMNS.encode() + b"a,0.2,1,0.5\n", "line 2: test_loss must be a number, got None"),
        (b"\xff\xfe\x00", "not a CSV file"),
        (COLUMNS.encode() + b"a,0.2,nan,0.5,0.5,0.9\n", "line 2: epoch must be finite, got 'nan'"),
        (COLUMNS.encode() + b"a,inf,1,0.5,0.5,0.9\n", "line 2: dropout_rate must be finite, got 'inf'"),
        *(
            (
                COLUMNS.encode() + b"".join(b"%s,0.2,%d,0.5,0.5,0.9\n" % row for row in rows),
                f"a run must have each epoch from 1 to 2 once; run {run} at dropout rate 0.2 has {epochs}$",
            )
            for rows, run, epochs in (
                ([(b"a", 2), (b"a", 1), (b"b", 2), (b"b", 3)], "b", "2, 3"),
                ([(b"a", 1), (b"a", 1)], "a", "1, 1"),
                ([(b"a", 10), (b"a", 20)], "a", "10, 20"),
                ([(b"a", 1), (b"b", 1), (b"b", 2)], "a", "1"),
            )
        ),
    ],
)
def test_damaged_curves_are_named(tmp_path, content, message):
    path = tmp_path / "curves.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        report.read_curves(path)
    assert str(path) in str(caught.value)


# Evidence, reports and figures


def history(*shape) -> History:
    curve = np.full(shape, 0.5)
    return History(curve, Metrics(curve, curve), Metrics(curve, curve))


GOOD = history(3, 4)
HISTORY_TAKERS = {
    "summarise": evidence.summarise,
    "judge, plain": lambda wrong: evidence.judge(wrong, GOOD),
    "judge, dropout": lambda wrong: evidence.judge(GOOD, wrong),
    "as_json": lambda wrong: report.as_json({"arm": wrong}, seeds=[0], config=CONFIG),
    "summaries": lambda wrong: report.summaries({"arm": wrong}),
    "table": lambda wrong: report.table({"arm": wrong}),
    "losses": lambda wrong: plot.losses({"arm": wrong}),
}


@pytest.mark.parametrize("taker", HISTORY_TAKERS)
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (None, TypeError, "must be a History, got NoneType"),
        (np.zeros((3, 4)), TypeError, "must be a History, got ndarray"),
        (GOOD._replace(train=0.5), TypeError, "must be a History"),
        (GOOD._replace(running_loss=np.array([["a"]])), TypeError, "must hold numbers, got <U1"),
        (GOOD._replace(running_loss=np.zeros((3, 5))), ValueError, r"of one shape, got \[\[3, 4\], \[3, 5\]\]"),
        (history(3, 0), ValueError, r"must have leaves .*epochs\], got \[3, 0\]"),
        (history(), ValueError, r"must have leaves .*epochs\], got \[\]"),
    ],
)
def test_what_is_no_history_is_refused(taker, wrong, error, message):
    with pytest.raises(error, match=message):
        HISTORY_TAKERS[taker](wrong)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_a_table_is_of_runs(shape):
    with pytest.raises(ValueError, match=r"arms\['arm'\] must have leaves \[runs, epochs\], got"):
        report.table({"arm": history(*shape)})
    assert report.summaries({"arm": history(*shape)})


def test_a_report_names_the_arm_whose_loss_is_not_finite():
    wrong = history(3, 4)
    wrong.validation.loss[1:, 3] = NAN
    for make in (report.table, report.summaries):
        with pytest.raises(ValueError, match=r"arms\['b'\]: .* not finite, in runs \[\[1\], \[2\]\]"):
            make({"a": GOOD, "b": wrong})


def test_reports_of_nothing_are_refused():
    for make in (report.table, report.summaries, partial(report.as_json, seeds=[], config=CONFIG)):
        with pytest.raises(ValueError, match="arms must hold at least one History, got none"):
            make({})
        with pytest.raises(TypeError, match="arms must map titles to Histories, got list"):
            make([GOOD])
    with pytest.raises(TypeError, match="config must be a TrainConfig"):
        report.as_json({"arm": GOOD}, seeds=[0], config=None)
    with pytest.raises(ValueError, match=r"values must have shape \[runs\]"):
        report.mean_and_sd([])
    with pytest.raises(ValueError, match="rows must be of one length"):
        report.markdown([])
    with pytest.raises(ValueError, match=r"rows must be of one length, .* got \[2, 1\]"):
        report.markdown([("a", "b"), ("1",)])


@pytest.mark.parametrize("compute", [evidence.interval, lambda values: evidence.paired(values, values)])
def test_values_that_are_no_numbers_are_refused(compute):
    for values in (["a"], None, [[1], [2, 3]]):
        with pytest.raises((TypeError, ValueError), match="must h"):
            compute(values)
    for values in ([], 0.5, np.zeros((2, 2))):
        with pytest.raises(ValueError, match=r"(values|first) must have shape \[seeds\]"):
            compute(values)


@pytest.mark.parametrize("compute", [evidence.best_epochs, evidence.late_rises])
def test_curves_of_other_axes_are_refused(compute):
    for loss in (np.zeros(3), np.zeros((2, 0)), np.zeros((0, 2)), np.zeros((1, 2, 3)), 0.5):
        with pytest.raises(ValueError, match=r"loss must have shape \[seeds, epochs\]"):
            compute(loss)
    with pytest.raises(TypeError, match="loss must hold numbers"):
        compute([["a"]])


IMAGE, PROBABILITIES = np.zeros((28, 28), np.uint8), np.full(2, 0.5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": IMAGE / 255}, TypeError, "image must be uint8 pixels from 0 to 255, got float64"),
        ({"image": IMAGE[0]}, ValueError, r"image must have shape \[height, width\], got \[28\]"),
        ({"probabilities": np.zeros((1, 2))}, ValueError, r"probabilities must have shape \[classes\]"),
        ({"probabilities": np.log(PROBABILITIES)}, ValueError, r"probabilities must lie in \[0, 1\], got -0.69"),
        ({"probabilities": np.array([NAN, 1])}, ValueError, r"probabilities must lie in \[0, 1\]"),
        ({"label": 2}, ValueError, r"label must lie in 0\.\.1, got 2"),
        ({"label": -1}, ValueError, r"label must lie in 0\.\.1, got -1"),
        ({"class_names": ["a"]}, ValueError, "class_names must name 2 classes, got 1"),
    ],
)
def test_classification_refuses_bad_arguments(change, error, message):
    arguments = {"image": IMAGE, "probabilities": PROBABILITIES, "class_names": ["a", "b"]} | change
    with pytest.raises(error, match=message):
        plot.classification(arguments.pop("image"), arguments.pop("probabilities"), **arguments)


@pytest.mark.parametrize(
    ("images", "columns", "error", "message"),
    [
        (np.zeros((3, 28, 28)), 3, TypeError, "images must be uint8 pixels"),
        (IMAGE, 3, ValueError, r"images must have shape \[n, height, width\]"),
        (IMAGE[None][:0], 3, ValueError, "n at least 1"),
        (IMAGE[None], 0, ValueError, "columns must be at least 1, got 0"),
    ],
)
def test_image_sheet_refuses_bad_arguments(images, columns, error, message):
    with pytest.raises(error, match=message):
        plot.image_sheet(images, columns=columns)


# Flags


# Found by looking, so that a new one is held to the same.
BENCHMARKS = [
    path.stem
    for path in sorted((ROOT / "benchmarks").glob("[!_]*.py"))
    if re.search(r"^class Flags:.*^    output: ", path.read_text(), re.MULTILINE | re.DOTALL)
]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_refuse_counts_and_places_out_of_range(name, tmp_path):
    benchmark = importlib.import_module(f"benchmarks.{name}")
    (tmp_path / "file").touch()
    harness.check(benchmark.Flags())
    for field in dataclasses.fields(benchmark.Flags):
        flag = f"--{field.name.replace('_', '-')}"
        if type(field.default) is int:
            for count in (-1, 0) if field.name != "seed" else (-1,):
                with pytest.raises(ValueError, match=f"{flag} must be at least ., got {count}"):
                    harness.check(benchmark.Flags(**{field.name: count}))
        if isinstance(field.default, tuple):
            for value in ((), field.default[:1] * 2):
                with pytest.raises(ValueError, match=f"{flag} must name at least one, and none twice"):
                    harness.check(benchmark.Flags(**{field.name: value}))
            if type(field.default[0]) is int:
                with pytest.raises(ValueError, match=f"{flag} must be at least 1, got 0"):
                    harness.check(benchmark.Flags(**{field.name: (2, 0)}))
        if field.name == "data_dir":
            with pytest.raises(NotADirectoryError, match="--data-dir is not a directory: /no/such"):
                harness.check(benchmark.Flags(data_dir=Path("/no/such")))
        if field.name == "output":
            with pytest.raises(FileExistsError, match="no files can be written into this directory"):
                harness.check(benchmark.Flags(output=tmp_path / "file"))


@pytest.mark.parametrize(
    ("benchmark", "flags", "message"),
    [
        (lanes, {"lanes": (2, 3)}, r"--lanes must be even: .* got \(2, 3\)"),
        (rounding, {"steps": 938}, "--steps must be at most 937"),
        (distribution, {"seeds": 1}, "--seeds must be at least 2, for an interval; got 1"),
    ],
)
def test_benchmarks_refuse_what_only_they_cannot_use(benchmark, flags, message):
    with pytest.raises(ValueError, match=message):
        benchmark.main(benchmark.Flags(**flags))


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_record_that_is_none_is_named(tmp_path, content):
    (tmp_path / "throughput.json").write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/throughput.json: not a benchmark's record"):
        compare.main(compare.Flags(tmp_path, tmp_path))


def run_module(*command) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )


def test_a_benchmark_ends_with_one_line():
    result = run_module("-m", "benchmarks.fuzz", "--cases", 0)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: --cases must be at least 1, got 0"
    assert "Traceback" not in result.stderr


NO_GPU = "error: --device gpu: no GPU for JAX and PyTorch; install builds for CUDA, or take --device cpu\n"


def test_a_benchmark_names_who_sees_no_gpu(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = run_module("-m", "benchmarks.lanes", "--device", "gpu")
    assert result.returncode == 1
    assert result.stderr == NO_GPU


def test_no_benchmark_of_the_gpu_s_measures_a_cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = run_module("-m", "benchmarks", "--device", "gpu", "--output", tmp_path)
    assert result.returncode == 1
    rest = "lanes, roofline, startup, predict, kernels (each by itself: python -m benchmarks.NAME --help)"
    assert result.stderr == f"throughput, 1 of 6\n{NO_GPU}throughput failed; not run: {rest}\n"
    assert not list(tmp_path.iterdir())


def test_who_cannot_compile_for_gpus_is_told_what_to_install(monkeypatch, tmp_path, call):
    if importlib.util.find_spec("jax_plugins"):
        pytest.skip("JAX can compile for GPUs here")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    result = run_module("-m", "benchmarks.kernels", "--output", tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: JAX cannot compile for a GPU here (")
    assert f"jax-cuda12-pjrt of version {jax.__version__}" in result.stderr
    result = call(ROOT / "benchmarks" / "kernels.py", "--target", tmp_path / "none", "--output", tmp_path)
    assert result.returncode == 1
    assert result.stderr == f"error: [Errno 2] No such file or directory: '{tmp_path}/none'\n"


@pytest.mark.parametrize(
    ("example", "flags", "message"),
    [
        ("compare_overfit.py", ("--rates", "-0.2"), "dropout_rates must lie in [0, 1), got -0.2"),
        ("compare_overfit.py", ("--rates",), "dropout_rates must name at least one"),
        ("compare_overfit.py", ("--holdout", "nan"), "fraction must lie in (0, 1)"),
        ("compare_overfit.py", ("--processes", "2"), "coordinator, processes and process belong together"),
        ("dropout_sweep.py", ("--rates", "0", "1.5"), "dropout_rates must lie in [0, 1), got 1.5"),
        ("dropout_sweep.py", ("--sizes", "60000"), "train_sizes must lie between 1 and the 50000 examples"),
        ("dropout_sweep.py", ("--seeds", "0"), "--seeds must be at least 1, got 0"),
        ("dropout_sweep.py", ("--data-dir", "/no/such"), "data_dir does not exist: /no/such"),
    ],
)
def test_the_examples_refuse_bad_flags(tmp_path, call, example, flags, message):
    result = call(ROOT / "examples" / example, *flags, "--output", tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert message in result.stderr.splitlines()[-1]
    assert "epoch 1" not in result.stderr
    assert not list(tmp_path.iterdir())
