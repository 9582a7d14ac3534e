"""The figures: each line and bar shows its numbers, without a display."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fashion_jax import plot
from fashion_jax.types import History, Metrics

# A formula to Matplotlib, and one that it could not read.
FORMULAS = ["$a$", "$\\bad$"]
NAMES, IMAGE, HALVES = [*FORMULAS, *"cdefghij"], np.zeros((28, 28), np.uint8), np.full(2, 0.5)
CURVES = ["training loss (running)", "training loss (eval mode)", "validation loss"]


def history(*shape) -> History:
    leaves = np.random.default_rng(0).uniform(0.2, 0.5, (5, *shape))
    return History(leaves[0], Metrics(leaves[1], leaves[2]), Metrics(leaves[3], leaves[4]))


def losses_of(arm: History) -> list:
    return [arm.running_loss, arm.train.loss, arm.validation.loss]


def legend(owner) -> list[str]:
    return [text.get_text() for text in owner.get_texts()]


def test_losses_draws_mean_band_and_lowest():
    arm = history(3, 5)
    figure = plot.losses(dict.fromkeys(FORMULAS, arm))
    assert [axes.get_title() for axes in figure.axes] == FORMULAS
    assert not any(axes.title.get_parse_math() for axes in figure.axes)
    assert legend(figure.legends[0]) == CURVES
    assert figure.axes[0].get_ylabel() == "loss (nats), mean ± std of 3 seeds"
    for axes in figure.axes:
        *lines, ring = axes.lines
        for line, band, leaf in zip(lines, axes.collections, losses_of(arm), strict=True):
            mean, std = leaf.mean(axis=0), leaf.std(axis=0, ddof=1)
            np.testing.assert_allclose(line.get_xydata(), np.stack([[1, 2, 3, 4, 5], mean], axis=1))
            edges = band.get_paths()[0].vertices[:, 1]
            assert (edges.min(), edges.max()) == pytest.approx(((mean - std).min(), (mean + std).max()))
        assert len({line.get_linestyle() for line in lines}) == 3
        mean = arm.validation.loss.mean(axis=0)
        assert ring.get_xydata().tolist() == [[mean.argmin() + 1, mean.min()]]
        assert legend(axes.get_legend()) == [f"lowest validation loss: {mean.min():.3f}, epoch {mean.argmin() + 1}"]
        assert axes.get_xlabel() == "epoch"


@pytest.mark.parametrize("epochs", [1, 4, 7, 30, 33, 100])
def test_the_last_epoch_has_a_tick_and_panels_wrap(epochs):
    arms = {str(i): history(2, epochs) for i in range(5)}
    figure = plot.losses(arms)
    assert figure.axes[0].get_gridspec().get_geometry() == (2, 3)
    assert [axes.get_title() for axes in figure.axes if axes.axison] == list(arms)
    ticks = figure.axes[0].get_xticks().tolist()
    assert (ticks[0], ticks[-1]) == (1, epochs)
    assert len(ticks) <= 10


def test_the_tutorial_s_panels_stand_above_fair_ones(tmp_path):
    one, many = history(4), history(3, 4)
    one = one._replace(train=jax.tree.map(lambda leaf: leaf * np.nan, one.train))
    figure = plot.losses({"a": one, "b": one, "c": many, "d": many})
    plot.save(figure, tmp_path / "both.png", note="a machine, $5")
    assert figure.axes[0].get_gridspec().get_geometry() == (2, 2)
    assert [len(axes.lines) for axes in figure.axes] == [3, 3, 4, 4]
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["loss (nats)", "", "loss (nats), mean ± std of 3 seeds", ""]
    assert figure.get_suptitle() == "a machine, $5"
    sheet = plot.samples(np.zeros((4, 28, 28), np.uint8))
    plot.save(sheet, tmp_path / "sheet.png", note="a machine")
    assert sheet.get_suptitle() == ""  # It would lie over the images.


def test_overlay_draws_means_over_single_seeds():
    arms = {name: history(3, 5) for name in FORMULAS}
    arms[FORMULAS[1]].validation.loss[:, 1] = np.nan  # An epoch that was not evaluated.
    figure = plot.overlay(arms)
    assert legend(figure.legends[0]) == [name.replace("$", "\\$") for name in FORMULAS]
    for axes, values in zip(figure.axes, zip(*(arm.validation for arm in arms.values()), strict=True), strict=True):
        for i, runs in enumerate(values):
            *thin, mean = axes.lines[4 * i : 4 * i + 4]
            evaluated = ~np.isnan(runs).all(axis=0)
            np.testing.assert_allclose([line.get_ydata() for line in thin], runs[:, evaluated])
            np.testing.assert_allclose(
                mean.get_xydata().T, [np.flatnonzero(evaluated) + 1, runs.mean(axis=0)[evaluated]]
            )
        assert len({line.get_linestyle() for line in axes.lines[3::4]}) == len(arms)


def test_samples_has_a_row_for_each_class():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    figure = plot.samples(images, columns=2, labels=np.array([1, 0, 1, 1, 1]), class_names=FORMULAS)
    (axes,) = figure.axes
    sheet = axes.images[0].get_array()
    assert sheet.shape == (4, 4, 3)
    assert sheet[::2, ::2, 0].tolist() == [[1, 0], [0, 2]]
    assert [text.get_text() for text in axes.texts] == FORMULAS


@pytest.mark.parametrize("epochs", [1, 5])
def test_losses_of_one_run_have_no_band(epochs):
    (axes,) = plot.losses({"one": jax.tree.map(jnp.array, history(epochs))}).axes
    assert not axes.collections
    assert axes.get_ylabel() == "loss (nats)"
    assert [line.get_marker() for line in axes.lines[:3]] == 3 * ["o" if epochs == 1 else ""]


def test_losses_leaves_out_diverged_runs():
    arm = history(3, 5)
    stopped = jax.tree.map(np.copy, arm)
    for leaf in jax.tree.leaves(stopped):
        leaf[0, 2:] = np.nan
    left, right = plot.losses({"arm": stopped, "whole": arm}).axes
    assert (left.get_title(), right.get_title()) == ("arm (1 of 3 runs diverged)", "whole")
    for line, leaf in zip(left.lines, losses_of(arm), strict=False):
        np.testing.assert_allclose(line.get_ydata(), leaf[1:].mean(axis=0))
    # If none is left, all are drawn as far as they go.
    alone = jax.tree.map(lambda leaf: leaf[0], stopped)
    (axes,) = plot.losses({"alone": alone}).axes
    np.testing.assert_allclose(axes.lines[2].get_ydata()[:2], alone.validation.loss[:2])
    assert axes.get_title() == "alone (1 of 1 runs diverged)"


def test_losses_draws_the_reference_below():
    arm, reference = history(3, 5), history(2, 4)._replace(train=Metrics(*np.full((2, 2, 4), np.nan)))
    figure = plot.losses({"plain": arm, "dropped": arm}, reference={"plain": reference})
    left, right = figure.axes
    assert (len(left.lines), len(right.lines)) == (8, 4)
    for line, curve in zip(left.lines[3:7], [*reference.running_loss, *reference.validation.loss], strict=True):
        np.testing.assert_array_equal(line.get_ydata(), curve)
        assert line.get_zorder() < min(line.get_zorder() for line in left.lines[:3])
    assert legend(figure.legends[0])[3:] == ["reference, training loss (running)", "reference, validation loss"]


def test_classification_draws_ten_bars(splits):
    probabilities, spread = np.full(10, 0.02), np.full(10, 0.05)
    probabilities[3] = 0.97
    figure = plot.classification(splits.test.images[0], probabilities, class_names=NAMES, label=9, spread=spread)
    picture, bars = figure.axes
    np.testing.assert_array_equal(picture.images[0].get_array(), splits.test.images[0])
    assert (picture.get_title(), bars.get_title()) == ("label: j", "prediction: d")
    assert [bar.get_width() for bar in bars.patches] == probabilities.tolist()
    assert [bool(bar.get_hatch()) for bar in bars.patches] == 9 * [False] + [True]
    assert [text.get_text() for text in bars.texts] == [f"{share:.3f}" for share in probabilities]
    (lines,) = bars.containers[1].lines[2]
    ends = np.array(lines.get_segments())[:, :, 0]
    np.testing.assert_allclose(ends, np.stack([probabilities - spread, probabilities + spread], axis=1).clip(0, 1))
    assert not any(text.get_parse_math() for text in bars.get_yticklabels())
    figure.draw_without_rendering()
    plain = plot.classification(jnp.array(splits.test.images[0]), jnp.array(probabilities), class_names=NAMES)
    assert (plain.axes[0].get_title(), plain.axes[1].get_xlabel()) == ("", "probability")


def test_samples_are_laid_row_by_row(splits):
    images = splits.train.images[:7]
    sheet = plot.samples(images, columns=3).axes[0].images[0].get_array()
    assert sheet.shape == (84, 84)
    for i, image in enumerate(images):
        row, column = divmod(i, 3)
        np.testing.assert_array_equal(sheet[row * 28 :, column * 28 :][:28, :28], image)
    assert (sheet[56:, 28:] == 0).all()
    color = np.stack(3 * [images], axis=-1)
    assert plot.samples(color).axes[0].images[0].get_array().shape == (28, 840, 3)


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_the_suffix_names_the_format(tmp_path, suffix, start):
    figure = plot.samples(IMAGE[None])
    plot.save(figure, tmp_path / "new" / f"sheet{suffix}")
    assert (tmp_path / "new" / f"sheet{suffix}").read_bytes().startswith(start)
    for wrong in ("sheet.xyz", "sheet"):
        with pytest.raises(ValueError, match="supported"):
            plot.save(figure, tmp_path / wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_drawing_needs_no_pyplot_and_changes_no_setting():
    code = """
import io, sys
import numpy as np
import matplotlib
from fashion_jax import plot
names = set(matplotlib.rcParams) - {"backend"}  # Reading the backend loads pyplot.
before = {name: matplotlib.rcParams[name] for name in names}
plot.samples(np.zeros((9, 28, 28), np.uint8)).savefig(io.BytesIO())
assert {name: matplotlib.rcParams[name] for name in names} == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def classify(image=IMAGE, probabilities=HALVES, **more):
    return plot.classification(image, probabilities, class_names=["a", "b"], **more)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plot.losses({"arm": history(2, 3, 5)}), ValueError, r"arms\['arm'\] must have leaves \[epochs\] or"),
        (lambda: plot.losses({"arm": None}), TypeError, r"arms\['arm'\] must be a History, got NoneType"),
        (lambda: classify(IMAGE / 255), TypeError, "image must be uint8 pixels from 0 to 255, got float64"),
        (lambda: classify(probabilities=HALVES[None]), ValueError, r"probabilities must have shape \[2\] .* \[1, 2\]"),
        (lambda: classify(probabilities=np.log(HALVES)), ValueError, r"must lie in \[0, 1\], got -0.69.* undoes a log"),
        (lambda: classify(probabilities=np.array([np.nan, 1])), ValueError, r"must lie in \[0, 1\], got nan"),
        (lambda: plot.samples(IMAGE), ValueError, r"images must have shape \[n, height, width\]"),
        (lambda: plot.samples(IMAGE[None], columns=0), ValueError, "columns must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(call, error, message, unchecked):
    with pytest.raises(error, match=message):
        call()
