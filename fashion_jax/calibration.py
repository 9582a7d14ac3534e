"""How good probabilities are, and whether they know what they do not know.

Pure functions of probabilities and labels. The only module that imports scikit-learn, and does so where it is used.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int
from scipy.special import entr

from fashion_jax.config import check_count

BINS = 15
# What `predict` cannot tell from 0: a loss of 87.3 nats.
LEAST = float(np.finfo(np.float32).tiny)


class Scores(NamedTuple):
    """What one network's probabilities are worth; stacked over seeds, each leaf gets an axis in front.

    Attributes:
        accuracy: Share of examples whose most probable class is right.
        loss: Mean negative log likelihood, in nats; of no example more than 87.3.
        brier: Mean squared distance between the probabilities and the truth, summed over the classes, 0 to 2.
        calibration_error: Expected calibration error: how far confidence and accuracy are apart, on average over bins.
        precision: Of what was called this class, the share that is; 0 where nothing was.
        recall: Of what is this class, the share that was called so.
        confusion: Number of examples, [label, predicted class].
    """

    accuracy: Float[np.ndarray, "*seeds"]
    loss: Float[np.ndarray, "*seeds"]
    brier: Float[np.ndarray, "*seeds"]
    calibration_error: Float[np.ndarray, "*seeds"]
    precision: Float[np.ndarray, "*seeds classes"]
    recall: Float[np.ndarray, "*seeds classes"]
    confusion: Int[np.ndarray, "*seeds classes classes"]


class Reliability(NamedTuple):
    """Confidence against accuracy, in bins of equal width; NaN in bins without an example.

    Attributes:
        confidence: Mean probability of the most probable class.
        accuracy: Share of examples for which that class is right.
        share: Share of all examples that is in the bin.
    """

    confidence: Float[np.ndarray, "*seeds bins"]
    accuracy: Float[np.ndarray, "*seeds bins"]
    share: Float[np.ndarray, "*seeds bins"]


def score(probabilities: Float[Array | np.ndarray, "n classes"], labels: Int[Array | np.ndarray, " n"]) -> Scores:
    """Compare probabilities with the truth.

    Args:
        probabilities: One row an example.
        labels: Index of the right class.

    Raises:
        ValueError: Shapes do not fit, there is no example, a row is not a distribution, or a label names no class.

    Source: Brier, "Verification of Forecasts Expressed in Terms of Probability", 1950, and for the calibration error
    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017; all but that error and the loss as
    scikit-learn has them.

    >>> scores = score(np.array([[0.8, 0.2], [0.6, 0.4]]), np.array([0, 1]))
    >>> float(scores.accuracy), float(scores.brier.round(3)), float(scores.calibration_error.round(3))
    (0.5, 0.4, 0.4)
    """
    from sklearn import metrics

    probabilities, labels = _check(probabilities, labels)
    classes, predicted = np.arange(probabilities.shape[1]), probabilities.argmax(axis=1)
    # scikit-learn has no annotations, and its defaults "warn" and "auto" are taken for the types.
    precision, recall, *_ = metrics.precision_recall_fscore_support(
        labels,
        predicted,
        labels=classes,
        average=None,
        zero_division=0,  # type: ignore[arg-type]
    )
    # scikit-learn would take no probability for less than 2e-16, and a network that is wrong and sure for a better one.
    of_labels = np.take_along_axis(probabilities, labels[:, None], axis=1)
    brier = metrics.brier_score_loss(labels, probabilities, labels=classes, scale_by_half=False)  # type: ignore[arg-type]
    bins = reliability(probabilities, labels)
    return Scores(
        np.asarray(metrics.accuracy_score(labels, predicted)),
        np.asarray(-np.log(np.maximum(of_labels, LEAST)).mean()),
        np.asarray(brier),
        np.asarray(np.nansum(bins.share * np.abs(bins.confidence - bins.accuracy))),
        np.asarray(precision),
        np.asarray(recall),
        metrics.confusion_matrix(labels, predicted, labels=classes),
    )


def reliability(
    probabilities: Float[Array | np.ndarray, "n classes"], labels: Int[Array | np.ndarray, " n"], *, bins: int = BINS
) -> Reliability:
    """Sort examples into bins by their confidence, and tell how many of each bin are right.

    Args:
        probabilities: One row an example.
        labels: Index of the right class.
        bins: Number of bins of equal width between 0 and 1.

    Raises:
        TypeError: `bins` is not a whole number.
        ValueError: Shapes do not fit, there is no example or no bin, a row is not a distribution, or a label names no
            class.

    Source: DeGroot and Fienberg, "The Comparison and Evaluation of Forecasters", 1983, as
    `sklearn.calibration.calibration_curve` has it.

    >>> curve = reliability(np.array([[0.9, 0.1], [0.7, 0.3], [0.3, 0.7]]), np.array([0, 0, 0]), bins=4)
    >>> curve.accuracy.tolist(), curve.confidence.round(3).tolist()
    ([nan, nan, 0.5, 1.0], [nan, nan, 0.7, 0.9])
    """
    from sklearn.calibration import calibration_curve

    bins = check_count("bins", bins, 1)
    probabilities, labels = _check(probabilities, labels)
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    # calibration_curve leaves out empty bins and does not tell which; these are its own bins.
    inner = np.linspace(0, 1, bins + 1)[1:-1]
    counts = np.bincount(np.searchsorted(inner, confidence), minlength=bins)
    curve = Reliability(np.full(bins, np.nan), np.full(bins, np.nan), counts / len(labels))
    curve.accuracy[counts > 0], curve.confidence[counts > 0] = calibration_curve(right, confidence, n_bins=bins)
    return curve


def entropy(probabilities: Float[Array | np.ndarray, "n classes"]) -> Float[np.ndarray, " n"]:
    """Tell how unsure each prediction is, in nats: 0 for one certain class, ln 10 for ten equal ones.

    Raises:
        ValueError: The probabilities have other axes, or a row is not a distribution.

    >>> [f"{nats:.4f}" for nats in entropy(np.array([[1.0, 0.0], [0.5, 0.5]]))]
    ['0.0000', '0.6931']
    """
    probabilities = np.asarray(probabilities, np.float64)
    if probabilities.ndim != 2:
        raise ValueError(f"probabilities must have shape [n, classes], got {list(probabilities.shape)}")
    # Those of half precision are off by some hundredths.
    return entr(_distributions(probabilities, within=0.1)).sum(axis=1)


def detection(known: Float[np.ndarray, " n"], foreign: Float[np.ndarray, " m"]) -> float:
    """Tell how well a number such as the entropy tells foreign examples from known ones.

    Args:
        known: The number for examples like those that were trained on.
        foreign: The number for others.

    Returns:
        The area under the ROC curve: the chance that a foreign example has the larger number of the two, 0.5 for
        guessing, 1 for a perfect detector.

    >>> detection(np.array([0.1, 0.4]), np.array([0.3, 0.9]))
    0.75
    """
    from sklearn import metrics

    truth = np.repeat([0, 1], [len(known), len(foreign)])
    return float(metrics.roc_auc_score(truth, np.concatenate([known, foreign])))


def _check(probabilities, labels):
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(
            "probabilities must have shape [n, classes] and labels [n] with n at least 1, "
            f"got {list(probabilities.shape)} and {list(labels.shape)}"
        )
    probabilities = _distributions(probabilities)
    classes = probabilities.shape[1]
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels must be ints from 0 to {classes - 1}, got {labels.dtype} from {labels.min()} to {labels.max()}"
        )
    return probabilities, labels


def _distributions(probabilities, within=1e-3):
    totals = probabilities.sum(axis=1, keepdims=True)
    # Comparisons with NaN are false.
    if not ((probabilities >= 0).all() and (np.abs(totals - 1) < within).all()):
        raise ValueError("probabilities must be at least 0 and sum to 1 in each row")
    return probabilities / totals
