"""The scores of probabilities, against NumPy, and the study that compares the three ways to predict."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fashion_jax import TrainConfig, calibration, plot
from fashion_jax.predict import predict
from fashion_jax.train import evaluate

STUDY = Path(__file__).parents[1] / "examples" / "calibration.py"


@pytest.fixture(scope="module")
def said(trained, splits):
    return predict(trained.state.params, splits.test.images)


def test_scores_against_numpy(trained, said, splits):
    labels = splits.test.labels
    scores = calibration.score(said, labels)
    # In float32 rows sum to 1 within rounding, which can move an example into the next bin.
    p, predicted = said / said.sum(axis=1, keepdims=True, dtype=np.float64), said.argmax(axis=1)
    truth = np.eye(10)[labels]
    assert scores.accuracy == (predicted == labels).mean()
    assert scores.loss == pytest.approx(-np.log(p[np.arange(10_000), labels]).mean(), rel=1e-5)
    assert scores.loss == pytest.approx(float(trained.history.validation.loss[-1]), rel=1e-5)
    assert scores.brier == pytest.approx(np.square(p - truth).sum(axis=1).mean(), rel=1e-5)
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (labels, predicted), 1)
    np.testing.assert_array_equal(scores.confusion, counts)
    np.testing.assert_allclose(scores.recall, np.diag(counts) / counts.sum(axis=1))
    np.testing.assert_allclose(scores.precision, np.diag(counts) / counts.sum(axis=0))
    confidence, error = p.max(axis=1), 0.0
    for i in range(15):
        here = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if here.any():
            error += here.mean() * abs(confidence[here].mean() - (predicted == labels)[here].mean())
    assert scores.calibration_error == pytest.approx(error, abs=1e-6)


def test_labels_drawn_from_the_probabilities_are_calibrated():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(10, 0.3), 50_000)
    labels = (rng.uniform(size=(50_000, 1)) > p.cumsum(axis=1)).sum(axis=1).clip(max=9)
    assert calibration.score(p, labels).calibration_error < 0.01
    sharpened = p**3 / (p**3).sum(axis=1, keepdims=True)
    assert calibration.score(sharpened, labels).calibration_error > 0.1
    curve = calibration.reliability(p, labels)
    assert curve.share.sum() == pytest.approx(1)
    full = curve.share > 0.02
    np.testing.assert_allclose(curve.accuracy[full], curve.confidence[full], atol=0.03)


def test_entropy_and_detection_against_their_definitions():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(10), 50)
    np.testing.assert_allclose(calibration.entropy(p), -(p * np.log(p)).sum(axis=1))
    # Rows that do not quite sum to 1, as those of float32 do not, count as if they did.
    np.testing.assert_allclose(calibration.entropy(1.001 * p), calibration.entropy(p))
    known, foreign = rng.normal(size=40), rng.normal(size=60) + 1
    larger = (foreign[None] > known[:, None]).mean()
    assert calibration.detection(known, foreign) == pytest.approx(larger)


def test_a_confidence_on_an_edge_is_in_the_lower_bin():
    curve = calibration.reliability(np.array([[0.8, 0.2], [0.8, 0.2]]), np.array([0, 1]), bins=5)
    assert curve.share.tolist() == [0, 0, 0, 1, 0]
    np.testing.assert_allclose(curve.accuracy, [np.nan, np.nan, np.nan, 0.5, np.nan])


def test_a_class_that_nothing_was_called_has_precision_0():
    scores = calibration.score(np.array([[0.9, 0.1], [0.8, 0.2]]), np.array([0, 1]))
    assert (scores.precision.tolist(), scores.recall.tolist()) == ([0.5, 0.0], [1.0, 0.0])


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (np.full((3, 2), 0.5), np.zeros(2, int), r"labels \[n\]"),
        (np.zeros((0, 2)), np.zeros(0, int), "n at least 1"),
        (np.log(np.full((3, 2), 0.5)), np.zeros(3, int), "sum to 1 in each row"),
        (np.full((3, 2), np.nan), np.zeros(3, int), "sum to 1 in each row"),
        (np.ones((3, 2)), np.zeros(3, int), "sum to 1 in each row"),
        (np.full((3, 2), 0.5), np.array([0, 2, 1]), "labels must be ints from 0 to 1, got int64 from 0 to 2"),
        (np.full((3, 2), 0.5), np.array([0, -1, 1]), "labels must be ints from 0 to 1, got int64 from -1 to 1"),
        (np.full((3, 2), 0.5), np.zeros(3), "labels must be ints from 0 to 1, got float64"),
    ],
)
def test_what_is_no_distribution_is_refused(probabilities, labels, message, unchecked):
    with pytest.raises(ValueError, match=message):
        calibration.score(probabilities, labels)


@pytest.mark.parametrize("rows", [[[-1.2, -0.4]], [[0.0, 0.0]], [[np.nan, 0.5]], [[0.5, 0.5], [2.0, 1.0]]])
def test_what_is_no_distribution_has_no_entropy(rows):
    with pytest.raises(ValueError, match="probabilities must be at least 0 and sum to 1 in each row"):
        calibration.entropy(np.array(rows))


def test_probabilities_without_rows_and_bins_below_1_are_refused(unchecked):
    with pytest.raises(ValueError, match=r"probabilities must have shape \[n, classes\], got \[2\]"):
        calibration.entropy(np.array([0.1, 0.9]))
    for bins in (0, -1):
        with pytest.raises(ValueError, match=f"bins must be at least 1, got {bins}"):
            calibration.reliability(np.array([[0.1, 0.9]]), np.array([0]), bins=bins)
    for bins in (2.5, "3", None):
        with pytest.raises(TypeError, match="bins must be an int"):
            calibration.reliability(np.array([[0.1, 0.9]]), np.array([0]), bins=bins)


def test_reliability_draws_means_and_leaves_out_bins_that_tell_nothing():
    confidence = np.array([[0.3, 0.5, np.nan, 0.9], [0.32, 0.52, 0.7, 0.88]])
    accuracy = np.array([[0.0, 0.4, np.nan, 0.8], [1.0, 0.5, 0.6, 0.9]])
    share = np.array([[0.001, 0.499, 0, 0.5], [0.001, 0.4, 0.1, 0.499]])
    figure = plot.reliability({"arm": calibration.Reliability(confidence, accuracy, share)})
    measured = figure.axes[0].lines[1]
    np.testing.assert_allclose(measured.get_xdata(), [0.51, 0.89])
    np.testing.assert_allclose(measured.get_ydata(), [0.45, 0.85])
    np.testing.assert_allclose([bar.get_height() for bar in figure.axes[1].patches], share.mean(axis=0))
    with pytest.raises(ValueError, match="at least one Reliability"):
        plot.reliability({})


def test_entropies_and_confusion_draw_what_they_are_given():
    figure = plot.entropies({"noise": {"arm": np.array([[0.5, 1.5], [1.0, 2.0]])}})
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata()[1:], [0.5, 1.0, 1.5, 2.0])
    assert figure.axes[0].get_xlim() == (0, np.log(10))
    sure, unsure = np.array([0.5]), np.array([3.0])
    figure = plot.entropies({"test set": dict.fromkeys("abcdefgh", sure), "noise": dict.fromkeys("hgfedcba", unsure)})
    assert figure.axes[1].get_xlim() == (0, 3)
    styles = [[(line.get_color(), line.get_linestyle(), line.get_label()) for line in a.lines] for a in figure.axes]
    assert styles[0] == styles[1]
    assert len({style[:2] for style in styles[0]}) == 8
    with pytest.raises(ValueError, match=r"parts\['noise'\] must have the names of the first, \['a'\]; got \['b'\]"):
        plot.entropies({"test set": {"a": sure}, "noise": {"b": sure}})
    figure = plot.confusion({"arm": np.array([[3, 1], [0, 5]])}, class_names=["bag", "coat"])
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), [[75, 25], [0, 100]])
    with pytest.raises(ValueError, match=r"shape \[3, 3\]"):
        plot.confusion({"arm": np.zeros((2, 2), int)}, class_names=["bag", "coat", "shirt"])


def test_the_study_compares_three_ways_to_predict(tmp_path, splits):
    flags = ("--epochs", 1, "--seeds", 2, "--train-size", 2000, "--samples", 4, "--output", tmp_path)
    command = [sys.executable, str(STUDY), *map(str, flags)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "2 seeds, which are few" in result.stdout
    assert str(tmp_path) not in result.stdout
    assert result.stderr.splitlines()[-1] == f"pictures and report are in {tmp_path}"
    names = ["confusion.png", "entropy.png", "reliability.png", "report.json", "report.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    results = json.loads((tmp_path / "report.json").read_text())
    assert list(results["arms"]) == ["no dropout", "dropout, weights scaled", "Monte Carlo dropout"]
    for arm in results["arms"].values():
        assert np.shape(arm["recall"]) == (2, 10)
        np.testing.assert_array_equal(np.sum(arm["confusion"], axis=2), np.full((2, 10), 1000))
    assert list(results["mean entropy and mutual information"]) == ["test set", "noise", "rotated by 90°", "inverted"]


def test_the_loss_of_very_sure_networks_is_not_cut_off(trained, splits):
    """The loss has to be the one that training reports."""
    last = trained.state.params["fc4"]
    params = trained.state.params | {"fc4": {name: 7 * leaf for name, leaf in last.items()}}
    probabilities = predict(params, splits.test.images)
    scores = calibration.score(probabilities, splits.test.labels)
    assert np.take_along_axis(probabilities, splits.test.labels[:, None], axis=1).min() < np.finfo(np.float64).eps
    assert scores.loss == pytest.approx(float(evaluate(params, splits.test, config=TrainConfig()).loss), rel=1e-4)
