"""Every figure, as a matplotlib Figure that the caller saves (`save`) or shows.

The only module that imports matplotlib. It needs no display and leaves pyplot's global state alone. Curves differ in
line style and lightness as well as in hue, so that they survive grey printing.
"""

import io
import os
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fashion_jax.calibration import Reliability, Scores
from fashion_jax.data import check_pixels
from fashion_jax.evidence import Summary, check_history, interval
from fashion_jax.files import write_atomically
from fashion_jax.train import History

# A bin of a handful of examples tells nothing but its noise.
_FEWEST = 0.002
_CURVES = {
    "training, while training": ("running_loss", {"color": "#e8a33d", "linestyle": ":", "marker": "o"}),
    "training, evaluated": ("train", {"color": "#c4482e", "linestyle": "--", "marker": "^"}),
    "validation, evaluated": ("validation", {"color": "#123a6d", "linestyle": "-", "marker": "s"}),
}


def save(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 110) -> None:
    """Write a figure as a PNG file, as a whole or not at all.

    Args:
        figure: Any of this module's.
        path: Where to; an existing file is replaced.
        dpi: Pixels an inch.

    Raises:
        OSError: The file cannot be written; an existing one is as it was.

    >>> import tempfile
    >>> from pathlib import Path
    >>> path = Path(tempfile.mkdtemp()) / "sheet.png"
    >>> save(image_sheet(np.zeros((4, 28, 28), np.uint8), columns=2), path)
    >>> path.read_bytes()[1:4]
    b'PNG'
    """
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=dpi)
    write_atomically(path, png.getvalue())


def losses(arms: Mapping[str, History], *, reference: Mapping[str, History] | None = None) -> Figure:
    """Draw the losses of each arm against the epoch, one panel an arm, on one scale.

    Lines are means over runs and bands are +- one standard deviation. A ring marks the epoch with the lowest mean
    validation loss. Runs whose losses did not stay finite are left out, and the title says how many remain; if none
    does, all are drawn as far as they go.

    Args:
        arms: Title and History of each arm; leaves [epochs] for one run or [runs, epochs] for several.
        reference: Other runs to lay under those of the same title, as thin grey lines: the loss while training and the
            validation loss.

    Returns:
        The figure; the losses are in nats.

    Raises:
        TypeError: An arm is not a History.
        ValueError: There is no arm, or a leaf has other axes.

    >>> from fashion_jax.train import Metrics
    >>> curve = np.array([0.5, 0.4, 0.45])
    >>> history = History(curve, Metrics(curve, curve), Metrics(curve, curve))
    >>> [axes.get_title() for axes in losses({"no dropout": history}).axes]
    ['no dropout']
    """
    if not arms:
        raise ValueError("arms must hold at least one History, got none")
    for title, history in arms.items():
        check_history(history, f"arms[{title!r}]")
        shape = np.shape(history.running_loss)
        if len(shape) > 2:
            raise ValueError(f"arms[{title!r}] must have leaves [epochs] or [runs, epochs], got {list(shape)}")
    figure = Figure(figsize=(1 + 4.5 * len(arms), 4.2), layout="constrained")
    panels = figure.subplots(1, len(arms), sharey=True, squeeze=False)[0]
    counts = set()
    for axes, (title, history) in zip(panels, arms.items(), strict=True):
        if reference is not None and title in reference:
            _thin(axes, reference[title])
        validation = np.atleast_2d(history.validation.loss)
        finite = np.isfinite(validation).all(axis=1)
        drawn = finite if finite.any() else ~finite
        counts.add(int(drawn.sum()))
        for label, (field, style) in _CURVES.items():
            leaf = getattr(history, field)
            _curve(axes, np.atleast_2d(getattr(leaf, "loss", leaf))[drawn], label, style)
        _mark_best(axes, validation[drawn].mean(axis=0))
        axes.set_title(title if finite.all() else f"{title} (finite runs: {finite.sum()} of {finite.size})")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.margins(y=0.08)
        if np.shape(history.running_loss)[-1] == 1:
            axes.set_xlim(0, 2)
    of = f" of {max(counts)} runs" if len(counts) == 1 else ""
    panels[0].set_ylabel("loss (nats)" + (f", mean ± sd{of}" if max(counts) > 1 else ""))
    for axes in panels:
        axes.legend(fontsize=8)
    return figure


def classification(
    image: UInt8[Array | np.ndarray, "height width"],
    probabilities: Float[Array | np.ndarray, " classes"],
    *,
    class_names: Sequence[str],
    label: int | None = None,
    spread: Float[Array | np.ndarray, " classes"] | None = None,
) -> Figure:
    """Draw one image beside the probability of each class, as the tutorial does.

    Args:
        image: Grey pixels, 0 to 255.
        probabilities: What the model says, one number a class.
        class_names: Name of each class.
        label: The right class, if known; its bar is hatched.
        spread: Standard deviation of each probability, drawn as a line to both sides of the bar's end.

    Raises:
        TypeError: The image is not uint8.
        ValueError: There are not as many names, or spreads, as probabilities, `label` names no class, or a shape is
            wrong.

    >>> figure = classification(np.zeros((28, 28), np.uint8), np.array([0.1, 0.9]), class_names=["bag", "coat"])
    >>> [text.get_text() for text in figure.axes[1].get_yticklabels()]
    ['bag', 'coat']
    """
    image, probabilities = np.asarray(image), np.asarray(probabilities)
    check_pixels(image, "image")
    if image.ndim != 2:
        raise ValueError(f"image must have shape [height, width], got {list(image.shape)}")
    if probabilities.ndim != 1 or not len(probabilities):
        raise ValueError(f"probabilities must have shape [classes], got {list(probabilities.shape)}")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError(f"probabilities must lie in [0, 1], got {probabilities.min()} to {probabilities.max()}")
    if label is not None and not 0 <= label < len(probabilities):
        raise ValueError(f"label must lie in 0..{len(probabilities) - 1}, got {label}")
    if len(class_names) != len(probabilities):
        raise ValueError(f"class_names must name {len(probabilities)} classes, got {len(class_names)}")
    if spread is not None and len(spread) != len(probabilities):
        raise ValueError(f"spread must have {len(probabilities)} entries, got {len(spread)}")
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    left.imshow(image, cmap="gray", vmin=0, vmax=255)
    left.set_axis_off()
    if label is not None:
        left.set_title(f"label: {class_names[label]}", fontsize=10)
    bars = right.barh(range(len(class_names)), probabilities, color="#6f93c3", edgecolor="#123a6d")
    starts, ends = probabilities, probabilities
    if spread is not None:
        # A share lies between 0 and 1, whatever a standard deviation says.
        reach = np.stack([np.minimum(spread, probabilities), np.minimum(spread, 1 - probabilities)]).clip(0)
        right.errorbar(
            probabilities, range(len(class_names)), xerr=reach, fmt="none", ecolor="black", elinewidth=1, capsize=2.5
        )
        starts, ends = probabilities - reach[0], probabilities + reach[1]
    if label is not None:
        bars[label].set_hatch("///")
    for bar, probability, start, end in zip(bars, probabilities, starts, ends, strict=True):
        inside = end > 0.8 and start > 0.2
        right.annotate(
            f"{probability:.3f}",
            (start if inside else end, bar.get_y() + bar.get_height() / 2),
            xytext=(-3 if inside else 3, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize=7,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6} if inside else None,
        )
    right.set_yticks(range(len(class_names)), labels=class_names)
    right.invert_yaxis()
    right.set_xlim(0, 1)
    right.set_xlabel("probability" if spread is None else "probability, mean ± sd")
    best = int(probabilities.argmax())
    right.set_title(f"prediction: {class_names[best]}", fontsize=10)
    return figure


def image_sheet(images: UInt8[Array | np.ndarray, "n height width"], *, columns: int = 30) -> Figure:
    """Draw many images as one sheet, row by row, like the tutorial's 900.

    Args:
        images: Grey pixels, 0 to 255; the last row is filled up with black.
        columns: Images in a row.

    Raises:
        TypeError: The images are not uint8.
        ValueError: There is no image, or `columns` is below 1.

    >>> image_sheet(np.zeros((7, 28, 28), np.uint8), columns=3).axes[0].images[0].get_array().shape
    (84, 84)
    """
    images = np.asarray(images)
    check_pixels(images, "images")
    if images.ndim != 3 or not len(images):
        raise ValueError(f"images must have shape [n, height, width] with n at least 1, got {list(images.shape)}")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    n, height, width = images.shape
    rows = -(-n // columns)
    padded = np.pad(images, [(0, rows * columns - n), (0, 0), (0, 0)])
    sheet = padded.reshape(rows, columns, height, width).swapaxes(1, 2).reshape(rows * height, columns * width)
    scale = 8.4 / max(rows * height, columns * width)
    figure = Figure(figsize=(columns * width * scale, rows * height * scale))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=255)
    axes.set_axis_off()
    return figure


def study(summary: Summary, *, dropout_rates: Sequence[float], sizes: Sequence[int]) -> Figure:
    """Draw what rates do at several training-set sizes: final loss, gap and accuracy against the rate, and a map.

    Lines are means over seeds and bands are +- one standard deviation, one line a size. The map's cells tell how far a
    rate's final loss lies above the lowest of its size, which a star marks.

    Args:
        summary: From `evidence.summarise`; leaves [sizes, rates, seeds].
        dropout_rates: The rates, in any order; drawn in ascending order.
        sizes: Numbers of training examples; likewise.

    Raises:
        ValueError: A leaf has other axes.

    >>> from fashion_jax.evidence import summarise
    >>> from fashion_jax.train import Metrics
    >>> curves = np.linspace(0.4, 0.5, 12).reshape(2, 3, 1, 2)
    >>> summary = summarise(History(curves, Metrics(curves, curves), Metrics(curves, curves)))
    >>> len(study(summary, dropout_rates=[0.0, 0.2, 0.5], sizes=[1000, 5000]).axes)
    5
    """
    shape = (len(sizes), len(dropout_rates))
    if summary.final_loss.ndim != 3 or summary.final_loss.shape[:2] != shape:
        raise ValueError(
            f"the summary's leaves must have axes [sizes, rates, seeds] = {[*shape, 'any']}, "
            f"got {list(summary.final_loss.shape)}"
        )
    order = np.ix_(np.argsort(sizes), np.argsort(dropout_rates))
    summary = Summary._make(np.asarray(leaf)[order] for leaf in summary)
    sizes, dropout_rates = sorted(sizes), sorted(dropout_rates)
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(2, 2).flat
    quantities = {
        "final validation loss (nats)": summary.final_loss,
        "fair gap (nats)": summary.fair_gap,
        "final validation accuracy": summary.final_accuracy,
    }
    for label, values in quantities.items():
        axes = next(panels)
        for i, size in enumerate(sizes):
            # From light and small to dark and large, so that the order survives grey printing.
            colour = colormaps["viridis_r"](0.1 + 0.9 * i / max(1, len(sizes) - 1))
            mean = values[i].mean(axis=1)
            axes.plot(dropout_rates, mean, color=colour, marker="osD^vP"[i % 6], markersize=4, label=f"{size:,} images")
            if values.shape[2] > 1:
                sd = values[i].std(axis=1, ddof=1)
                axes.fill_between(dropout_rates, mean - sd, mean + sd, color=colour, alpha=0.2, linewidth=0)
        axes.set_xlabel("dropout rate")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)

    axes = next(panels)
    loss = summary.final_loss.mean(axis=2)
    above = loss - loss.min(axis=1, keepdims=True)
    cells = axes.imshow(above, cmap="Blues", aspect="auto", vmin=0)
    for i, j in np.ndindex(above.shape):
        dark = above[i, j] > 0.6 * above.max()
        text = "★" if j == loss[i].argmin() else f"+{above[i, j]:.2f}"
        axes.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    axes.set_xticks(range(len(dropout_rates)), labels=[f"{rate:g}" for rate in dropout_rates])
    axes.set_yticks(range(len(sizes)), labels=[f"{size:,}" for size in sizes])
    axes.set_xlabel("dropout rate")
    axes.set_ylabel("training images")
    axes.set_title("★ lowest final loss of its size", fontsize=10)
    figure.colorbar(cells, ax=axes, label="above the lowest (nats)")
    return figure


def reliability(arms: Mapping[str, Reliability]) -> Figure:
    """Draw accuracy against confidence, one panel an arm, and below how many examples have that confidence.

    Dots are means over seeds, with lines of +- one standard deviation; bins that some seed leaves empty, or that hold
    less than 0.2% of the examples, have none. On the diagonal a network is as often right as it says; below it, it is
    too sure.

    Args:
        arms: Title and reliability of each arm; leaves [bins] for one network or [seeds, bins] for several.

    Raises:
        ValueError: There is no arm.

    >>> curve = Reliability(np.array([0.3, 0.9]), np.array([0.2, 0.8]), np.array([0.4, 0.6]))
    >>> [axes.get_title() for axes in reliability({"plain": curve}).axes]
    ['plain', '']
    """
    if not arms:
        raise ValueError("arms must hold at least one Reliability, got none")
    figure = Figure(figsize=(1 + 3.4 * len(arms), 5), layout="constrained")
    panels = figure.subplots(2, len(arms), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1))
    for (above, below), (title, curve) in zip(panels.T, arms.items(), strict=True):
        confidence, accuracy, share = (np.atleast_2d(leaf) for leaf in curve)
        full = np.isfinite(accuracy).all(axis=0) & (share.mean(axis=0) >= _FEWEST)
        x, y = confidence[:, full].mean(axis=0), accuracy[:, full].mean(axis=0)
        above.plot([0, 1], [0, 1], color="#777777", linestyle="--", linewidth=1, label="as sure as right")
        sd = accuracy[:, full].std(axis=0, ddof=1) if len(accuracy) > 1 else None
        above.errorbar(x, y, yerr=sd, color="#123a6d", marker="o", markersize=4, capsize=2.5, label="measured")
        edges = np.linspace(0, 1, share.shape[1] + 1)
        below.bar(edges[:-1], share.mean(axis=0), np.diff(edges), align="edge", color="#9db8d9", edgecolor="#123a6d")
        above.set_title(title)
        below.set_xlabel("confidence")
        for axes in (above, below):
            axes.grid(alpha=0.3)
    panels[0, 0].set_xlim(0, 1)
    panels[0, 0].set_ylim(0, 1)
    seeds = len(np.atleast_2d(next(iter(arms.values())).share))
    panels[0, 0].set_ylabel("accuracy" + (f", mean ± sd of {seeds} seeds" if seeds > 1 else ""))
    panels[1, 0].set_ylabel("share of\nexamples")
    panels[0, 0].legend(loc="upper left")
    return figure


def entropies(parts: Mapping[str, Mapping[str, Float[np.ndarray, "*runs n"]]]) -> Figure:
    """Draw how the entropy of predictions is distributed, one panel a set of images, one line an arm.

    A line tells which share of the images has at most that entropy: the further right, the less sure.

    Args:
        parts: Title of each set of images; for each arm's name the entropies in nats, of all seeds together.

    Raises:
        ValueError: There is no set of images, or two have other arms.

    >>> figure = entropies({"test set": {"plain": np.array([0.1, 0.2])}, "noise": {"plain": np.array([2.0, 2.1])}})
    >>> [axes.get_title() for axes in figure.axes]
    ['test set', 'noise']
    """
    if not parts:
        raise ValueError("parts must hold at least one set of images, got none")
    figure = Figure(figsize=(1 + 2.9 * len(parts), 3.6), layout="constrained")
    panels = figure.subplots(1, len(parts), sharex=True, sharey=True, squeeze=False)[0]
    colours, lines = ("#e8a33d", "#c4482e", "#123a6d", "#4a4a4a"), ((":", 2.2), ("--", 1.6), ("-", 1.6), ("-.", 1.6))
    names = _shared_names(parts, "parts")
    for axes, (title, arms) in zip(panels, parts.items(), strict=True):
        for i, name in enumerate(names):
            # After the last colour the first comes again, with another line.
            line, width = lines[(i + i // len(colours)) % len(lines)]
            colour = colours[i % len(colours)]
            axes.ecdf(np.ravel(arms[name]), label=name, color=colour, linestyle=line, linewidth=width)
        axes.set_title(title)
        axes.set_xlabel("entropy (nats)")
        axes.grid(alpha=0.3)
    # That of ten equal probabilities, unless there are more classes.
    panels[0].set_xlim(0, max(np.log(10), *(np.max(values) for arms in parts.values() for values in arms.values())))
    panels[0].set_ylabel("share of images\nwith at most this entropy")
    panels[0].legend(loc="lower right", fontsize=8)
    return figure


def confusion(arms: Mapping[str, Int[np.ndarray, "classes classes"]], *, class_names: Sequence[str]) -> Figure:
    """Draw which class is taken for which, in percent of the label's examples, one panel an arm.

    Args:
        arms: Title and counts [label, predicted class] of each arm, of one seed or summed over several.
        class_names: Name of each class.

    Raises:
        ValueError: There is no arm, or a matrix has other axes.

    >>> confusion({"plain": np.array([[9, 1], [2, 8]])}, class_names=["bag", "coat"]).axes[0].texts[1].get_text()
    '10'
    """
    if not arms:
        raise ValueError("arms must hold at least one matrix, got none")
    size = len(class_names)
    figure = Figure(figsize=(1.6 + 4.2 * len(arms), 5), layout="constrained")
    panels = figure.subplots(1, len(arms), sharey=True, squeeze=False)[0]
    for axes, (title, counts) in zip(panels, arms.items(), strict=True):
        if counts.shape != (size, size):
            raise ValueError(f"a matrix must have shape [{size}, {size}], as class_names has, got {list(counts.shape)}")
        percent = 100 * counts / counts.sum(axis=1, keepdims=True).clip(1)
        axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
        for i, j in np.ndindex(percent.shape):
            if percent[i, j] > 0.5:
                colour = "white" if percent[i, j] > 60 else "black"
                axes.text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(size), labels=class_names, rotation=90, fontsize=8)
        axes.set_yticks(range(size), labels=class_names, fontsize=8)
        axes.set_title(title)
        axes.set_xlabel("predicted class")
    panels[0].set_ylabel("label (percent of its examples)")
    return figure


def rivals(situations: Mapping[str, Mapping[str, Scores]], *, measures: Mapping[str, str]) -> Figure:
    """Draw what rivals reach: one row of panels a situation, one panel a measure, one line a rival.

    Dots are means over seeds, bars their 95% intervals, and the rings single seeds. The dashed line is the first rival.
    Red and square is what has "dropout" in its name, but for "no dropout".

    Args:
        situations: Title of each row; in it, name and scores of each rival, leaves [seeds]. All rows have the same
            rivals, and the order of the first.
        measures: Field of `Scores` and label of each column.

    Raises:
        ValueError: There is no situation or no rival, or two rows have other rivals.

    >>> scores = Scores(*np.full((4, 3), 0.5), *np.zeros((2, 3, 10)), np.zeros((3, 10, 10), int))
    >>> figure = rivals({"60,000 images": {"nothing": scores, "dropout": scores}}, measures={"accuracy": "accuracy"})
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['nothing', 'dropout']
    """
    if not situations or not all(situations.values()):
        raise ValueError("situations must hold at least one rival each, got none")
    names = _shared_names(situations, "situations")
    height = 0.7 + 0.28 * len(names)
    figure = Figure(figsize=(11, height * len(situations) + 0.3), layout="constrained")
    grid = figure.subplots(len(situations), len(measures), sharey=True, squeeze=False)
    for row, (title, of_rivals) in zip(grid, situations.items(), strict=True):
        for axes, (field, label) in zip(row, measures.items(), strict=True):
            for i, name in enumerate(names):
                values = np.asarray(getattr(of_rivals[name], field), np.float64)
                measured = interval(values)
                colour, marker = ("#c4482e", "s") if re.search("(?<!no )dropout", name) else ("#123a6d", "o")
                axes.plot(values, np.full(len(values), i), "o", color=colour, markersize=4, fillstyle="none", alpha=0.5)
                axes.plot([measured.low, measured.high], [i, i], color=colour, linewidth=2)
                axes.plot(measured.mean, i, marker, color=colour, markersize=6)
                if i == 0:
                    axes.axvline(measured.mean, color="grey", linestyle="--", linewidth=1)
            axes.set_xlabel(label)
            axes.grid(axis="x", alpha=0.3)
            axes.set_yticks(range(len(names)), labels=names)
            axes.xaxis.set_major_locator(MaxNLocator(4))
        row[0].set_title(title, loc="left", fontsize=10)
    # The rows share one vertical axis, on which the first rival is on top.
    grid[0, 0].set_ylim(len(names) - 0.5, -0.5)
    meanings = [
        Line2D([], [], color="black", linestyle="", marker="o", markersize=4, fillstyle="none", label="one seed"),
        Line2D([], [], color="black", linewidth=2, marker="o", markersize=6, label="mean and 95% interval"),
        Line2D([], [], color="grey", linestyle="--", linewidth=1, label=f"mean of {names[0]}"),
    ]
    figure.legend(handles=meanings, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _shared_names(rows: Mapping[str, Mapping[str, object]], argument: str) -> list[str]:
    """Give the names that each row has, in the order of the first row, as one legend is for all."""
    names = list(next(iter(rows.values())))
    for title, row in rows.items():
        if row.keys() != set(names):
            raise ValueError(f"{argument}[{title!r}] must have the names of the first, {names}; got {list(row)}")
    return names


def _curve(axes: Axes, runs: np.ndarray, label: str, style: dict) -> None:
    runs = np.asarray(runs, np.float64)
    epochs = np.arange(1, runs.shape[1] + 1)
    mean = runs.mean(axis=0)
    # A line through one point cannot be seen.
    style = {**style, "marker": style["marker"] if len(mean) == 1 else ""}
    axes.plot(epochs, mean, label=label, linewidth=1.6, markersize=5, **style)
    if len(runs) > 1:
        sd = runs.std(axis=0, ddof=1)
        axes.fill_between(epochs, mean - sd, mean + sd, color=style["color"], alpha=0.25, linewidth=0)


def _thin(axes: Axes, history: History) -> None:
    for i, curves in enumerate((history.running_loss, history.validation.loss)):
        curves = np.atleast_2d(curves)
        epochs = np.arange(1, curves.shape[1] + 1)
        lines = axes.plot(epochs, curves.T, color="#777777", linewidth=0.8, linestyle=":" if i == 0 else "-")
        lines[0].set_label(f"PyTorch reference runs, {'while training' if i == 0 else 'validation'}")


def _mark_best(axes: Axes, mean) -> None:
    if not np.isfinite(mean).any():
        return
    best = int(np.nanargmin(mean))
    # In the legend, because beside the ring there are curves.
    label = f"lowest validation: {mean[best]:.3f}, epoch {best + 1}"
    ring = {"marker": "o", "markersize": 9, "fillstyle": "none", "markeredgewidth": 1.8, "linestyle": ""}
    axes.plot(best + 1, mean[best], color="black", zorder=3, label=label, **ring)
