"""Lanes are runs: whatever the grid and the devices, each lane is the `fit` with its numbers."""

import functools
import itertools
import re
import socket
import types
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sweep_worker
from sweep_worker import CONFIG, LINEAR, equal, leaves, parts, same

from fashion_jax import FashionMLP, TrainConfig
from fashion_jax.devices import _map, lanes_that_fit
from fashion_jax.model import Dropout
from fashion_jax.steps import init_state
from fashion_jax.train import fit, sweep
from fashion_jax.types import Batch, Run

GRID = {"dropout_rate": (0.0, 0.2), "learning_rate": (1e-3, 3e-3, 1e-2), "weight_decay": (0.0, 0.1)}
OPTIONS = {"config": CONFIG, "seeds": (5, 0)}
# In another layout, losses after eight steps differ by 3e-7; lanes of other numbers by 1e-3. Parameters differ by 6e-5:
# where a gradient is all but 0, Adam divides rounding by rounding, and a step is as large as the learning rate, 1e-2.
LOSSES, PARAMETERS = {"rtol": 1e-4, "atol": 1e-5}, {"rtol": 1e-4, "atol": 2e-3}


@pytest.fixture(scope="module")
def data(small, splits):
    return parts(small, splits)


@pytest.fixture(scope="module")
def grid(data):
    before = _map._cache_size()
    result = sweep(*data, **OPTIONS, epochs=2, **GRID)
    # One program draws initial parameters, and one trains for an epoch.
    assert _map._cache_size() == before + 2
    return result


def close(first, second):
    for tolerance, part in ((LOSSES, "history"), (PARAMETERS, "state"), (PARAMETERS, "best")):
        check = functools.partial(np.testing.assert_allclose, **tolerance)
        jax.tree.map(check, getattr(first, part), getattr(second, part))


def test_each_lane_is_a_run(data, grid):
    before, losses = _map._cache_size(), []
    for *values, seed in itertools.product(*GRID.values(), OPTIONS["seeds"]):
        numbers = dict(zip(GRID, values, strict=True))
        run = fit(*data, key=jax.random.key(seed), config=CONFIG, epochs=2, **numbers)
        # On a CPU one lane follows the other, as in `fit`.
        (equal if jax.default_backend() == "cpu" else close)(run, grid.at(**numbers, seed=seed))
        losses.append(run.history.running_loss)
    assert _map._cache_size() <= before + 2
    apart = np.abs(np.subtract.outer(losses, losses)).max(axis=(1, 3))
    assert apart[~np.eye(24, dtype=bool)].min() > 10 * LOSSES["atol"]


def test_axes_keep_their_order_and_seeds_come_last(data, grid):
    assert list(grid.axes.items()) == [*GRID.items(), ("seed", (5, 0))]
    assert {leaf.shape[:4] for leaf in leaves(grid)} == {(2, 3, 2, 2)}
    again = sweep(*data, **OPTIONS, epochs=2, **dict(reversed(GRID.items())))
    assert list(again.axes) == ["weight_decay", "learning_rate", "dropout_rate", "seed"]
    equal(again.at(learning_rate=3e-3, weight_decay=0.1), grid.at(learning_rate=3e-3, weight_decay=0.1))


def test_reports_have_the_axes_of_the_result(data, grid):
    ends, numbers = [], GRID | {"weight_decay": 0.1}
    callbacks = [lambda end: end.epoch == 2, ends.append]
    result = sweep(*data, config=CONFIG, seeds=iter(range(4)), epochs=5, **numbers, callbacks=callbacks)
    assert [end.epoch for end in ends] == [1, 2]
    assert (ends[0].axes, ends[0].hyperparameters) == (result.axes, {"weight_decay": 0.1})
    assert len(ends[0].rows()) == 24
    for i, end in enumerate(ends):
        for name, curve in result.history.curves().items():
            np.testing.assert_array_equal(end.history.curves()[name], curve[..., : i + 1])
    same(ends[1].fetch_state(), result.state)


class Masked(nn.Module):
    """Two layers with a rate each. It shows the units that were kept: those whose weights a step has changed."""

    first: float | jax.Array = 0.0
    second: float | jax.Array = 0.0

    @nn.compact
    def __call__(self, images, *, deterministic):
        weights, ones = self.param("weights", nn.initializers.normal(), (2, 400)), jnp.ones((len(images), 400))
        kept = [Dropout(rate)(ones, deterministic=deterministic) for rate in (self.first, self.second)]
        return nn.log_softmax(jnp.pad((kept[0] @ weights[0] + kept[1] @ weights[1])[:, None], ((0, 0), (0, 9))))


def test_layers_have_their_own_rates_and_runs_of_a_seed_share_all_draws(data):
    one, rates = Batch(data[0].images[:1], data[0].labels[:1] * 0), (0.2, 0.5, 0.8)
    options = {"config": TrainConfig(model=Masked(), optimizer=optax.sgd), "epochs": 1, "learning_rate": 1.0}
    result = sweep(one, one, **options, seeds=[1, 2], first=rates, second=rates)
    states = [init_state(jax.random.key(seed), config=options["config"]) for seed in (1, 2)]
    start = np.stack([state.params["weights"] for state in states])
    assert (start[0] != start[1]).mean() > 0.99
    # Units kept, [first rate, second rate, seed, layer, unit]; the other layer's rate does not matter.
    kept = result.state.params["weights"] != start
    layers = kept[:, 0, :, 0], kept[0, :, :, 1]
    np.testing.assert_array_equal(kept, np.stack(np.broadcast_arrays(layers[0][:, None], layers[1]), axis=-2))
    for layer in layers:
        np.testing.assert_allclose(layer.mean(axis=-1), 1 - np.outer(rates, [1, 1]), atol=0.08)
        # What a rate drops, a higher one drops, too.
        assert (layer[:-1] >= layer[1:]).all()
        assert not (layer[:, 0] == layer[:, 1]).all(axis=-1).any()


def test_runs_that_diverge_leave_the_others(data, grid):
    """In the program of the other tests; 16 of 24 runs diverge."""
    numbers = GRID | {"learning_rate": (1e-3, 1e30, 1e31)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = sweep(*data, **OPTIONS, epochs=3, **numbers)
    (warning,) = caught
    first = "dropout_rate=0.0, learning_rate=1e+30, weight_decay=0.0, seed=5"
    told = f"16 of 24 runs diverged in epoch 1 ({first}, ...); their history is NaN from there on"
    assert str(warning.message) == told
    healthy = sweep(*data, **OPTIONS, epochs=3, **GRID)
    equal(result.at(learning_rate=1e-3), healthy.at(learning_rate=1e-3))
    lost = result.at(learning_rate=1e30)
    assert all(np.isnan(curve).all() for curve in lost.history.curves().values())
    assert not lost.state.step.any()
    assert (np.isinf(lost.best.loss).all(), lost.best.epoch.any()) == (True, False)
    with pytest.raises(FloatingPointError, match="training diverged in epoch 1; a lower learning_rate may help"):
        sweep(*data, **OPTIONS, epochs=3, **numbers | {"learning_rate": (1e30, 1e31, 1e32)})


def breaking(at):
    return optax.scale_by_schedule(lambda count: jnp.where(count < at, -0.1, jnp.nan))


def test_a_run_that_diverges_later_stays_at_its_last_good_epoch(data):
    config = TrainConfig(model=FashionMLP(hidden=()), optimizer=breaking)
    with pytest.warns(UserWarning, match=r"^1 of 2 runs diverged in epoch 3 \(at=9\.0, seed=0\); ") as caught:
        result = sweep(*data, config=config, seeds=[0], epochs=5, at=(9, 100))
    assert len(caught) == 1
    broken, good = result.at(at=9, seed=0), result.at(at=100, seed=0)
    assert (int(broken.state.step), int(good.state.step)) == (8, 20)
    for curve, other in zip(broken.history.curves().values(), good.history.curves().values(), strict=True):
        np.testing.assert_array_equal(curve[:2], other[:2])
        assert (np.isnan(curve[2:]).all(), np.isfinite(other).all()) == (True, True)
    assert broken.best.loss == broken.history.validation.loss[:2].min()


# A number of lanes that neither the devices nor the lanes at once divide
LANES = {"seeds": [3], "learning_rate": [0.001, 0.003, 0.006, 0.01, 0.02], "epochs": 3}


@pytest.fixture(scope="module")
def expected(data):
    return sweep(*data, config=LINEAR, **LANES)


def test_lanes_trained_together_agree_within_rounding(data, expected):
    close(sweep(*data, config=LINEAR, **LANES, lanes_at_once=2), expected)


def launch(data, directory, *layouts, **arguments):
    """Train in a process for each layout, and return the processes and the files with their results."""
    np.savez(directory / "data.npz", *data[0], *data[1])
    options = {"data": directory / "data.npz", "arguments": LANES | arguments}
    files = [directory / f"{i}.npz" for i in range(len(layouts))]
    pairs = zip(layouts, files, strict=True)
    return sweep_worker.run(*({**options, **layout, "output": file} for layout, file in pairs)), files


def assert_hold(processes, files, result):
    expected = Run(result.state, result.history, result.best)
    for process, path in zip(processes, files, strict=True):
        assert process.returncode == 0, process.stderr
        with np.load(path) as file:
            close(jax.tree.unflatten(jax.tree.structure(expected), [file[name] for name in file.files]), expected)


def test_any_number_of_devices_gives_the_same_result(data, expected, tmp_path):
    """Two of two, and the last three of four."""
    processes, files = launch(data, tmp_path, {"cpus": 2}, {"cpus": 4, "use": [1, 4]})
    assert_hold(processes, files, expected)
    assert [process.stdout for process in processes] == [f"1 processes, {n} devices\n" for n in (2, 4)]


def two_machines():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    return [{"cpus": 2, "machines": [address, 2, i]} for i in range(2)]


def test_two_processes_train_one_sweep(data, expected, tmp_path):
    """They share a directory of checkpoints. Where one dies the other ends, and the next two resume."""
    saved = str(tmp_path / "saved")
    living, dying = two_machines()
    dead, _ = launch(data, tmp_path, living, {**dying, "die_in": "epoch", "die_at": 2}, checkpoint=saved)
    assert all(process.returncode for process in dead)
    assert dead[0].stderr.strip()
    processes, files = launch(data, tmp_path, *two_machines(), checkpoint=saved)
    assert_hold(processes, files, expected)
    for process in processes:
        assert re.search("resuming after epoch [12] of 3", process.stderr)
        assert process.stdout.splitlines()[-1] == "2 processes, 4 devices"
    # One process goes on where two have been.
    close(*(sweep(*data, config=LINEAR, **LANES | {"epochs": 4}, checkpoint=place) for place in (saved, None)))


def test_an_accelerator_trains_as_many_lanes_as_fit():
    def count(size, *hidden):
        device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": size})
        return lanes_that_fit(device, TrainConfig(model=FashionMLP(hidden=hidden)), (28, 28))

    assert 20_000 >= count(80 * 2**30, 256, 128, 64) >= 256 > 10 * count(2**30, 2048, 1024)
    assert count(2**20, 256) == 1
