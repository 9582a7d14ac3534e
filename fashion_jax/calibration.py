"""Scores of class probabilities; lane axes in front of the probabilities, as `predict` returns them, stay in front."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int
from scipy.special import entr

Probabilities = Float[Array | np.ndarray, "*lanes n classes"]
Labels = Int[Array | np.ndarray, " n"]


class Scores(NamedTuple):
    """Scores on n examples.

    Attributes:
        accuracy: Fraction of examples classified correctly.
        loss: Mean negative log likelihood, in nats, of each example at most 87.3.
        brier: Brier score: mean squared distance between probabilities and one-hot labels, 0 to 2.
        calibration_error: Expected calibration error (ECE): mean distance of confidence and accuracy over 15 bins.
        precision: Fraction of correct predictions for each predicted class; 0 for a class never predicted.
        recall: Fraction of correct predictions for each class; 0 for a class without examples.
        confusion: Number of examples, [label, predicted class].
    """

    accuracy: Float[np.ndarray, "*lanes"]
    loss: Float[np.ndarray, "*lanes"]
    brier: Float[np.ndarray, "*lanes"]
    calibration_error: Float[np.ndarray, "*lanes"]
    precision: Float[np.ndarray, "*lanes classes"]
    recall: Float[np.ndarray, "*lanes classes"]
    confusion: Int[np.ndarray, "*lanes classes classes"]


class Reliability(NamedTuple):
    """A reliability diagram: bins of equal width over the confidence; NaN in empty bins.

    Attributes:
        confidence: Mean probability of the predicted class.
        accuracy: Fraction of examples classified correctly.
        share: Fraction of all examples that lie in the bin.
    """

    confidence: Float[np.ndarray, "*lanes bins"]
    accuracy: Float[np.ndarray, "*lanes bins"]
    share: Float[np.ndarray, "*lanes bins"]


def score(probabilities: Probabilities, labels: Labels) -> Scores:
    """Compute all scores of probabilities.

    Raises:
        ValueError: Probabilities and labels do not fit together, or a row is no distribution.

    Source: Brier, "Verification of Forecasts Expressed in Terms of Probability", 1950; Guo et al., "On Calibration of
    Modern Neural Networks", ICML 2017 (ECE).

    >>> scores = score(np.array([[0.8, 0.2], [0.6, 0.4]]), np.array([0, 1]))
    >>> float(scores.accuracy), float(scores.brier.round(3)), float(scores.calibration_error.round(3))
    (0.5, 0.4, 0.4)
    """
    p, labels = _check(probabilities, labels)
    classes = np.arange(p.shape[-1])
    truth = (labels[:, None] == classes).astype(int)
    confusion = truth.T @ (p.argmax(axis=-1)[..., None] == classes)
    correct = confusion.diagonal(axis1=-2, axis2=-1)
    bins = reliability(p, labels)
    # Probabilities of float32 below its smallest normal number have lost their precision.
    of_labels = np.maximum((p * truth).sum(axis=-1), np.finfo(np.float32).tiny)
    return Scores(
        accuracy=correct.sum(axis=-1) / len(labels),
        loss=-np.log(of_labels).mean(axis=-1),
        brier=np.square(p - truth).sum(axis=-1).mean(axis=-1),
        calibration_error=np.nansum(bins.share * np.abs(bins.confidence - bins.accuracy), axis=-1),
        precision=correct / np.maximum(confusion.sum(axis=-2), 1),
        recall=correct / np.maximum(confusion.sum(axis=-1), 1),
        confusion=confusion,
    )


def reliability(probabilities: Probabilities, labels: Labels, *, bins: int = 15) -> Reliability:
    """Compute confidence and accuracy in bins of equal width; an edge belongs to the bin below.

    Source: DeGroot and Fienberg, "The Comparison and Evaluation of Forecasters", 1983.

    >>> curve = reliability(np.array([[0.9, 0.1], [0.7, 0.3], [0.3, 0.7]]), np.array([0, 0, 0]), bins=4)
    >>> curve.accuracy.tolist(), curve.confidence.round(3).tolist()
    ([nan, nan, 0.5, 1.0], [nan, nan, 0.7, 0.9])
    """
    p, labels = _check(probabilities, labels)
    confidence, correct = p.max(axis=-1), p.argmax(axis=-1) == labels
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    members = np.searchsorted(edges, confidence)[..., None] == np.arange(bins)
    count = members.sum(axis=-2)
    with np.errstate(invalid="ignore"):
        means = [(values[..., None] * members).sum(axis=-2) / count for values in (confidence, correct)]
    return Reliability(*means, share=count / len(labels))


def entropy(probabilities: Probabilities) -> Float[np.ndarray, "*lanes n"]:
    """Compute the entropy of each prediction, in nats: 0 for one certain class, ln 10 for ten equal ones.

    >>> [f"{nats:.4f}" for nats in entropy(np.array([[1.0, 0.0], [0.5, 0.5]]))]
    ['0.0000', '0.6931']
    """
    return entr(_distributions(probabilities)).sum(axis=-1)


def detection(
    known: Float[np.ndarray, "*lanes n"], foreign: Float[np.ndarray, "*lanes m"]
) -> Float[np.ndarray, "*lanes"]:
    """Compute the AUROC of a quantity such as the entropy for detecting foreign examples among known ones.

    It is the probability that a foreign example has the larger value: 0.5 for guessing, 1 for perfect detection.

    >>> float(detection(np.array([0.1, 0.4]), np.array([0.3, 0.9])))
    0.75
    """
    from scipy.stats import mannwhitneyu

    pairs = known.shape[-1] * foreign.shape[-1]
    if not pairs:
        raise ValueError("known and foreign must hold at least one example each")
    return np.asarray(mannwhitneyu(foreign, known, axis=-1, method="asymptotic").statistic / pairs)


def _check(probabilities: Probabilities, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    p, labels = _distributions(probabilities), np.asarray(labels)
    if labels.shape != p.shape[-2:-1] or not len(labels):
        raise ValueError(f"probabilities must be [..., n, classes] and labels [n], got {p.shape} and {labels.shape}")
    if len(others := np.setdiff1d(labels, range(p.shape[-1]))):
        raise ValueError(f"labels must lie in 0..{p.shape[-1] - 1}, got {others[:5].tolist()}")
    return p, labels


def _distributions(probabilities: Probabilities) -> np.ndarray:
    p = np.asarray(probabilities, np.float64)
    totals = p.sum(axis=-1, keepdims=True)
    # Half precision is off by some hundredths; comparisons with NaN are false.
    if p.ndim < 2 or not ((p >= 0).all() and (np.abs(totals - 1) < 0.1).all()):
        raise ValueError("probabilities must be [..., n, classes], at least 0, and sum to 1 over the classes")
    return p / totals
