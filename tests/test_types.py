"""Results know their axes and are short to look at."""

import sys

import jax
import numpy as np
import pandas
import pytest

from fashion_jax.steps import init_state
from fashion_jax.types import Best, History, Metrics, Run, Sweep

AXES = {"dropout_rate": (0.0, 0.2), "learning_rate": (1e-3, 3e-3, 1e-2), "seed": (0, 1, 2, 3)}
LANES = tuple(map(len, AXES.values()))


def history(*shape) -> History:
    """All entries are different."""
    curves = np.arange(5.0 * np.prod(shape)).reshape(5, *shape)
    return History(curves[0], Metrics(*curves[1:3]), Metrics(*curves[3:]))


@pytest.fixture(scope="module")
def result() -> Sweep:
    state = jax.tree.map(lambda leaf: np.broadcast_to(leaf, LANES + leaf.shape), init_state(jax.random.key(0)))
    return Sweep(AXES, state, history(*LANES, 5), Best(state.params, history(*LANES)[0], np.ones(LANES, int)))


@pytest.fixture(scope="module")
def run(result) -> Run:
    return result.at(seed=2, dropout_rate=0.2, learning_rate=1e-3)


def test_at_selects_by_name_in_any_order(result, run):
    curve, part = result.history.validation.accuracy, result.at(seed=2, dropout_rate=0.2)
    assert part.axes == {"learning_rate": AXES["learning_rate"]}
    np.testing.assert_array_equal(part.history.validation.accuracy, curve[1, :, 2])
    np.testing.assert_array_equal(part.best.loss, result.best.loss[1, :, 2])
    for found in (run, part.at(learning_rate=1e-3)):
        assert isinstance(found, Run)
        np.testing.assert_array_equal(found.history.validation.accuracy, curve[1, 0, 2])
    with pytest.raises(KeyError, match="there is no axis 'rate'; the axes are dropout_rate, learning_rate, seed"):
        result.at(rate=0.2)
    with pytest.raises(KeyError, match=r"learning_rate is one of 0\.001, 0\.003, 0\.01; got 3"):
        result.at(seed=0, learning_rate=3)


def test_data_sets_and_frames_name_axes_and_curves(result, monkeypatch):
    dataset = result.to_xarray()
    assert dict(dataset.sizes) == {"dropout_rate": 2, "learning_rate": 3, "seed": 4, "epoch": 5}
    assert list(dataset) == list(result.history.curves())
    found = dataset.validation_loss.sel(dropout_rate=0.2, learning_rate=1e-2, seed=3, epoch=2)
    assert float(found) == result.history.validation.loss[1, 2, 3, 1]
    monkeypatch.setitem(sys.modules, "xarray", None)
    pandas.testing.assert_frame_equal(result.to_dataframe(), dataset.to_dataframe().reset_index())
    with pytest.raises(ImportError, match=r'pip install "fashion_jax\[xarray\]"'):
        result.to_xarray()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r'pip install "fashion_jax\[pandas\]"'):
        result.to_dataframe()


def test_what_is_looked_at_is_short_and_says_what_it_is(result, run, splits):
    last, best = f"validation loss {run.history.validation.loss[-1]:.4f}", f"validation loss {run.best.loss:.4f}"
    for value, *parts in (
        (splits, "train=Batch(images=uint8[60000, 28, 28], labels=", "test=Batch(images=uint8[10000"),
        (run, "242,762 parameters", "[5]", last, "epoch 1", best),
        (result, "dropout_rate=", "0.2", "seed="),
        (result.best, "[2, 3, 4]"),
        (Sweep({"seed": tuple(range(1000))}, run.state, history(1000, 1), run.best), "seed="),
        (Run(run.state, history(0), run.best), "242,762 parameters"),
        (history(), "running loss 0.0000", "validation accuracy 4.0000"),
    ):
        assert len(repr(value)) < 500
        assert repr(value).count("\n") < 6
        assert not [part for part in parts if part not in repr(value)], repr(value)


@pytest.mark.parametrize("change", [np.shape, lambda leaf: np.dtype(leaf.dtype), lambda leaf: None, repr])
def test_a_repr_does_not_raise_whatever_the_leaves(run, result, splits, change):
    """`jax.tree.map` makes trees of anything, and a tracer has no value."""
    seen = []
    for value in (splits, run, run.best, result.best, result.history):
        assert repr(jax.tree.map(change, value))
        shapes = jax.eval_shape(lambda value: (seen.append(repr(value)), value)[1], value)
        assert max(len(repr(shapes)), len(seen[-1])) < 500
