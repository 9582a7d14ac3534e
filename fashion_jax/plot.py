"""Every figure, as a matplotlib Figure that the caller saves or shows.

The only module that imports matplotlib. It needs no display and leaves pyplot's global state alone. Curves differ in
line style and lightness as well as in hue, so that they survive grey printing.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Array, Float, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fashion_jax.evidence import Summary, check_history
from fashion_jax.train import History

_CURVES = {
    "training, while training": ("running_loss", {"color": "#e8a33d", "linestyle": ":"}),
    "training, evaluated": ("train", {"color": "#c4482e", "linestyle": "--"}),
    "validation, evaluated": ("validation", {"color": "#123a6d", "linestyle": "-"}),
}


def losses(arms: Mapping[str, History], *, reference: Mapping[str, History] | None = None) -> Figure:
    """Draw the losses of each arm against the epoch, one panel an arm, on one scale.

    Lines are means over runs and bands are +- one standard deviation. A dot marks the epoch with the lowest mean
    validation loss.

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
    figure = Figure(figsize=(1 + 4.5 * len(arms), 4.2), layout="constrained")
    panels = figure.subplots(1, len(arms), sharey=True, squeeze=False)[0]
    for axes, (title, history) in zip(panels, arms.items(), strict=True):
        if reference is not None and title in reference:
            _thin(axes, reference[title])
        for label, (field, style) in _CURVES.items():
            leaf = getattr(history, field)
            _curve(axes, getattr(leaf, "loss", leaf), label, style)
        _mark_best(axes, np.atleast_2d(history.validation.loss).mean(axis=0))
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    runs = len(np.atleast_2d(next(iter(arms.values())).running_loss))
    panels[0].set_ylabel("loss (nats)" + (f", mean ± sd of {runs} runs" if runs > 1 else ""))
    panels[-1].legend()
    return figure


def classification(
    image: UInt8[Array | np.ndarray, "height width"],
    probabilities: Float[Array | np.ndarray, " classes"],
    *,
    class_names: Sequence[str],
    label: int | None = None,
) -> Figure:
    """Draw one image beside the probability of each class, as the tutorial does.

    Args:
        image: Grey pixels, 0 to 255.
        probabilities: What the model says, one number a class.
        class_names: Name of each class.
        label: The right class, if known; its bar is hatched.

    Raises:
        TypeError: The image is not uint8.
        ValueError: There are not as many names as probabilities, `label` names no class, or a shape is wrong.

    >>> figure = classification(np.zeros((28, 28), np.uint8), np.array([0.1, 0.9]), class_names=["bag", "coat"])
    >>> [text.get_text() for text in figure.axes[1].get_yticklabels()]
    ['bag', 'coat']
    """
    image, probabilities = np.asarray(image), np.asarray(probabilities)
    _check_pixels(image, "image")
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
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    left.imshow(image, cmap="gray", vmin=0, vmax=255)
    left.set_axis_off()
    if label is not None:
        left.set_title(f"label: {class_names[label]}", fontsize=10)
    bars = right.barh(range(len(class_names)), probabilities, color="#6f93c3", edgecolor="#123a6d")
    if label is not None:
        bars[label].set_hatch("///")
    for bar, probability in zip(bars, probabilities, strict=True):
        inside = probability > 0.8
        right.annotate(
            f"{probability:.3f}",
            (bar.get_width(), bar.get_y() + bar.get_height() / 2),
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
    right.set_xlabel("probability")
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
    _check_pixels(images, "images")
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
        dropout_rates: The rates.
        sizes: Numbers of training examples.

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


def _check_pixels(images: np.ndarray, name: str) -> None:
    # Scaled to [0, 1], they would be drawn as black.
    if images.dtype != np.uint8:
        raise TypeError(f"{name} must be uint8 pixels from 0 to 255, got {images.dtype}")


def _curve(axes: Axes, values, label: str, style: dict) -> None:
    runs = np.atleast_2d(np.asarray(values, np.float64))
    if runs.ndim != 2 or not runs.size:
        raise ValueError(f"a History's leaves must have axes [epochs] or [runs, epochs], got {list(np.shape(values))}")
    epochs = np.arange(1, runs.shape[1] + 1)
    mean = runs.mean(axis=0)
    axes.plot(epochs, mean, label=label, linewidth=1.6, **style)
    if len(runs) > 1:
        sd = runs.std(axis=0, ddof=1)
        axes.fill_between(epochs, mean - sd, mean + sd, color=style["color"], alpha=0.25, linewidth=0)


def _thin(axes: Axes, history: History) -> None:
    for i, curves in enumerate((history.running_loss, history.validation.loss)):
        curves = np.atleast_2d(curves)
        epochs = np.arange(1, curves.shape[1] + 1)
        lines = axes.plot(epochs, curves.T, color="#777777", linewidth=0.8, linestyle=":" if i == 0 else "-")
        if i == 1:
            lines[0].set_label("PyTorch reference runs")


def _mark_best(axes: Axes, mean) -> None:
    best = int(mean.argmin())
    side = "left" if best < len(mean) / 3 else "right" if best >= len(mean) * 2 / 3 else "center"
    axes.plot(best + 1, mean[best], "o", color="black", markersize=6, zorder=3)
    axes.annotate(
        f"lowest: {mean[best]:.3f}, epoch {best + 1}",
        (best + 1, mean[best]),
        xytext=(0, -22),
        textcoords="offset points",
        ha=side,
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )
