"""Scores of probabilities against scikit-learn and their definitions in NumPy."""

import jax
import numpy as np
import pytest
from sklearn import metrics
from sklearn.calibration import calibration_curve

from fashion_jax.calibration import detection, entropy, reliability, score
from fashion_jax.inference import predict
from fashion_jax.steps import evaluate


@pytest.fixture(scope="module")
def probabilities(trained, splits) -> np.ndarray:
    return predict(trained.state.params, splits.test.images)


def calibrated(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and labels drawn from them."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(10, 0.3), n)
    return p, (rng.uniform(size=(n, 1)) > p.cumsum(axis=1)).sum(axis=1).clip(max=9)


def test_scores_are_those_of_scikit_learn(trained, probabilities, splits):
    labels = splits.test.labels
    p = probabilities / probabilities.sum(axis=1, keepdims=True, dtype=np.float64)
    predicted = p.argmax(axis=1)
    scores = score(probabilities, labels)
    assert scores.accuracy == metrics.accuracy_score(labels, predicted)
    assert scores.loss == pytest.approx(metrics.log_loss(labels, p), rel=1e-6)
    assert scores.loss == pytest.approx(float(trained.history.validation.loss[-1]), rel=1e-5)
    assert scores.brier == pytest.approx(metrics.brier_score_loss(labels, p, scale_by_half=False), rel=1e-6)
    np.testing.assert_array_equal(scores.confusion, metrics.confusion_matrix(labels, predicted))
    precision, recall, *_ = metrics.precision_recall_fscore_support(labels, predicted)
    np.testing.assert_allclose((scores.precision, scores.recall), (precision, recall))
    curve = reliability(probabilities, labels)
    full = curve.share > 0
    accuracy, confidence = calibration_curve(predicted == labels, p.max(axis=1), n_bins=15)
    np.testing.assert_allclose((curve.accuracy[full], curve.confidence[full]), (accuracy, confidence))
    edges, error = np.linspace(0, 1, 16), 0.0
    for low, high, share in zip(edges[:-1], edges[1:], curve.share, strict=True):
        members = (p.max(axis=1) > low) & (p.max(axis=1) <= high)
        assert share == members.mean()
        error += abs(((predicted == labels)[members] - p.max(axis=1)[members]).sum()) / len(labels)
    assert scores.calibration_error == pytest.approx(error, rel=1e-9)


def test_the_loss_of_very_sure_networks_is_that_of_training(trained, splits):
    last = trained.state.params["fc4"]
    params = trained.state.params | {"fc4": jax.tree.map(lambda leaf: 7 * leaf, last)}
    probabilities = predict(params, splits.test.images)
    assert np.take_along_axis(probabilities, splits.test.labels[:, None], axis=1).min() < np.finfo(np.float64).eps
    loss = evaluate(params, jax.tree.map(jax.numpy.asarray, splits.test)).loss
    assert score(probabilities, splits.test.labels).loss == pytest.approx(float(loss), rel=1e-4)
    assert score(np.array([[1.0, 0.0]]), np.array([1])).loss == pytest.approx(87.3, abs=0.1)


def test_lane_axes_stay_in_front():
    p, labels = calibrated(400)
    lanes = np.stack([p, p[::-1], np.roll(p, 1, axis=1)]).reshape(3, 1, 400, 10)
    scores, curve, nats = score(lanes, labels), reliability(lanes, labels, bins=4), entropy(lanes)
    found = detection(nats[..., :100], nats[..., 100:])
    for i, lane in enumerate(lanes[:, 0]):
        expected = (score(lane, labels), reliability(lane, labels, bins=4), entropy(lane))
        actual = jax.tree.map(lambda leaf, i=i: leaf[i, 0], (scores, curve, nats))
        jax.tree.map(np.testing.assert_allclose, actual, expected)
        assert found[i, 0] == pytest.approx(detection(entropy(lane)[:100], entropy(lane)[100:]))


def test_entropy_and_detection_are_their_definitions():
    p, _ = calibrated(50)
    np.testing.assert_allclose(entropy(p), -(p * np.log(p)).sum(axis=1))
    # Rows that do not quite sum to 1, as in half precision, count as if they did.
    np.testing.assert_allclose(entropy(1.03 * p), entropy(p))
    rng = np.random.default_rng(0)
    known, foreign = rng.normal(size=40).round(1), (rng.normal(size=60) + 1).round(1)
    pairs = foreign[None] - known[:, None]
    assert (pairs == 0).any()
    assert detection(known, foreign) == pytest.approx((pairs > 0).mean() + (pairs == 0).mean() / 2)
    truth = np.repeat([0, 1], [40, 60])
    assert detection(known, foreign) == pytest.approx(metrics.roc_auc_score(truth, np.concatenate([known, foreign])))


def test_edges_and_classes_without_examples():
    curve = reliability(np.array([[0.8, 0.2], [0.8, 0.2]]), np.array([0, 1]), bins=5)
    assert curve.share.tolist() == [0, 0, 0, 1, 0]
    np.testing.assert_allclose(curve.accuracy, [np.nan, np.nan, np.nan, 0.5, np.nan])
    scores = score(np.array([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0]]), np.array([0, 1]))
    assert (scores.precision.tolist(), scores.recall.tolist()) == ([0.5, 0.0, 0.0], [1.0, 0.0, 0.0])
    only = score(np.ones((3, 1)), np.zeros(3, int))
    assert (only.accuracy, only.brier, only.loss, only.confusion.tolist()) == (1, 0, 0, [[3]])


HALVES = np.full((3, 2), 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score(HALVES, np.zeros(2, int)), r"labels \[n\], got \(3, 2\) and \(2,\)"),
        (lambda: score(np.zeros((0, 2)), np.zeros(0, int)), r"labels \[n\], got \(0, 2\) and \(0,\)"),
        (lambda: score(HALVES, np.array([0, 2, -1])), r"labels must lie in 0..1, got \[-1, 2\]"),
        (lambda: reliability(HALVES, np.array([0, 0.5, 1])), r"labels must lie in 0..1, got \[0.5\]"),
        (lambda: score(np.log(HALVES), np.zeros(3, int)), "sum to 1 over the classes"),
        (lambda: entropy(np.full((3, 2), np.nan)), "sum to 1 over the classes"),
        (lambda: entropy(np.array([0.1, 0.9])), r"must be \[..., n, classes\]"),
        (lambda: detection(np.zeros(0), np.zeros(3)), "at least one example each"),
    ],
)
def test_what_does_not_fit_together_is_named(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()
