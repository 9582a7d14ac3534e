"""The figures: each line and bar shows its numbers, without a display."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweep_worker import history

from fashion_jax import plot
from fashion_jax.types import History, Metrics

# A formula to Matplotlib, and one that it could not read.
FORMULAS = ["$a$", "$\\bad$"]
IMAGE, HALVES = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28), np.full(2, 0.5)
classify = partial(plot.classification, class_names=["a", "b"])


def losses_of(arm: History) -> list:
    return [arm.running_loss, arm.train.loss, arm.validation.loss]


def legend(owner) -> list[str]:
    return [text.get_text() for text in owner.get_texts()]


def test_losses_draws_mean_band_and_lowest_over_the_reference():
    arm, reference = history(3, 5), history(2, 4)._replace(train=Metrics(*np.full((2, 2, 4), np.nan)))
    figure = plot.losses(dict.fromkeys(FORMULAS, arm), reference={FORMULAS[1]: reference})
    names = ["training loss (running)", "training loss (eval mode)", "validation loss"]
    beside = ["reference, training loss (running)", "reference, validation loss"]
    assert legend(figure.legends[0]) == names + beside
    for axes, title, thin in zip(figure.axes, FORMULAS, ([], [*reference[0], *reference.validation.loss]), strict=True):
        assert (axes.get_title(), axes.title.get_parse_math(), axes.get_xlabel()) == (title, False, "epoch")
        lines, (*below, ring) = axes.lines[:3], axes.lines[3:]
        for line, band, leaf in zip(lines, axes.collections, losses_of(arm), strict=True):
            mean, std = leaf.mean(axis=0), leaf.std(axis=0, ddof=1)
            np.testing.assert_allclose(line.get_xydata(), np.stack([[1, 2, 3, 4, 5], mean], axis=1))
            edges = band.get_paths()[0].vertices[:, 1]
            assert (edges.min(), edges.max()) == pytest.approx(((mean - std).min(), (mean + std).max()))
        assert len({line.get_linestyle() for line in lines}) == 3
        for line, curve in zip(below, thin, strict=True):
            np.testing.assert_array_equal(line.get_ydata(), curve)
            assert line.get_zorder() < min(line.get_zorder() for line in lines)
        mean = arm.validation.loss.mean(axis=0)
        lowest, best = mean.min(), mean.argmin() + 1
        assert ring.get_xydata().tolist() == [[best, lowest]]
        assert legend(axes.get_legend()) == [f"lowest validation loss: {lowest:.3f}, epoch {best}"]


@pytest.mark.parametrize(("epochs", "columns"), [(1, 2), (7, 3), (33, 2), (100, 3)])
def test_single_runs_stand_above_many_up_to_the_last_epoch(epochs, columns):
    one, many = jax.tree.map(jnp.array, history(epochs)), history(3, epochs)
    one = one._replace(train=jax.tree.map(lambda leaf: leaf * np.nan, one.train))
    arms = dict.fromkeys("abc"[:columns], one) | dict.fromkeys("de", many)
    figure = plot.losses(arms)
    panels = [axes for axes in figure.axes if axes.axison]
    assert figure.axes[0].get_gridspec().get_geometry() == (2, columns)
    assert [axes.get_title() for axes in panels] == list(arms)
    assert [(len(axes.lines), len(axes.collections)) for axes in panels] == columns * [(3, 0)] + 2 * [(4, 3)]
    assert all(line.get_marker() == "o" * (epochs == 1) for axes in panels for line in axes.lines[:2])
    labels = ["loss (nats)", "loss (nats), mean ± std of 3 seeds"]
    assert [axes.get_ylabel() for axes in panels if axes.get_ylabel()] == labels
    ticks = panels[0].get_xticks().tolist()
    assert (ticks[0], ticks[-1], len(ticks) <= 10) == (1, epochs, True)


def test_overlay_draws_means_over_single_seeds():
    arms = {name: history(3, 5) for name in FORMULAS}
    arms[FORMULAS[1]].validation.loss[:, 1] = np.nan  # An epoch that was not evaluated.
    figure = plot.overlay(arms)
    assert legend(figure.legends[0]) == [name.replace("$", "\\$") for name in FORMULAS]
    for axes, values in zip(figure.axes, zip(*(arm.validation for arm in arms.values()), strict=True), strict=True):
        for i, runs in enumerate(values):
            *thin, mean = axes.lines[4 * i : 4 * i + 4]
            evaluated = np.flatnonzero(~np.isnan(runs).all(axis=0))
            np.testing.assert_allclose([line.get_ydata() for line in thin], runs[:, evaluated])
            np.testing.assert_allclose(mean.get_xydata().T, [evaluated + 1, runs.mean(axis=0)[evaluated]])
        assert len({line.get_linestyle() for line in axes.lines[3::4]}) == len(arms)


def test_losses_leaves_out_diverged_runs():
    arm = history(3, 5)
    stopped = jax.tree.map(np.copy, arm)
    for leaf in jax.tree.leaves(stopped):
        leaf[0, 2:] = np.nan
    # If none is left, all are drawn as far as they go.
    alone = jax.tree.map(lambda leaf: leaf[0], stopped)
    panels = plot.losses({"arm": stopped, "whole": arm, "alone": alone}).axes
    titles = ["arm (1 of 3 runs diverged)", "whole", "alone (1 of 1 runs diverged)"]
    assert [axes.get_title() for axes in panels] == titles
    for line, leaf in zip(panels[0].lines, losses_of(arm), strict=False):
        np.testing.assert_allclose(line.get_ydata(), leaf[1:].mean(axis=0))
    np.testing.assert_allclose(panels[2].lines[2].get_ydata()[:2], alone.validation.loss[:2])


def test_classification_draws_ten_bars():
    names, probabilities, spread = [*FORMULAS, *"cdefghij"], np.full(10, 0.02), np.full(10, 0.05)
    probabilities[3] = 0.97
    figure = plot.classification(IMAGE, probabilities, class_names=names, label=9, spread=spread)
    picture, bars = figure.axes
    np.testing.assert_array_equal(picture.images[0].get_array(), IMAGE)
    assert (picture.get_title(), bars.get_title()) == ("label: j", "prediction: d")
    assert [bar.get_width() for bar in bars.patches] == probabilities.tolist()
    assert [bool(bar.get_hatch()) for bar in bars.patches] == 9 * [False] + [True]
    assert [text.get_text() for text in bars.texts] == [f"{share:.3f}" for share in probabilities]
    ends = np.array(bars.containers[1].lines[2][0].get_segments())[:, :, 0]
    np.testing.assert_allclose(ends, np.stack([probabilities - spread, probabilities + spread], axis=1).clip(0, 1))
    figure.draw_without_rendering()  # Raises if it reads a name as a formula.
    picture, bars = plot.classification(jnp.array(IMAGE), jnp.array(probabilities), class_names=names).axes
    assert (picture.get_title(), bars.get_xlabel()) == ("", "probability")


def test_samples_are_laid_row_by_row_or_class_by_class():
    images = np.arange(1, 29, dtype=np.uint8).reshape(7, 2, 2)
    black, color = np.zeros((2, 2)), np.stack(3 * [images], axis=-1)
    (axes,) = plot.samples(images, columns=3).axes
    sheet = np.block([[*images[:3]], [*images[3:6]], [images[6], black, black]])
    np.testing.assert_array_equal(axes.images[0].get_array(), sheet)
    (axes,) = plot.samples(color, columns=2, labels=np.array([1, 0, 1, 1, 1, 1, 1]), class_names=FORMULAS).axes
    sheet = np.block([[images[1], black], [images[0], images[2]]])
    np.testing.assert_array_equal(axes.images[0].get_array(), np.stack(3 * [sheet], axis=-1))
    assert [text.get_text() for text in axes.texts] == FORMULAS
    assert plot.samples(color).axes[0].images[0].get_array().shape == (2, 60, 3)


def test_the_suffix_names_the_format(tmp_path):
    figure = plot.samples(IMAGE[None])
    for suffix, start in ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")):
        plot.save(figure, tmp_path / "new" / f"sheet{suffix}")
        assert (tmp_path / "new" / f"sheet{suffix}").read_bytes().startswith(start)
    for wrong in ("sheet.xyz", "sheet"):
        with pytest.raises(ValueError, match="supported"):
            plot.save(figure, tmp_path / wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    # Over the images of a sheet, a note would hide them.
    for drawn, title in ((classify(IMAGE, HALVES), "a machine, $5"), (figure, "")):
        plot.save(drawn, tmp_path / "noted.png", note="a machine, $5")
        assert drawn.get_suptitle() == title


def test_drawing_needs_no_pyplot_and_changes_no_setting():
    code = """
import io, sys, matplotlib, numpy
from fashion_jax import plot
settings = lambda: {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}
before = settings()  # Reading the backend would load pyplot.
plot.samples(numpy.zeros((9, 28, 28), "uint8")).savefig(io.BytesIO())
assert settings() == before and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
