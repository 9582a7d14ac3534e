"""Lanes are runs: whatever the grid and the devices, each lane is the `fit` with its numbers."""

import functools
import itertools
import signal
import socket
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sweep_worker
from sweep_worker import CONFIG, LINEAR, close, equal, leaves, same

from fashion_jax import FashionMLP, TrainConfig
from fashion_jax.devices import _map, lanes_that_fit
from fashion_jax.train import fit, sweep
from fashion_jax.types import Run

GRID = {"dropout_rate": (0.0, 0.2), "learning_rate": (1e-3, 3e-3, 1e-2), "weight_decay": (0.0, 0.1)}
# In another layout, losses after eight steps differ by 3e-7; lanes of other numbers by 1e-3. Parameters differ by 6e-5:
# where a gradient is all but 0, Adam divides rounding by rounding, and a step is as large as the learning rate, 1e-2.
LOSSES, PARAMETERS = {"rtol": 1e-4, "atol": 1e-5}, {"rtol": 1e-4, "atol": 2e-3}


@pytest.fixture(scope="module")
def grid(data):
    before = _map._cache_size()
    result = sweep(*data, config=CONFIG, seeds=(5, 0), epochs=2, **GRID)
    # One program draws initial parameters, and one trains for an epoch.
    assert _map._cache_size() == before + 2
    return result


def agree(first, second):
    for tolerance, part in ((LOSSES, "history"), (PARAMETERS, "state"), (PARAMETERS, "best")):
        close(getattr(first, part), getattr(second, part), **tolerance)


def test_each_lane_is_a_run(data, grid):
    losses = []
    for *values, seed in itertools.product(*GRID.values(), (5, 0)):
        numbers = dict(zip(GRID, values, strict=True))
        run = fit(*data, key=jax.random.key(seed), config=CONFIG, epochs=2, **numbers)
        # On a CPU one lane follows the other, as in `fit`.
        (equal if jax.default_backend() == "cpu" else agree)(run, grid.at(**numbers, seed=seed))
        losses.append(run.history.running_loss)
    apart = np.abs(np.subtract.outer(losses, losses)).max(axis=(1, 3))
    assert apart[~np.eye(24, dtype=bool)].min() > 10 * LOSSES["atol"]


def test_axes_keep_their_order_in_results_and_reports_and_seeds_come_last(data, grid):
    assert list(grid.axes.items()) == [*GRID.items(), ("seed", (5, 0))]
    assert {leaf.shape[:4] for leaf in leaves(grid)} == {(2, 3, 2, 2)}
    ends, options = [], {"config": CONFIG, "seeds": iter((5, 0, 1, 2)), "epochs": 5}
    callbacks, numbers = [lambda end: end.epoch == 2, ends.append], GRID | {"weight_decay": 0.1}
    result = sweep(*data, **options, callbacks=callbacks, **dict(reversed(numbers.items())))
    assert list(result.axes) == ["learning_rate", "dropout_rate", "seed"]
    lane = {"learning_rate": 3e-3, "dropout_rate": 0.2, "seed": 5}
    equal(result.at(**lane), grid.at(**lane, weight_decay=0.1))
    assert [end.epoch for end in ends] == [1, 2]
    assert (ends[0].axes, ends[0].hyperparameters) == (result.axes, {"weight_decay": 0.1})
    assert len(ends[0].rows()) == 24
    for end in ends:
        same(end.history, jax.tree.map(lambda leaf, end=end: leaf[..., : end.epoch], result.history))
    same(ends[1].fetch_state(), result.state)


def test_runs_that_diverge_stay_at_their_last_good_epoch_and_leave_the_others(data):
    """From some step on their updates are NaN; an epoch has four."""

    def breaking(at):
        return optax.scale_by_schedule(lambda count: jnp.where(count < at, -0.1, jnp.nan))

    config = TrainConfig(model=LINEAR.model, optimizer=breaking)
    train = functools.partial(sweep, *data, config=config, seeds=[0], epochs=5)
    good = train(at=(97, 98, 99, 100)).at(at=100, seed=0)
    with pytest.warns(UserWarning, match="diverged") as caught:
        result = train(at=(0, 1, 9, 100))
    told = "runs diverged in epoch 1 (at=0.0, seed=0, ...)", "runs diverged in epoch 3 (at=9.0, seed=0)"
    expected = [f"{n} of 4 {text}; their history is NaN from there on" for n, text in zip((2, 1), told, strict=True)]
    assert [str(warning.message) for warning in caught] == expected
    equal(result.at(at=100, seed=0), good)
    for at, epochs in ((0, 0), (1, 0), (9, 2)):
        run = result.at(at=at, seed=0)
        same(run.history, jax.tree.map(lambda leaf, n=epochs: np.where(np.arange(5) < n, leaf, np.nan), good.history))
        losses = [np.inf, *run.history.validation.loss[:epochs]]
        assert (run.state.step, run.best.loss, run.best.epoch) == (4 * epochs, min(losses), np.argmin(losses))
    with pytest.raises(FloatingPointError, match="training diverged in epoch 1; a lower learning_rate may help"):
        train(at=(0, 1, 2, 3))


def test_other_devices_processes_and_lanes_at_once_change_rounding_only(data, tmp_path):
    """Two of four devices, two lanes at once; two processes with two devices each, which save to one directory.

    One of the two dies in a longer run. The other ends, too, and a single process goes on.
    """
    # Neither the devices nor the lanes at once divide the number of lanes.
    lanes = {"seeds": [3], "learning_rate": [0.001, 0.003, 0.006, 0.01, 0.02], "epochs": 3}
    saved, train = str(tmp_path / "saved"), functools.partial(sweep, *data, config=LINEAR, **lanes)
    np.savez(tmp_path / "data.npz", *data[0], *data[1])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    two = {"cpus": 2, "arguments": lanes | {"checkpoint": saved}, "longer": 5}
    layouts = [
        {"cpus": 4, "use": [1, 3], "arguments": lanes | {"lanes_at_once": 2}},
        two | {"machines": [address, 2, 0]},
        # The fifth report is of the fourth epoch: the longer run repeats that of the third.
        two | {"machines": [address, 2, 1], "die_in": "epoch", "die_at": 5},
    ]
    files = [{"data": tmp_path / "data.npz", "output": tmp_path / f"{i}.npz"} for i in range(3)]
    processes = sweep_worker.run(*map(dict.__or__, layouts, files))

    expected = train()
    expected = Run(expected.state, expected.history, expected.best)
    for process, place, devices in zip(processes, files, ("1 processes, 4", *["2 processes, 4"] * 2), strict=True):
        assert f"{devices} devices\n" in process.stdout, process.stderr
        with np.load(place["output"]) as file:
            agree(jax.tree.unflatten(jax.tree.structure(expected), [file[name] for name in file.files]), expected)
    alone, living, dying = processes
    assert (alone.returncode, dying.returncode) == (0, -signal.SIGKILL)
    assert living.returncode not in (0, -signal.SIGKILL)
    for process in (living, dying):
        assert "resuming after epoch 3 of 5" in process.stderr
    agree(*(train(epochs=5, checkpoint=place) for place in (saved, None)))


def test_an_accelerator_trains_as_many_lanes_as_fit():
    def count(size, *hidden):
        device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": size})
        return lanes_that_fit(device, TrainConfig(model=FashionMLP(hidden=hidden)), (28, 28))

    assert 20_000 >= count(80 * 2**30, 256, 128, 64) >= 256 > 10 * count(2**30, 2048, 1024)
    assert count(2**20, 256) == 1
