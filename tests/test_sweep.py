"""Lanes are runs: whatever the layout, lane (i, j) is `fit` with seed j and rate i."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import sweep_worker

from fashion_jax import Batch, TrainConfig, data, fit
from fashion_jax.sweep import join_machines, lanes_that_fit, sweep
from fashion_jax.train import NonFiniteLossError

ROOT = Path(__file__).parents[1]
KEY = jax.random.key(0)
# Sixteen steps of float32 in another order of sums; a lane with another draw differs by a hundred times that.
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


def assert_close(first, second, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), first, second)


@pytest.fixture(scope="module")
def validation(splits) -> Batch:
    return data.subset(splits.test, 1_000, key=jax.random.key(7))


@pytest.fixture(scope="module")
def runs(small, validation):
    """The lanes of `sweep_worker`, one by one."""
    return [
        [
            fit(small, validation, key=jax.random.key(seed), dropout_rate=rate, epochs=sweep_worker.EPOCHS)
            for seed in sweep_worker.SEEDS
        ]
        for rate in sweep_worker.RATES
    ]


@pytest.fixture(scope="module")
def expected(runs):
    stacked = [jax.tree.map(lambda *leaves: np.stack(leaves), *row) for row in runs]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *stacked)


def sweep_all(small, validation, **options):
    options = {
        "seeds": sweep_worker.SEEDS,
        "dropout_rates": sweep_worker.RATES,
        "epochs": sweep_worker.EPOCHS,
    } | options
    return sweep(small, validation, **options)


@pytest.mark.parametrize("lanes_at_once", [None, 1, 2, 4, 100])
def test_a_lane_is_a_run(small, validation, expected, lanes_at_once):
    """4 does not divide the 6 lanes; 100 are more than there are."""
    run = sweep_all(small, validation, lanes_at_once=lanes_at_once)
    assert_close(run.history, expected.history, **CLOSE)
    assert_close(run.state.params, expected.state.params, **CLOSE)
    assert run.state.step.tolist() == [[32] * 3] * 2


def test_lanes_differ(expected):
    """What the tolerance above has to tell apart."""
    losses = expected.history.running_loss.reshape(6, -1)
    apart = np.abs(losses[:, None] - losses[None]).max(axis=-1)[~np.eye(6, dtype=bool)]
    assert apart.min() > 10 * CLOSE["atol"]


def test_a_sweep_is_deterministic(small, validation):
    first, second = (sweep_all(small, validation) for _ in range(2))
    assert_close(first, second, rtol=0, atol=0)


@pytest.fixture
def worker():
    """Start processes, and leave none behind."""
    started: list[subprocess.Popen] = []
    yield lambda *arguments, **environment: started.append(start(*arguments, **environment)) or started[-1]
    for process in started:
        process.kill()
        process.communicate()


def start(devices: int, output: Path, *machines, **environment) -> subprocess.Popen:
    command = [sys.executable, "tests/sweep_worker.py", str(devices), str(output), *map(str, machines)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | environment
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def assert_file_holds(path: Path, expected):
    with np.load(path) as file:
        leaves = [file[name] for name in file.files]
    assert_close(leaves, jax.tree.leaves((expected.history, expected.state.params)), **CLOSE)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_any_number_of_devices_gives_the_same_history(devices, expected, tmp_path, worker):
    """4 and 8 devices do not divide 6 lanes."""
    process = worker(devices, tmp_path / "run.npz")
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert out == f"1 processes, {devices} devices\n"
    assert_file_holds(tmp_path / "run.npz", expected)


def test_two_processes_give_the_same_history(expected, tmp_path, worker):
    address = f"127.0.0.1:{free_port()}"
    processes = [worker(2, tmp_path / f"{i}.npz", address, 2, i) for i in range(2)]
    for i, process in enumerate(processes):
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert out.splitlines()[-1] == "2 processes, 4 devices"
        assert_file_holds(tmp_path / f"{i}.npz", expected)


@pytest.mark.usefixtures("compiled_apart")
def test_a_process_that_dies_ends_the_others(tmp_path, worker):
    address = f"127.0.0.1:{free_port()}"
    processes = [worker(1, tmp_path / f"{i}.npz", address, 2, i, DIE="1", HIDDEN="8") for i in range(2)]
    _, errors = processes[0].communicate(timeout=120)
    processes[1].communicate(timeout=10)
    assert processes[0].returncode not in (0, None)
    assert errors.strip()
    assert not list(tmp_path.iterdir())


def test_a_sweep_goes_on_with_other_devices_and_processes(expected, tmp_path, worker):
    checkpoint = {"CHECKPOINT": str(tmp_path / "saved")}
    first = worker(2, tmp_path / "0.npz", STOP="1", **checkpoint)
    _, errors = first.communicate(timeout=300)
    assert first.returncode == 0, errors
    address = f"127.0.0.1:{free_port()}"
    processes = [worker(2, tmp_path / f"{i}.npz", address, 2, i, **checkpoint) for i in range(2)]
    for i, process in enumerate(processes):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert "going on after epoch 1 of 2" in errors
        assert "devices was 2 and is 4: going on within rounding, not bit by bit" in errors
        assert_file_holds(tmp_path / f"{i}.npz", expected)


def test_sizes_are_nested_and_have_an_axis_of_their_own(small, validation):
    config = TrainConfig(hidden=(16,))
    run = sweep_all(small, validation, train_sizes=[100, 1_000], config=config)
    assert run.history.validation.loss.shape == (2, 2, 3, 2)
    assert run.state.step[:, 0, 0].tolist() == [4, 32]
    for i, size in enumerate((100, 1_000)):
        part = data.subset(small, size, key=jax.random.key(0))
        alone = fit(part, validation, key=jax.random.key(3), config=config, dropout_rate=0.5, epochs=2)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i, 1, 1], run.history), alone.history, **CLOSE)


def test_ctrl_c_returns_the_complete_epochs(small, validation):
    whole = sweep_all(small, validation, epochs=3)

    def stop(end):
        if end.epoch == 2:
            raise KeyboardInterrupt

    run = sweep_all(small, validation, epochs=3, on_epoch=stop)
    assert_close(run.history, jax.tree.map(lambda leaf: leaf[..., :2], whole.history), rtol=0, atol=0)
    assert run.state.step.tolist() == [[32] * 3] * 2
    single = fit(small, validation, key=KEY, epochs=3, on_epoch=stop)
    assert single.history.running_loss.shape == (2,)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("at", "complete"), [(1, 1), (2, 2)])
def test_no_size_starts_after_ctrl_c(small, validation, at, complete):
    """In a size's last epoch, too, after which its run is complete."""
    ends = []

    def interrupt(end):
        ends.append((end.train_size, end.epoch))
        if ends[-1] == (200, at):
            signal.raise_signal(signal.SIGINT)

    config = TrainConfig(hidden=(8,))
    run = sweep_all(small, validation, train_sizes=[100, 200, 300], config=config, on_epoch=interrupt)
    assert ends[-1] == (200, at)
    assert run.history.running_loss.shape == (complete, 2, 3, 2)


def test_ctrl_c_before_any_size_is_complete_is_told(small, validation):
    def stop(end):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep_all(small, validation, train_sizes=[100, 200], config=TrainConfig(hidden=(8,)), on_epoch=stop)


def test_some_of_the_devices_are_enough(tmp_path):
    code = """
import sys, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from fashion_jax import Batch, TrainConfig
from fashion_jax.sweep import sweep
data = Batch(np.zeros((10, 28, 28), np.uint8), np.arange(10, dtype=np.int32))
options = {"seeds": [0, 1], "dropout_rates": [0.0], "config": TrainConfig(hidden=(8,)), "epochs": 1}
sweep(data, data, **options, devices=jax.devices()[1:3], checkpoint=sys.argv[1])
"""
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "1" / "seal.json").read_text())["circumstances"]["devices"] == 2


def test_other_generators_draw_for_one_lane_at_a_time(small, validation):
    """Their draws for several at once are not those of each alone."""
    with jax.default_prng_impl("rbg"):
        config = TrainConfig(hidden=(16,))
        options = {"config": config, "epochs": 1}
        run = sweep(small, validation, seeds=[3, 4], dropout_rates=[0.5], **options)
        alone = fit(small, validation, key=jax.random.key(4), dropout_rate=0.5, **options)
        assert_close(jax.tree.map(lambda leaf: leaf[0, 1], run.history), alone.history, **CLOSE)
        with pytest.raises(ValueError, match=r"lanes_at_once must be 1 where jax_default_prng_impl is rbg.*got 2"):
            sweep(small, validation, seeds=[3, 4], dropout_rates=[0.5], lanes_at_once=2, **options)


@pytest.mark.parametrize("order", [("rbg", "unsafe_rbg"), ("unsafe_rbg", "rbg")])
def test_generators_whose_keys_are_alike_share_no_program(small, order):
    jax.clear_caches()
    options = {"config": TrainConfig(hidden=(16,)), "epochs": 1}
    for generator in order:
        with jax.default_prng_impl(generator):
            run = sweep(small, small, seeds=[3], dropout_rates=[0.5], **options)
            alone = fit(small, small, key=jax.random.key(3), dropout_rate=0.5, **options)
            assert_close(jax.tree.map(lambda leaf: leaf[0, 0], run.history), alone.history, **CLOSE)


def test_a_size_that_diverges_leaves_the_others(small):
    """One step leaves huge weights, and the next ones overflow."""
    part = Batch(*(leaf[:64] for leaf in small))
    config = TrainConfig(hidden=(8,), batch_size=16, optimiser=optax.sgd, learning_rate=1e18)
    options = {"seeds": [0, 1], "dropout_rates": [0.0], "config": config, "epochs": 1}
    alone = sweep(part, part, **options, train_sizes=[16])
    with pytest.warns(UserWarning, match=r"^of 64 training examples: .*the loss is not finite"):
        run = sweep(part, part, **options, train_sizes=[16, 64])
    jax.tree.map(lambda leaf, other: np.testing.assert_array_equal(leaf[0], other[0]), run, alone)
    for leaf in jax.tree.leaves(run.history):
        np.testing.assert_array_equal(np.isnan(leaf), np.broadcast_to([[[[False]]], [[[True]]]], leaf.shape))
    with pytest.raises(NonFiniteLossError):
        sweep(part, part, **options, train_sizes=[64])


def test_when_every_lane_fails_the_error_has_a_run_like_any_other(small):
    options = {"seeds": [0, 1, 2], "dropout_rates": [0.9], "config": TrainConfig(learning_rate=2e7), "epochs": 60}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(NonFiniteLossError) as caught:
            sweep(small, small, **options)
    run = caught.value.run
    assert run.history.running_loss.shape[:2] == (1, 3)
    assert all(isinstance(leaf, np.ndarray) and leaf.shape[:2] == (1, 3) for leaf in jax.tree.leaves(run))
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.epoch, again.step) == (str(caught.value), caught.value.epoch, caught.value.step)
    assert_close(again.run, run, rtol=0, atol=0)


def test_reports_have_the_axes_of_the_result(small, validation):
    ends = []
    run = sweep_all(small, validation, on_epoch=ends.append)
    assert [end.epoch for end in ends] == [1, 2]
    assert (ends[0].dropout_rates, ends[0].seeds) == (sweep_worker.RATES, sweep_worker.SEEDS)
    assert ends[0].config == TrainConfig()
    assert ends[0].history.validation.loss.shape == (2, 3)
    np.testing.assert_array_equal(ends[1].history.train.loss, run.history.train.loss[..., 1])
    assert_close(ends[1].fetch_state(), run.state, rtol=0, atol=0)


def test_only_as_many_lanes_as_fit():
    class Accelerator:
        platform = "gpu"

        def memory_stats(self):
            return {"bytes_limit": 80 * 2**30}

    class Small(Accelerator):
        def memory_stats(self):
            return {"bytes_limit": 2**20}

    many = lanes_that_fit(Accelerator(), TrainConfig())
    assert 256 <= many <= 20_000
    assert lanes_that_fit(Accelerator(), TrainConfig(hidden=(2048, 1024))) < many / 10
    assert lanes_that_fit(Small(), TrainConfig()) == 1
    assert lanes_that_fit(jax.devices("cpu")[0], TrainConfig()) == 1


def test_too_many_lanes_say_how_many_fit(small, validation):
    config = TrainConfig(hidden=(1_000_000,))
    message = (
        r"6 lanes on 1 devices, 1 at once on each, do not fit into their memory; about [0-5] lanes of this config do"
    )
    with pytest.raises(MemoryError, match=message):
        sweep_all(small, validation, config=config)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seeds": []}, ValueError, "seeds must name at least one"),
        ({"seeds": [1, 1]}, ValueError, "none twice; got"),
        ({"seeds": [-1]}, ValueError, "seeds must lie between 0 and"),
        ({"seeds": [2**40]}, ValueError, "seeds must lie between 0 and"),
        ({"seeds": [0.5]}, TypeError, "seeds must be ints, got 0.5"),
        ({"dropout_rates": []}, ValueError, "dropout_rates must name at least one"),
        ({"dropout_rates": [0.2, 0.2]}, ValueError, "none twice"),
        ({"dropout_rates": [0.2, 1.0]}, ValueError, r"dropout_rates must lie in \[0, 1\), got 1.0"),
        ({"train_sizes": [0]}, ValueError, "train_sizes must be at least 1, got 0"),
        ({"train_sizes": [10, 10]}, ValueError, "none twice"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"lanes_at_once": 0}, ValueError, "lanes_at_once must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(small, validation, options, error, message, unchecked):
    with pytest.raises(error, match=message):
        sweep_all(small, validation, **options)


def test_machines_are_described_whole():
    with pytest.raises(ValueError, match="belong together"):
        join_machines("localhost:1", processes=2)


@pytest.mark.parametrize("coordinator", ["localhost", "localhost:", ":", "localhost:port"])
def test_a_coordinator_has_a_port(coordinator):
    with pytest.raises(ValueError, match=f"coordinator must be host:port, got '{coordinator}'"):
        join_machines(coordinator, 1, 0)
