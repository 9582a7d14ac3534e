"""What is saved comes back as it was, or not at all."""

import collections
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from benchmarks.kill_resume import half_written, kill_and_resume
from fashion_jax import Batch, FashionMLP, TrainConfig, fit, train
from fashion_jax.checkpoint import Checkpoints, DamagedError, Store, content_digest, restore
from fashion_jax.evidence import summarise
from fashion_jax.signals import noting_signals
from fashion_jax.sweep import sweep
from fashion_jax.train import NonFiniteLossError, init_state

ROOT = Path(__file__).parents[1]
KEY = jax.random.key(1)
TREE = {"weights": np.arange(300, dtype=np.float32).reshape(3, 100), "step": np.int32(7), "loss": (np.array([0.5]),)}


def save(directory, *steps, losses=None, identity=None, keep=3):
    with Store(Checkpoints(directory, keep=keep), identity=identity or {}) as store:
        store.restore(TREE)
        for i, step in enumerate(steps):
            tree = {**TREE, "step": np.int32(step)}
            store.save(step, tree, loss=losses[i] if losses else 1.0 / step)


def stop_after(*epochs):
    def stop(end):
        if end.epoch in epochs:
            raise KeyboardInterrupt

    return stop


def everything(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


arrays = st.builds(
    lambda dtype, shape, seed: np.random.default_rng(seed).integers(0, 256, (*shape, 8), np.uint8).view(dtype),
    st.sampled_from(["<f4", "<f8", "<i4", "<u4", "<i8", "u1", "<f2", jnp.bfloat16]),
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(0, 2**32),
)


@settings(max_examples=25, derandomize=True, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.dictionaries(st.text("abcäß/. _", min_size=1, max_size=5), arrays | st.tuples(arrays, arrays), min_size=1))
def test_any_tree_comes_back_bit_by_bit(tree):
    """NaNs of every kind among the numbers."""
    with tempfile.TemporaryDirectory() as place:
        with Store(Checkpoints(Path(place) / "run"), identity={"seed": 3}) as store:
            store.save(1, tree, loss=np.inf)
        found = restore(Path(place) / "run", tree)
    assert content_digest(found.tree) == content_digest(tree)
    for leaf, expected in zip(jax.tree.leaves(found.tree), jax.tree.leaves(tree), strict=True):
        assert (leaf.dtype, leaf.shape, leaf.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
    assert found.identity == {"seed": 3}


# A run that goes on.


@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_ends_with_the_same_bytes(small, tmp_path, every):
    options = {"key": KEY, "dropout_rate": 0.2, "epochs": 5}
    whole = fit(small, small, **options)
    checkpoint = Checkpoints(tmp_path / "räum lich", every=every)
    lengths, run = [], None
    while not lengths or lengths[-1] < 5:
        run = fit(small, small, **options, checkpoint=checkpoint, on_epoch=stop_after(1, 2, 4))
        lengths.append(len(run.history.running_loss))
    assert lengths == [1, 2, 4, 5]
    assert content_digest(run) == content_digest(whole)


def test_a_finished_run_comes_back_without_training(small, tmp_path):
    options = {"key": KEY, "epochs": 2, "checkpoint": tmp_path}
    run = fit(small, small, **options)
    trained = []
    again = fit(small, small, **options, on_epoch=trained.append)
    assert not trained
    assert content_digest(again) == content_digest(run)
    longer = fit(small, small, **options | {"epochs": 3})
    assert content_digest(longer) == content_digest(fit(small, small, key=KEY, epochs=3))
    with pytest.raises(ValueError, match=r"epochs is 2, and .* holds epoch 3 of this run"):
        fit(small, small, **options)


def test_a_resumed_sweep_ends_with_the_same_bytes(small, tmp_path, caplog):
    options = {"seeds": [0, 5], "dropout_rates": [0.0, 0.5, 0.2], "config": TrainConfig(hidden=(16,)), "epochs": 3}
    whole = sweep(small, small, **options)
    sweep(small, small, **options, checkpoint=tmp_path / "a", on_epoch=stop_after(2))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    run = sweep(small, small, **options, checkpoint=tmp_path / "a")
    assert content_digest(run) == content_digest(whole)

    with caplog.at_level(logging.INFO, logger="fashion_jax"):
        other = sweep(small, small, **options, checkpoint=tmp_path / "b", lanes_at_once=2)
    assert "lanes_at_once was 1 and is 2: going on within rounding, not bit by bit" in caplog.messages
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), other.history, whole.history)


def test_each_size_has_a_directory(small, tmp_path):
    options = {"seeds": [0], "dropout_rates": [0.2], "config": TrainConfig(hidden=(8,)), "epochs": 2}
    options |= {"train_sizes": [100, 300]}
    whole = sweep(small, small, **options)
    run = sweep(small, small, **options, checkpoint=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["100-images", "300-images"]
    shutil.rmtree(tmp_path / "300-images" / "2")
    again = sweep(small, small, **options, checkpoint=tmp_path)
    assert content_digest(again) == content_digest(run) == content_digest(whole)


def test_the_best_parameters_survive(small, tmp_path):
    """They are of the epoch before the interruption, and kept for early stopping."""
    # So few images that the network overfits before the last epoch.
    data = [jax.tree.map(lambda leaf, rows=rows: leaf[rows], small) for rows in (slice(100), slice(100, None))]
    options = {"key": KEY, "epochs": 8, "config": TrainConfig(learning_rate=0.005, batch_size=16, hidden=(128,))}
    whole = fit(*data, **options)
    best = int(whole.history.validation.loss.argmin()) + 1
    assert 1 < best < 8
    assert float(whole.best.loss) == whole.history.validation.loss.min()
    fit(*data, **options, checkpoint=tmp_path, on_epoch=stop_after(best))
    run = fit(*data, **options, checkpoint=tmp_path)
    assert content_digest(run.best) == content_digest(whole.best)
    upto = fit(*data, **options | {"epochs": best})
    assert content_digest(upto.state.params) == content_digest(whole.best.params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": TrainConfig(learning_rate=0.01)}, "config.learning_rate is 0.003 there and 0.01 here"),
        ({"key": jax.random.key(2)}, r"key is \['threefry2x32', 0, 1\] there and \['threefry2x32', 0, 2\] here"),
        ({"config": TrainConfig(hidden=(32,))}, r"config.hidden is \[256, 128, 64\] there and \[32\] here"),
        ({"dropout_rate": 0.5}, "dropout_rate is 0.0 there and 0.5 here"),
        ({"start": init_state(KEY)}, "start is None there and "),
    ],
)
def test_another_run_is_refused(small, tmp_path, change, message):
    fit(small, small, key=KEY, epochs=1, checkpoint=tmp_path)
    before = everything(tmp_path)
    with pytest.raises(ValueError, match=f"holds the checkpoints of another run: .*{message}"):
        fit(small, small, **{"key": KEY, "epochs": 2, "checkpoint": tmp_path} | change)
    assert everything(tmp_path) == before


def test_other_data_and_other_programs_are_refused(small, splits, tmp_path):
    fit(small, small, key=KEY, epochs=1, checkpoint=tmp_path)
    labels = small.labels.copy()
    labels[17] = (labels[17] + 1) % 10
    with pytest.raises(ValueError, match=r"data\.train is '?\w{64}'? there and '?\w{64}'? here"):
        fit(small._replace(labels=labels), small, key=KEY, epochs=1, checkpoint=tmp_path)
    other = splits.test._replace(images=splits.test.images[:500], labels=splits.test.labels[:500])
    with pytest.raises(ValueError, match=r"data\.validation is '?\w{64}'? there and '?\w{64}'? here"):
        fit(small, other, key=KEY, epochs=1, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="program is fit there and sweep here"):
        sweep(small, small, seeds=[1], dropout_rates=[0.0], epochs=1, checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("jax_default_prng_impl", "rbg", "generator is threefry2x32 there and rbg here"),
        ("jax_threefry_partitionable", False, "jax_threefry_partitionable is True there and False here"),
    ],
)
def test_a_sweep_whose_seeds_mean_other_draws_is_refused(small, tmp_path, name, value, message):
    options = {"seeds": [0], "dropout_rates": [0.2], "config": TrainConfig(hidden=(8,)), "checkpoint": tmp_path}
    sweep(small, small, **options, epochs=1)
    before = getattr(jax.config, name)
    try:
        jax.config.update(name, value)
        with pytest.raises(ValueError, match=message):
            sweep(small, small, **options, epochs=2)
    finally:
        jax.config.update(name, before)


def test_another_matmul_precision_is_told(small, tmp_path, caplog):
    options = {"key": KEY, "config": TrainConfig(hidden=(8,)), "checkpoint": tmp_path}
    fit(small, small, **options, epochs=1)
    with jax.default_matmul_precision("highest"), caplog.at_level(logging.INFO, logger="fashion_jax"):
        fit(small, small, **options, epochs=2)
    told = "jax_default_matmul_precision was None and is highest: going on within rounding, not bit by bit"
    assert told in caplog.messages


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [1, 3]}, r"seeds is \[1, 2\] there and \[1, 3\] here"),
        ({"dropout_rates": [0.5]}, r"dropout_rates is \[0\.2\] there and \[0\.5\] here"),
    ],
)
def test_another_sweep_is_refused(small, tmp_path, change, message):
    options = {"seeds": [1, 2], "dropout_rates": [0.2], "config": TrainConfig(hidden=(8,)), "checkpoint": tmp_path}
    sweep(small, small, **options, epochs=1)
    with pytest.raises(ValueError, match=f"holds the checkpoints of another run: {message}"):
        sweep(small, small, **options | change, epochs=2)


def test_the_epoch_of_the_lowest_validation_loss_is_kept(small, tmp_path):
    """The training loss goes on falling."""
    data = [jax.tree.map(lambda leaf, rows=rows: leaf[rows], small) for rows in (slice(100), slice(100, None))]
    config = TrainConfig(learning_rate=0.01, batch_size=16, hidden=(128,))
    run = fit(*data, key=KEY, config=config, epochs=10, checkpoint=Checkpoints(tmp_path, keep=1))
    best = int(run.history.validation.loss.argmin()) + 1
    assert best < 9
    assert run.history.train.loss.argmin() > best
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.is_dir()) == [best, 9, 10]


# Processes that end.


def test_killed_at_random_moments(tmp_path):
    row = kill_and_resume("fit", tmp_path, kills=3, seed=3)
    assert row["kills"] == 3
    assert row["runs that differ"] == 0


def test_what_an_earlier_kill_left_is_not_counted_again(tmp_path):
    place = tmp_path / "2.orbax-checkpoint-tmp"
    assert not half_written(tmp_path)
    place.mkdir()
    left = half_written(tmp_path)
    assert left
    assert not half_written(tmp_path) - left
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    place.rmdir()
    place.mkdir()
    (place / "file").touch()
    assert len(half_written(tmp_path) - left) == 2


def run_example(*flags, **options) -> subprocess.Popen:
    # A shell lets what it starts in the background ignore SIGINT, and children inherit that; so it is set here.
    code = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = [sys.executable, "-c", code, "examples/compare_overfit.py", *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def after_epoch(process: subprocess.Popen, epoch: int) -> None:
    for line in process.stderr:
        if line.startswith(f"epoch {epoch}/"):
            return
    raise AssertionError(process.communicate())


def test_the_same_command_gives_the_same_report(tmp_path):
    flags = ("--seeds", 2, "--epochs", 12, "--train-size", 1000, "--holdout", 0.2, "--checkpoint", tmp_path / "saved")
    for number, status, line, epoch in (
        (signal.SIGINT, 130, "run the command again to go on", 2),
        (signal.SIGTERM, -signal.SIGTERM, "stopped by SIGTERM after epoch", 8),
    ):
        process = run_example(*flags, "--output", tmp_path / "resumed")
        after_epoch(process, epoch)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == status, errors
        assert line in errors

    resumed = run_example(*flags, "--output", tmp_path / "resumed")
    out, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    assert "going on after epoch" in errors
    whole = run_example(*flags[:-2], "--output", tmp_path / "whole")
    expected, _ = whole.communicate(timeout=300)
    report = [(tmp_path / name / "report.md").read_text() for name in ("resumed", "whole")]
    assert report[0] == report[1]
    assert out.replace("resumed", "whole") == expected


@pytest.mark.usefixtures("compiled_apart")
def test_a_second_ctrl_c_ends_at_once(tmp_path):
    """During the first epoch of 128 networks, which takes more than a minute."""
    process = run_example("--seeds", 64, "--output", tmp_path)
    for line in process.stderr:
        if line.startswith("Fashion-MNIST from"):
            break
    time.sleep(8)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "stopped at once; results are missing or incomplete" in errors


def run_code(code: str, *arguments) -> subprocess.CompletedProcess:
    prelude = """
import resource, sys, time, jax, numpy as np
from fashion_jax import Batch, fit
data = Batch(np.zeros((64, 28, 28), np.uint8), np.arange(64, dtype=np.int32) % 10)
key = jax.random.key(0)
"""
    command = [sys.executable, "-W", "error", "-c", prelude + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
def test_an_epoch_whose_report_failed_is_reported_again_and_none_before(small, tmp_path, error):
    def fail(end):
        if end.epoch == 3:
            raise error

    options = {"key": KEY, "config": TrainConfig(hidden=(8,)), "epochs": 4}
    saved = Checkpoints(tmp_path, every=5)
    with pytest.raises(error):
        fit(small, small, **options, checkpoint=saved, on_epoch=fail)
    ends = []
    resumed = fit(small, small, **options, checkpoint=saved, on_epoch=ends.append)
    assert [end.epoch for end in ends] == [3, 4]
    assert content_digest(resumed) == content_digest(fit(small, small, **options))


def test_a_program_that_fails_leaves_the_epochs_before(small, tmp_path, monkeypatch):
    """As on a device that is lost."""
    taken, lanes = train.train_and_evaluate_epoch, []

    def fail_in_the_fourth(lane, *data, **options):
        lanes.append(lane)
        if len(lanes) == 4:
            raise jax.errors.JaxRuntimeError("INTERNAL: device lost")
        return taken(lane, *data, **options)

    options = {"key": KEY, "config": TrainConfig(hidden=(8,)), "epochs": 5}
    saved = Checkpoints(tmp_path, every=10)
    monkeypatch.setattr(train, "train_and_evaluate_epoch", fail_in_the_fourth)
    with pytest.raises(jax.errors.JaxRuntimeError, match="device lost"):
        fit(small, small, **options, checkpoint=saved)
    monkeypatch.undo()
    ends = []
    resumed = fit(small, small, **options, checkpoint=saved, on_epoch=ends.append)
    assert [end.epoch for end in ends] == [4, 5]
    assert content_digest(resumed) == content_digest(fit(small, small, **options))


@pytest.mark.parametrize("error", ["ZeroDivisionError('mine')", "SystemExit(3)"])
def test_a_sigterm_ends_the_process_whatever_ends_the_block(error):
    code = f"""
import signal, sys
from fashion_jax.signals import noting_signals
try:
    with noting_signals(terminate=True), noting_signals(terminate=True):
        signal.raise_signal(signal.SIGTERM)
        raise {error}
finally:
    print("alive")
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "")
    assert result.stderr.startswith("an error ended the run after a SIGTERM, which ends the process now\nTraceback")
    assert result.stderr.splitlines()[-1].startswith(error.partition("(")[0])


def test_no_sigterm_no_log(caplog):
    with pytest.raises(ZeroDivisionError), noting_signals(terminate=True):
        raise ZeroDivisionError
    assert not caplog.text


@pytest.mark.usefixtures("compiled_apart")
def test_a_sigterm_before_an_error_leaves_the_epochs_before(tmp_path):
    """Whole, though they are saved in the background."""
    code = """
import signal
def report(end):
    if end.epoch == 2:
        signal.raise_signal(signal.SIGTERM)
        raise ZeroDivisionError("mine")
fit(data, data, key=key, epochs=3, checkpoint=sys.argv[1], on_epoch=report)
"""
    result = run_code(code, tmp_path)
    assert result.returncode == -signal.SIGTERM
    assert "ZeroDivisionError: mine" in result.stderr
    assert (tmp_path / "1" / "seal.json").exists()


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_during_a_report_ends_at_once(small):
    """The first is noted, the second interrupts the report."""

    def interrupt(end):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(small, small, key=KEY, config=TrainConfig(hidden=(8,)), epochs=3, on_epoch=interrupt)


def test_two_runs_in_one_directory(small, tmp_path):
    with Store(Checkpoints(tmp_path), identity={}):
        with pytest.raises(BlockingIOError, match="another run is saving its checkpoints here"):
            fit(small, small, key=KEY, epochs=1, checkpoint=tmp_path)
        other = run_code("fit(data, data, key=key, epochs=1, checkpoint=sys.argv[1])", tmp_path)
        assert "BlockingIOError" in other.stderr
    fit(small, small, key=KEY, epochs=1, checkpoint=tmp_path)


@pytest.mark.usefixtures("compiled_apart")
def test_a_full_disk(tmp_path):
    """A limit on the size of files stands for it."""
    code = """
def fill(end):
    if end.epoch == 3:
        time.sleep(2)  # The second checkpoint is complete, the third meets the limit.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
fit(data, data, key=key, epochs=4, checkpoint=sys.argv[1], on_epoch=fill)
"""
    full = run_code(code, tmp_path)
    assert full.returncode == 1
    assert f"OSError: cannot save step 3 to {tmp_path}" in full.stderr
    assert "the checkpoint of step 2 is intact" in full.stderr
    again = run_code(
        "print(len(fit(data, data, key=key, epochs=4, checkpoint=sys.argv[1]).history.train.loss))", tmp_path
    )
    assert again.stdout == "4\n", again.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3", "4", "fashion_jax.lock"]


def test_an_error_without_a_message_is_explained(tmp_path, monkeypatch):
    def fail(*arguments):
        raise MemoryError

    with Store(Checkpoints(tmp_path), identity={}) as store:
        monkeypatch.setattr(store, "_open", fail)
        with pytest.raises(
            OSError, match=rf"cannot save step 1 to {tmp_path}: MemoryError\(\); there is none before it"
        ):
            store.save(1, TREE, loss=0.5)


def test_steps_go_up(tmp_path):
    """orbax keeps nothing of a step that does not."""
    with Store(tmp_path, identity={}) as store:
        store.save(2, TREE, loss=0.5)
        for step in (2, 1):
            with pytest.raises(
                ValueError, match=f"step must be higher than that of the last checkpoint, 2, got {step}"
            ):
                store.save(step, TREE, loss=0.5)
    before = everything(tmp_path)
    with (
        pytest.raises(
            OSError, match=r"cannot save step 1 .*: orbax saved nothing.*; the checkpoint of step 2 is intact"
        ),
        Store(tmp_path, identity={}) as store,
    ):
        store.save(1, TREE, loss=0.5)
    assert everything(tmp_path) == before
    assert restore(tmp_path, TREE).step == 2


def test_a_file_system_without_locks_lets_everybody_in(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    save(tmp_path, 1)
    assert restore(tmp_path, TREE).step == 1


# Arrays that are not those of this run, or no plain arrays.


def test_an_optimiser_with_other_types_goes_on(small, tmp_path):
    """NumPy has no bfloat16 of its own."""
    config = TrainConfig(hidden=(8,), optimiser=functools.partial(optax.adam, mu_dtype=jnp.bfloat16))
    options = {"key": KEY, "config": config, "epochs": 3}
    whole = fit(small, small, **options)
    fit(small, small, **options, checkpoint=tmp_path, on_epoch=stop_after(1))
    assert content_digest(fit(small, small, **options, checkpoint=tmp_path)) == content_digest(whole)
    halves = fit(small, small, **options | {"epochs": 1})
    fit(small, small, **options | {"epochs": 1}, start=halves.state)


@pytest.mark.parametrize("program", ["fit", "sweep"])
def test_a_typed_key_is_refused_before_training(small, tmp_path, program):
    config = TrainConfig(hidden=(8,), optimiser=lambda rate: optax.noisy_sgd(rate, key=jax.random.key(3)))
    run = {
        "fit": functools.partial(fit, key=KEY),
        "sweep": functools.partial(sweep, seeds=[0], dropout_rates=[0.0]),
    }[program]
    ends = []
    with pytest.raises(TypeError, match=r"opt_state.* is a typed key, and checkpoints hold plain arrays"):
        run(small, small, config=config, epochs=1, checkpoint=tmp_path, on_epoch=ends.append)
    assert not ends


@pytest.mark.parametrize("program", ["fit", "sweep"])
def test_a_function_that_makes_another_network_is_noticed(small, tmp_path, program):
    """Checkpoints know functions by their names."""

    def run(width, **options):
        config = TrainConfig(model=lambda dropout_rate: FashionMLP((width,), dropout_rate))
        if program == "fit":
            fit(small, small, key=KEY, config=config, epochs=2, checkpoint=tmp_path, **options)
        else:
            sweep(small, small, seeds=[0, 1], dropout_rates=[0.0], config=config, epochs=2, checkpoint=tmp_path)

    run(8)
    axes = "" if program == "fit" else "1, 2, "
    with pytest.raises(ValueError, match=rf"bias is float32\[{axes}8\] there and float32\[{axes}16\] here"):
        run(16)


# What `run_code` trains on.
BLANK = Batch(np.zeros((64, 28, 28), np.uint8), np.arange(64, dtype=np.int32) % 10)
SAME = {"train": BLANK, "validation": BLANK, "key": jax.random.key(0)}
WIDE = """
jax.config.update("jax_enable_x64", True)
fit(data, data, key=key, epochs=int(sys.argv[2]), checkpoint=sys.argv[1])
"""


def assert_precision_is_told(message: str) -> None:
    for part in ("another run: state.", "float64", "jax_enable_x64"):
        assert part in message


def test_another_precision_is_refused(tmp_path):
    fit(**SAME, epochs=1, checkpoint=tmp_path)
    assert_precision_is_told(run_code(WIDE, tmp_path, 2).stderr)


def test_less_precision_is_refused(tmp_path):
    assert run_code(WIDE, tmp_path, 1).returncode == 0
    with pytest.raises(ValueError, match="another run") as caught:
        fit(**SAME, epochs=2, checkpoint=tmp_path)
    assert_precision_is_told(str(caught.value))


def test_names_that_would_be_alike_are_refused():
    with pytest.raises(ValueError, match=r"two arrays would both be called 'a\.0'"):
        content_digest({"a": (np.ones(1),), "a.0": np.ones(1)})


def test_arrays_of_other_names_are_refused(tmp_path):
    save(tmp_path, 1)
    like = {"kernel" if name == "weights" else name: leaf for name, leaf in TREE.items()}
    with pytest.raises(ValueError, match="1 holds other arrays than this run has: kernel, weights") as caught:
        restore(tmp_path, like)
    assert not isinstance(caught.value, DamagedError)


def test_the_digest_is_of_names_and_shapes_too():
    array = np.arange(6.0)
    trees = ({"a": array}, {"b": array}, {"a": array.reshape(2, 3)}, {"a": array.reshape(3, 2)})
    assert len({content_digest(tree) for tree in trees}) == len(trees)


# Files that are damaged.


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "bit flip": flip,
    "truncation": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damaged_file_is_named_and_the_step_before_is_used(tmp_path, damage):
    save(tmp_path / "good", 4, 5)
    files = sorted(
        path.relative_to(tmp_path / "good") for path in (tmp_path / "good" / "5").rglob("*") if path.is_file()
    )
    assert len(files) > 8
    for file in files:
        directory = tmp_path / damage / file.as_posix().replace("/", "_")
        shutil.copytree(tmp_path / "good", directory)
        DAMAGES[damage](directory / file)
        with pytest.warns(UserWarning, match=f"{file.name}.*; the checkpoint before it is used"):
            found = restore(directory, TREE)
        assert (found.step, int(found.tree["step"])) == (4, 4)


def test_sound_files_with_other_arrays_are_noticed(tmp_path):
    """As if orbax had read something else than it wrote."""
    save(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "2" / "default")
    shutil.copytree(tmp_path / "1" / "default", tmp_path / "2" / "default")
    seal = json.loads((tmp_path / "2" / "seal.json").read_text())
    del seal["seal"]
    files = [path for path in (tmp_path / "2").rglob("*") if path.is_file() and path.name != "seal.json"]
    seal["files"] = {
        path.relative_to(tmp_path / "2").as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
    seal["seal"] = hashlib.sha256(json.dumps(seal, sort_keys=True).encode()).hexdigest()
    (tmp_path / "2" / "seal.json").write_text(json.dumps(seal))
    with pytest.warns(UserWarning, match=r"2 is damaged: the SHA-256 of its arrays does not match"):
        assert restore(tmp_path, TREE).step == 1


def test_a_relative_path_is_read(tmp_path, monkeypatch):
    save(tmp_path / "here", 1)
    monkeypatch.chdir(tmp_path)
    found = restore("here", TREE)
    assert found is not None
    assert found.tree["step"] == 1


def test_when_all_are_damaged_nothing_is_made_up(tmp_path):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        flip(next((tmp_path / str(step) / "default" / "ocdbt.process_0" / "d").iterdir()))
    before = everything(tmp_path)
    with pytest.warns(UserWarning, match="SHA-256"), pytest.raises(DamagedError, match="remove the directory"):
        restore(tmp_path, TREE)
    with (
        pytest.warns(UserWarning, match="SHA-256"),
        pytest.raises(DamagedError, match="no checkpoint in"),
        Store(Checkpoints(tmp_path), identity={}) as store,
    ):
        store.restore(TREE)
    assert everything(tmp_path) == before


def test_a_damaged_checkpoint_is_made_again(small, tmp_path):
    options = {"key": KEY, "epochs": 3, "checkpoint": tmp_path}
    run = fit(small, small, **options)
    flip(tmp_path / "3" / "seal.json")
    with pytest.warns(UserWarning, match=r"3/seal\.json is damaged"):
        again = fit(small, small, **options)
    assert content_digest(again) == content_digest(run)
    assert restore(tmp_path, again).step == 3


def test_swapped_checkpoints_are_noticed(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "2").rename(tmp_path / "3")
    with pytest.warns(UserWarning, match="is the checkpoint of step 2"):
        assert restore(tmp_path, TREE).step == 1


def test_a_checkpoint_of_another_format_is_refused_and_stays(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "1" / "seal.json"
    seal = json.loads(path.read_text()) | {"format": 2}
    del seal["seal"]
    seal["seal"] = hashlib.sha256(json.dumps(seal, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(seal))
    before = everything(tmp_path)
    with pytest.raises(ValueError, match="1 has format 2, and this version reads 1"):
        save(tmp_path, 2)
    assert everything(tmp_path) == before


def test_what_was_cut_off_while_it_was_removed_is_cleared_away(tmp_path):
    save(tmp_path, 1, 2)
    next((tmp_path / "1" / "default" / "ocdbt.process_0" / "d").iterdir()).unlink()
    save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["2", "3"]


def test_the_newest_and_the_best_are_kept(tmp_path):
    save(tmp_path, *range(1, 9), losses=[5.0, 1.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], keep=2)
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.is_dir()) == [2, 6, 7, 8]
    save(tmp_path, 9, 10, losses=[9.0, 10.0], keep=2)
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.is_dir()) == [2, 8, 9, 10]


@pytest.mark.parametrize("name", ["file", "other"])
def test_only_a_directory_of_checkpoints_is_touched(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other" / "7").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, NotADirectoryError), match="directory"):
        Store(Checkpoints(tmp_path / name), identity={})
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("directory", [5, ["runs"]])
def test_what_is_no_directory_is_refused(small, directory, unchecked):
    with pytest.raises(TypeError, match=r"checkpoint must be a directory or Checkpoints, got"):
        fit(small, small, key=KEY, epochs=1, checkpoint=directory)
    with pytest.raises(TypeError, match=r"checkpoint must be a directory or Checkpoints, got"):
        sweep(small, small, seeds=[0], dropout_rates=[0.0], train_sizes=[100], epochs=1, checkpoint=directory)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda state: state.params, TypeError, "start must be a TrainState, as init_state gives it, got dict"),
        (
            lambda state: state._replace(params={"fc1": state.params["fc1"]}),
            ValueError,
            r"start does not fit the config: start\.params\['fc2'\]\['bias'\] is missing",
        ),
        (
            lambda state: state._replace(params=collections.OrderedDict(state.params)),
            ValueError,
            "its containers must be those of init_state, such as plain dicts",
        ),
        (
            lambda state: state._replace(step=state.step + 1),
            ValueError,
            "start.step must be a multiple of the 16 steps",
        ),
        (
            lambda state: init_state(KEY, config=TrainConfig(hidden=(3, 128, 64))),
            ValueError,
            r"start\.params\['fc1'\]\['bias'\] must be float32\[256\] for this config, got float32\[3\]",
        ),
    ],
)
def test_a_start_that_does_not_fit_is_refused(small, spoil, error, message, unchecked):
    with pytest.raises(error, match=message):
        fit(small, small, key=KEY, epochs=1, start=spoil(init_state(KEY)))


def test_a_directory_that_cannot_be_made(tmp_path, small):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="no files can be written into this directory"):
        fit(small, small, key=KEY, epochs=1, checkpoint=tmp_path / "file" / "deeper")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, r"checkpoint\.every must be at least 1, got 0"),
        ({"keep": 0}, ValueError, r"checkpoint\.keep must be at least 1"),
        ({"every": 1.5}, TypeError, r"checkpoint\.every must be an int, got 1\.5"),
    ],
)
def test_bad_fields_are_refused(tmp_path, small, options, error, message, unchecked):
    with pytest.raises(error, match=message):
        fit(small, small, key=KEY, epochs=1, checkpoint=Checkpoints(tmp_path / "new", **options))
    assert not (tmp_path / "new").exists()


# Numbers that go wrong.


def test_a_loss_that_is_not_finite_stops_the_run(small, tmp_path):
    config = TrainConfig(learning_rate=1e9)
    with pytest.raises(
        NonFiniteLossError, match=r"dropout 0\.2: the loss is not finite in step 2 of epoch 1"
    ) as caught:
        fit(small, small, key=KEY, config=config, dropout_rate=0.2, epochs=3, checkpoint=tmp_path)
    assert (caught.value.epoch, caught.value.step, caught.value.run) == (1, 2, None)
    assert restore(tmp_path, {}) is None


def test_an_absurd_loss_that_is_finite_is_not_hidden(small):
    run = fit(small, small, key=KEY, config=TrainConfig(learning_rate=1e6), epochs=2)
    assert np.isfinite(run.history.running_loss).all()
    assert (run.history.running_loss > 1e9).all()


def test_a_weight_that_is_not_a_number_stops_the_run(small, tmp_path):
    good = fit(small, small, key=KEY, epochs=2, checkpoint=tmp_path / "good")
    params = jax.tree.map(np.array, good.state.params)
    params["fc2"]["bias"][3] = np.nan
    with pytest.raises(NonFiniteLossError, match="in step 1 of epoch 1"):
        fit(small, small, key=KEY, epochs=3, start=good.state._replace(params=params))


def test_a_run_that_fails_later_keeps_what_was_good(small, tmp_path):
    """With dropout the weights grow for some epochs, until a sum of losses overflows."""
    config = TrainConfig(learning_rate=2e7)
    with pytest.raises(NonFiniteLossError, match=r"after [1-9]\d* good epochs") as caught:
        fit(small, small, key=jax.random.key(0), config=config, dropout_rate=0.9, epochs=100, checkpoint=tmp_path)
    error = caught.value
    assert len(error.run.history.running_loss) == error.epoch - 1 > 0
    assert np.isfinite(error.run.history.running_loss).all()
    found = restore(tmp_path, error.run)
    assert found.step == error.epoch - 1
    assert content_digest(found.tree) == content_digest(error.run)


def test_what_was_good_is_saved_before_its_turn(small, tmp_path):
    """A run that saves every fifth epoch fails in its third."""

    def failing(learning_rate):
        return optax.scale_by_schedule(lambda step: jnp.where(jnp.less(step, 2 * 16), -learning_rate, jnp.nan))

    config = TrainConfig(hidden=(8,), optimiser=failing)
    with pytest.raises(NonFiniteLossError, match="after 2 good epochs") as caught:
        fit(small, small, key=KEY, config=config, epochs=5, checkpoint=Checkpoints(tmp_path, every=5))
    found = restore(tmp_path, caught.value.run)
    assert found.step == 2
    assert content_digest(found.tree) == content_digest(caught.value.run)


def test_a_lane_that_is_not_finite_stops_and_the_others_go_on(small):
    """Without dropout the sum of the losses of 1,000 images overflows, with dropout it stays below 3e38."""
    options = {"seeds": [0, 1], "epochs": 3, "config": TrainConfig(learning_rate=2e7)}
    message = r"dropout 0, seed [01]: the loss is not finite in the evaluation after epoch 1.*this lane stays there"
    with pytest.warns(UserWarning, match=message) as caught:
        run = sweep(small, small, dropout_rates=[0.8, 0.0], **options)
    assert len(caught) == 2
    alone = sweep(small, small, dropout_rates=[0.8], **options)
    for leaf, expected in zip(jax.tree.leaves(run.history), jax.tree.leaves(alone.history), strict=True):
        np.testing.assert_array_equal(leaf[0], expected[0])
        assert np.isnan(leaf[1]).all()
    assert run.state.step.tolist() == [[48, 48], [0, 0]]
    both = "; ".join(rf"dropout 0, seed {i}: the loss is not finite in the evaluation after epoch 1" for i in (0, 1))
    with pytest.raises(NonFiniteLossError, match=f"^{both}, after 0 good epochs; a lower"):
        sweep(small, small, dropout_rates=[0.0], **options)
    with pytest.raises(
        ValueError, match=r"numbers that are not finite, in runs \[\[1, 0\], \[1, 1\]\]; leave them out"
    ):
        summarise(run.history)


def test_many_lanes_that_stop_at_once_are_counted(small):
    few = jax.tree.map(lambda leaf: leaf[:64], small)
    config = TrainConfig(hidden=(8,), learning_rate=1e30)
    with pytest.raises(
        NonFiniteLossError, match=r"^all 6 lanes that were left; dropout 0, seed 0: the loss is not finite"
    ):
        sweep(few, few, seeds=range(6), dropout_rates=[0.0], config=config, epochs=1)


def test_what_ran_before_does_not_matter(small):
    options = {"key": KEY, "dropout_rate": 0.2, "epochs": 2}
    first = fit(small, small, **options)
    fit(small, small, key=jax.random.key(9), dropout_rate=0.7, epochs=1)
    sweep(small, small, seeds=[3], dropout_rates=[0.1], epochs=1)
    assert content_digest(fit(small, small, **options)) == content_digest(first)
