"""Scores of probabilities against scikit-learn and their definitions in NumPy."""

import jax
import numpy as np
import pytest
from sklearn import metrics
from sklearn.calibration import calibration_curve

from fashion_jax.calibration import detection, entropy, reliability, score
from fashion_jax.inference import predict
from fashion_jax.steps import evaluate, init_state


def calibrated(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and labels drawn from them."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(10, 0.3), n)
    return p, (rng.uniform(size=(n, 1)) > p.cumsum(axis=1)).sum(axis=1).clip(max=9)


def test_scores_are_those_of_scikit_learn():
    p, labels = calibrated(2_000)
    p = p**2 / (p**2).sum(axis=1, keepdims=True)  # Too sure.
    predicted, scores, curve = p.argmax(axis=1), score(p, labels), reliability(p, labels)
    assert scores.accuracy == metrics.accuracy_score(labels, predicted)
    assert scores.loss == pytest.approx(metrics.log_loss(labels, p.clip(1e-37)), rel=1e-6)
    assert scores.brier == pytest.approx(metrics.brier_score_loss(labels, p, scale_by_half=False), rel=1e-6)
    np.testing.assert_array_equal(scores.confusion, metrics.confusion_matrix(labels, predicted))
    precision, recall, *_ = metrics.precision_recall_fscore_support(labels, predicted)
    np.testing.assert_allclose((scores.precision, scores.recall), (precision, recall))
    full = curve.share > 0
    accuracy, confidence = calibration_curve(predicted == labels, p.max(axis=1), n_bins=15)
    np.testing.assert_allclose((curve.accuracy[full], curve.confidence[full]), (accuracy, confidence))
    np.testing.assert_allclose(curve.share, np.histogram(p.max(axis=1), 15, (0, 1))[0] / 2_000)
    assert scores.calibration_error == pytest.approx((curve.share[full] * abs(accuracy - confidence)).sum(), rel=1e-9)


def test_the_loss_is_that_of_training_even_if_networks_are_very_sure(small):
    params = init_state(jax.random.key(0)).params
    for factor, rel in ((1, 1e-5), (150, 1e-4)):
        scaled = params | {"fc4": jax.tree.map(lambda leaf, factor=factor: factor * leaf, params["fc4"])}
        probabilities = predict(scaled, small.images)
        loss = evaluate(scaled, jax.tree.map(jax.numpy.asarray, small)).loss
        assert score(probabilities, small.labels).loss == pytest.approx(float(loss), rel=rel)
    assert np.take_along_axis(probabilities, small.labels[:, None], axis=1).min() < np.finfo(np.float64).eps
    assert score(np.array([[1.0, 0.0]]), np.array([1])).loss == pytest.approx(87.3, abs=0.1)


def test_lane_axes_stay_in_front():
    p, labels = calibrated(400)
    lanes = np.stack([p, p[::-1], np.roll(p, 1, axis=1)])[:, None]

    def measured(p):
        nats = entropy(p)
        return score(p, labels), reliability(p, labels, bins=4), nats, detection(nats[..., :100], nats[..., 100:])

    for i in range(3):
        actual = jax.tree.map(lambda leaf, i=i: leaf[i, 0], measured(lanes))
        jax.tree.map(np.testing.assert_allclose, actual, measured(lanes[i, 0]))


def test_entropy_and_detection_are_their_definitions():
    p, _ = calibrated(50)
    np.testing.assert_allclose(entropy(p), -(p * np.log(p)).sum(axis=1))
    # Rows that do not quite sum to 1, as in half precision, count as if they did.
    np.testing.assert_allclose(entropy(1.03 * p), entropy(p))
    rng = np.random.default_rng(0)
    known, foreign = rng.normal(size=40).round(1), (rng.normal(size=60) + 1).round(1)
    assert np.isin(known, foreign).any()
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
