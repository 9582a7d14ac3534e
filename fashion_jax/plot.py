"""The tutorial's figures, as matplotlib Figures to save (`save`) or to show.

Nothing here touches pyplot: there is no global state, and no display is needed. Curves differ in line style and
lightness as well as in hue, for gray printing. Marks take the text color of the matplotlib style, so that they stay
visible on dark backgrounds. Titles and names are literal: `$` starts no formula.
"""

import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from fashion_jax import _checks, files
from fashion_jax.statistics import Interval, Verdict
from fashion_jax.types import History

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

# Colors of middle lightness, which contrast with white and with black.
_BLUE = "#3b78c2"
_CURVES: dict[str, dict[str, Any]] = {
    "training loss (running)": {"color": "#d98c1f", "linestyle": ":", "linewidth": 2.2},
    "training loss (eval mode)": {"color": "#d1443c", "linestyle": "--", "linewidth": 1.6},
    "validation loss": {"color": _BLUE, "linestyle": "-", "linewidth": 2},
}
# Arms in one panel differ in lightness and dashes, too.
_ARMS = (_BLUE, "#d1443c", "#d98c1f", "#2f8f6b", "#7d5ba6")
_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))


def losses(
    arms: Mapping[str, History], *, reference: Mapping[str, History] | None = None
) -> "matplotlib.figure.Figure":
    """Draw the losses of each arm against the epoch, one panel per arm, up to three in a row, on one scale.

    Lines are means over seeds, bands ± one standard deviation. A ring marks the epoch with the lowest mean validation
    loss. Diverged runs are left out, and the title says so. So is a curve without values.

    Args:
        arms: Title and history of each arm; leaves [epochs] or [seeds, epochs].
        reference: Other runs to draw under the arm of the same title, as thin gray lines.

    Raises:
        TypeError: An arm is not a History.
        ValueError: Leaves have other axes.

    >>> from fashion_jax.types import Metrics
    >>> curve = np.array([0.5, 0.4, 0.45])
    >>> figure = losses({"no dropout": History(curve, Metrics(curve, curve), Metrics(curve, curve))})
    >>> [axes.get_title() for axes in figure.axes]
    ['no dropout']
    """
    figure, grid = _panels(len(arms), (4.5, 4.0), margins=(1.0, 0.6), sharey=True)
    columns, handles = grid.shape[1], {}
    for i, (axes, (title, history)) in enumerate(zip(grid.flat, arms.items(), strict=False)):
        curves = _losses(f"arms[{title!r}]", history)
        diverged = ~np.isfinite(curves[0]).all(axis=1)
        note = f" ({diverged.sum()} of {diverged.size} runs diverged)" if diverged.any() else ""
        drawn = curves if diverged.all() else curves[:, ~diverged]
        for label, curve in zip(_CURVES, drawn, strict=True):
            if not np.isnan(curve).all():
                handles[label] = _band(axes, curve, _CURVES[label])
        if reference and title in reference:
            handles |= _thin(axes, _losses(f"reference[{title!r}]", reference[title]))
        _ring(axes, drawn[2].mean(axis=0))
        axes.set_title(title + note, parse_math=False)
        _epoch_axis(axes, curves.shape[2])
        if i % columns == 0:
            axes.set_ylabel("loss (nats)" + (f", mean ± std of {diverged.size} seeds" if diverged.size > 1 else ""))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=1 + min(2, columns), frameon=False)
    return figure


def overlay(arms: Mapping[str, History]) -> "matplotlib.figure.Figure":
    """Draw validation loss and accuracy of all arms, as for `losses`, in one panel each; thin lines are single seeds.

    >>> from fashion_jax.types import Metrics
    >>> curve = np.array([0.5, 0.4, 0.45])
    >>> figure = overlay({"no dropout": History(curve, Metrics(curve, curve), Metrics(curve, 1 - curve))})
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['validation loss (nats)', 'accuracy']
    """
    from matplotlib.figure import Figure

    figure, lines = Figure(figsize=(10, 4.6), layout="constrained"), {}
    panels = dict(zip(("validation loss (nats)", "accuracy"), figure.subplots(1, 2), strict=True))
    for i, (title, history) in enumerate(arms.items()):
        style = {"color": _ARMS[i % len(_ARMS)], "linestyle": _DASHES[i % len(_DASHES)]}
        metrics = _checks.history(f"arms[{title!r}]", history, must_be_finite=False).validation
        for (label, axes), values in zip(panels.items(), (metrics.loss, metrics.accuracy), strict=True):
            runs = np.reshape(values, (-1, np.shape(values)[-1]))
            evaluated = np.flatnonzero(~np.isnan(runs).all(axis=0))
            axes.plot(evaluated + 1, runs[:, evaluated].T, color=style["color"], linewidth=0.4, alpha=0.4)
            (lines[title],) = axes.plot(evaluated + 1, np.nanmean(runs[:, evaluated], axis=0), linewidth=2.4, **style)
            axes.set_ylabel(label)
            _epoch_axis(axes, runs.shape[1])
    names = [title.replace("$", r"\$") for title in lines]
    figure.legend(lines.values(), names, loc="outside lower center", ncols=min(5, len(arms)), frameon=False)
    return figure


def intervals(panels: Mapping[str, Mapping[str, Interval]]) -> "matplotlib.figure.Figure":
    """Draw means with their 95% intervals, one panel per quantity, three in a row.

    Args:
        panels: Label of each quantity, and its interval by name; the names are the same in every panel.

    >>> from fashion_jax.statistics import interval
    >>> figure = intervals({"accuracy": {"dropout": interval(np.array([0.88, 0.89, 0.9]))}})
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
    ['dropout']
    """
    size = 3.0, 1 + 0.25 * max(map(len, panels.values()))
    figure, grid = _panels(len(panels), size, margins=(2.0, 0.0), sharey="row")
    for axes, (label, measured) in zip(grid.flat, panels.items(), strict=False):
        means, places = np.array([value.mean for value in measured.values()]), range(len(measured))
        bars = [(value.mean - value.low, value.high - value.mean) for value in measured.values()]
        axes.errorbar(means, places, xerr=np.transpose(bars), fmt="o", color=_BLUE, capsize=3)
        axes.set_yticks(places, measured, parse_math=False)
        axes.set(xlabel=label, ylim=(len(measured) - 0.5, -0.5))
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", alpha=0.3)
    return figure


def claims(verdicts: Sequence[Verdict]) -> "matplotlib.figure.Figure":
    """Draw each claim with its answer and its 95% interval, losses above accuracies.

    The gray band is the margin within which a difference is negligible, the dotted line where a claim begins to hold.

    >>> from fashion_jax.statistics import compare
    >>> figure = claims([compare("it helps", np.array([0.9, 0.91]), np.array([0.8, 0.82]), quantity="final accuracy")])
    >>> figure.axes[0].get_yticklabels()[0].get_text()
    'it helps: supported'
    """
    from matplotlib.figure import Figure

    of_accuracy = [verdict for verdict in verdicts if "accuracy" in verdict.quantity]
    of_loss = [verdict for verdict in verdicts if verdict not in of_accuracy]
    panels = {name: part for name, part in {"nats": of_loss, "accuracy": of_accuracy}.items() if part}
    figure = Figure(figsize=(9, 1 + 0.4 * len(verdicts) + 0.6 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=[1 + len(part) for part in panels.values()])
    for axes, (unit, part) in zip(grid.flat, panels.items(), strict=True):
        for place, verdict in enumerate(part):
            mean, low, high, *_ = verdict.interval
            band = {"color": "#999999", "alpha": 0.3, "linewidth": 0}
            axes.fill_betweenx([place - 0.4, place + 0.4], -verdict.margin, verdict.margin, **band)
            axes.plot(2 * [verdict.threshold], [place - 0.4, place + 0.4], ":", color="#888888", linewidth=1.5)
            axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=_BLUE, capsize=4)
        axes.set_yticks(range(len(part)), [f"{one.claim}: {one.answer}" for one in part], parse_math=False)
        axes.set(ylim=(len(part) - 0.5, -0.5), xlabel=f"mean and 95% interval over seeds ({unit})")
        axes.locator_params(axis="x", nbins=6)
        axes.grid(axis="x", alpha=0.3)
    return figure


def classification(
    image: UInt8[Array | np.ndarray, "height width *channels"],
    probabilities: Float[Array | np.ndarray, " classes"],
    *,
    class_names: Sequence[str],
    label: int | None = None,
    spread: Float[Array | np.ndarray, " classes"] | None = None,
) -> "matplotlib.figure.Figure":
    """Draw one image beside the probability of each class, as horizontal bars.

    Args:
        image: Pixels, 0 to 255.
        probabilities: The prediction, one number per class.
        class_names: Name of each class.
        label: The right class, if known; its bar is hatched.
        spread: Standard deviation of each probability, drawn as an error bar.

    Raises:
        TypeError: The image is not uint8.
        ValueError: Probabilities lie outside [0, 1], or there is not one (and one spread) for each name.

    >>> figure = classification(np.zeros((28, 28), np.uint8), np.array([0.1, 0.9]), class_names=["bag", "coat"])
    >>> [text.get_text() for text in figure.axes[1].get_yticklabels()]
    ['bag', 'coat']
    """
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    image, shares = _checks.pixels("image", image), np.asarray(probabilities)
    for name, values in {"probabilities": shares, "spread": shares if spread is None else np.asarray(spread)}.items():
        if values.shape != (len(class_names),):
            raise ValueError(f"{name} must have shape [{len(class_names)}] like class_names, got {list(values.shape)}")
    if not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(f"probabilities must lie in [0, 1], got {shares.min()} to {shares.max()}; np.exp undoes a log")
    figure = Figure(figsize=(7, max(3.2, 0.2 * len(class_names))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    left.imshow(image, cmap="gray", vmin=0, vmax=255)
    left.set_axis_off()
    rows, ink = range(len(class_names)), rcParams["text.color"]
    bars = right.barh(rows, shares, color="#6f93c3", edgecolor=ink, linewidth=0.8)
    if label is not None:
        left.set_title(f"label: {class_names[label]}", fontsize=10, parse_math=False)
        bars[label].set_hatch("///")
    if spread is not None:
        # The bar stays within [0, 1], where probabilities lie.
        around = [np.minimum(spread, shares), np.minimum(spread, 1 - shares)]
        right.errorbar(shares, rows, xerr=around, fmt="none", ecolor=ink, elinewidth=1.2, capsize=2.5)
    for row, share in zip(rows, shares, strict=True):
        right.text(1.02, row, f"{share:.3f}", transform=right.get_yaxis_transform(), va="center", fontsize=8)
    right.set_yticks(rows, labels=class_names, parse_math=False)
    right.invert_yaxis()
    right.set(xlim=(0, 1), xlabel="probability" if spread is None else "probability, mean ± std")
    right.set_title(f"prediction: {class_names[int(shares.argmax())]}", fontsize=10, parse_math=False)
    return figure


def samples(
    images: UInt8[Array | np.ndarray, "n height width *channels"],
    *,
    columns: int = 30,
    labels: Int[Array | np.ndarray, " n"] | None = None,
    class_names: Sequence[str] = (),
) -> "matplotlib.figure.Figure":
    """Draw many images as one sheet, row by row; 900 make the tutorial's. With labels, each row has a class.

    Args:
        images: Pixels, 0 to 255, gray or RGB; the last row is filled up with black.
        columns: Images per row.
        labels: Class of each image; of each class the first images are drawn.
        class_names: Name of each class, if labels are given.

    Raises:
        TypeError: The images are not uint8.
        ValueError: There is no image, or `columns` is below 1.

    >>> samples(np.zeros((7, 28, 28), np.uint8), columns=3).axes[0].images[0].get_array().shape
    (84, 84)
    """
    from matplotlib.figure import Figure

    images, columns = _checks.pixels("images", images), _checks.integer("columns", columns, 1)
    if images.ndim < 3 or not len(images):
        raise ValueError(f"images must have shape [n, height, width] and not be empty, got {list(images.shape)}")
    classes = range(len(class_names)) if labels is not None else ()
    parts = [images[np.asarray(labels) == label][:columns] for label in classes] or [images]
    sheet = np.concatenate([_rows(part, columns) for part in parts])
    scale, margin = 8.4 / max(sheet.shape[:2]), 0.0 if labels is None else 1.2
    width = margin + sheet.shape[1] * scale
    figure = Figure(figsize=(width, sheet.shape[0] * scale))
    axes = figure.add_axes((margin / width, 0, 1 - margin / width, 1))
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=255)
    axes.set_axis_off()
    for row, name in zip(classes, class_names, strict=False):
        axes.text(-5, (row + 0.5) * images.shape[1], name, ha="right", va="center", parse_math=False)
    return figure


def save(figure: "matplotlib.figure.Figure", path: str | os.PathLike[str], *, dpi: int = 150, note: str = "") -> None:
    """Write a figure as a file whose suffix names the format, such as .png, .pdf or .svg.

    Args:
        figure: Any matplotlib Figure.
        path: Where to; an existing file is replaced.
        dpi: Pixels per inch.
        note: Small text above the figure, such as `report.machine`; a sheet of `samples` has no room for it.

    Raises:
        ValueError: The suffix names no format.
        OSError: The file cannot be written; an existing one is left as it was.

    >>> import tempfile
    >>> from pathlib import Path
    >>> path = Path(tempfile.mkdtemp()) / "sheet.png"
    >>> save(samples(np.zeros((4, 28, 28), np.uint8), columns=2), path)
    >>> path.read_bytes()[1:4]
    b'PNG'
    """
    target = _checks.path("path", path)
    content = io.BytesIO()
    if note and figure.get_layout_engine():
        figure.suptitle(note, fontsize=7, x=0.99, horizontalalignment="right", alpha=0.7, parse_math=False)
    figure.savefig(content, format=target.suffix[1:], dpi=dpi)
    files.write(target, content.getvalue())


def _panels(count: int, size: tuple[float, float], *, margins: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """Return a figure, and its panels as an array, up to three in a row."""
    from matplotlib.figure import Figure

    rows = -(-count // 3)
    columns = -(-count // rows)
    figure = Figure(figsize=tuple(np.add(margins, np.multiply(size, (columns, rows)))), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    return figure, grid


def _rows(images: UInt8[np.ndarray, "n height width *channels"], columns: int) -> UInt8[np.ndarray, "..."]:
    _, height, width, *channels = images.shape
    filled = np.pad(images, [(0, -len(images) % columns), *[(0, 0)] * (images.ndim - 1)])
    return filled.reshape(-1, columns, height, width, *channels).swapaxes(1, 2).reshape(-1, columns * width, *channels)


def _losses(name: str, history: History) -> Float[np.ndarray, "3 seeds epochs"]:
    history = _checks.history(name, history, must_be_finite=False)
    curves = np.stack([history.running_loss, history.train.loss, history.validation.loss])
    if curves.ndim > 3:
        raise ValueError(f"{name} must have leaves [epochs] or [seeds, epochs], got {list(curves.shape[1:])}")
    return curves.reshape(3, -1, curves.shape[-1])


def _epoch_axis(axes: "matplotlib.axes.Axes", epochs: int) -> None:
    """Count epochs from 1 to the last one, which has a tick."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, epochs) if epochs <= 8 * step)
    axes.set_xticks(sorted({1, epochs, *range(step, epochs - step // 2, step)} if step > 1 else range(1, epochs + 1)))
    axes.set(xlabel="epoch", xlim=(0, epochs + 1))
    axes.grid(alpha=0.3)


def _band(axes: "matplotlib.axes.Axes", runs: Float[np.ndarray, "seeds epochs"], style: dict[str, Any]) -> Any:
    # Not every epoch ends with an evaluation.
    evaluated = np.flatnonzero(~np.isnan(runs).all(axis=0))
    runs, epochs = runs[:, evaluated], evaluated + 1
    mean = runs.mean(axis=0)
    if len(runs) > 1:
        std = runs.std(axis=0, ddof=1)
        axes.fill_between(epochs, mean - std, mean + std, color=style["color"], alpha=0.25, linewidth=0)
    # A line through one point is invisible.
    return axes.plot(epochs, mean, marker="o" if len(mean) == 1 else "", **style)[0]


def _thin(axes: "matplotlib.axes.Axes", curves: Float[np.ndarray, "3 seeds epochs"]) -> dict[str, Any]:
    epochs = np.arange(1, curves.shape[2] + 1)
    style = {"color": "#888888", "linewidth": 0.8, "zorder": 1.5}
    running = axes.plot(epochs, curves[0].T, linestyle=":", **style)
    validation = axes.plot(epochs, curves[2].T, **style)
    return {"reference, training loss (running)": running[0], "reference, validation loss": validation[0]}


def _ring(axes: "matplotlib.axes.Axes", mean: Float[np.ndarray, " epochs"]) -> None:
    from matplotlib import rcParams

    if np.isfinite(mean).any():
        best = int(np.nanargmin(mean))
        shape = {"marker": "o", "markersize": 9, "fillstyle": "none", "markeredgewidth": 1.8, "linestyle": ""}
        label = f"lowest validation loss: {mean[best]:.3f}, epoch {best + 1}"
        axes.plot(best + 1, mean[best], color=rcParams["text.color"], zorder=3, label=label, **shape)
        axes.legend(fontsize=9)
