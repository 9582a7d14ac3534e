"""The statistics against SciPy and by simulation, each verdict driven to each answer, and the recorded 32 seeds."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fashion_jax.evidence import CHOSEN_WIDTH, LAST, best_epochs, judge, late_rises, summarize
from fashion_jax.statistics import compare, holm, interval, paired
from fashion_jax.types import History, Metrics, Run

RECORDS = Path(__file__).parents[1] / "benchmarks" / "records"
RECORD = RECORDS / "2026-11-24-amd-epyc-2-cores" / "seeds32"
SECOND = RECORDS / "2026-11-28-intel-xeon-2-cores" / "seeds32"
EPOCHS = 20
NOISE = np.random.default_rng(5).normal(0, 1, 8)
RISES = "without dropout the validation loss turns early and rises"
STAYS = "with dropout it does not"
NARROWS = "dropout narrows the gap"
CLOSES = "dropout closes the gap"
FINAL = "dropout lowers the final validation loss"
STOPPING = "dropout lowers the loss more than stopping early does"
ACCURACY = "dropout raises accuracy"


def made(loss, *, gap=0.1, accuracy=0.88) -> History:
    """A History [seeds, epochs] with a given validation loss, and gap and accuracy per seed."""
    loss = np.asarray(loss, np.float64)
    gap, accuracy = (np.broadcast_to(np.asarray(value, float)[..., None], loss.shape) for value in (gap, accuracy))
    return History(loss - gap, Metrics(loss - gap, accuracy), Metrics(loss, accuracy))


def curves(seeds=8, *, rise=0.0, level=0.35, noise=0.002, rise_noise=0.0, seed=0):
    """Fall until epoch 5, then rise by `rise`."""
    rng = np.random.default_rng(seed)
    epochs = np.arange(1, EPOCHS + 1)
    fall = 0.2 * np.clip(5 - epochs, 0, None) / 5
    rises = rise + rise_noise * rng.standard_normal((seeds, 1))
    ramp = np.clip(epochs - 5, 0, None) / (EPOCHS - 5)
    return level + fall + rises * ramp + noise * rng.standard_normal((seeds, EPOCHS))


def answers(plain, dropped):
    return {verdict.claim: verdict.answer for verdict in judge(plain, dropped)}


def arms_of(record: Path) -> list[History]:
    """Both arms of 32 recorded seeds, 30 epochs."""
    arms = json.loads((record / "history.json").read_text())["arms"].values()
    metrics = [[Metrics(*map(np.array, arm[part].values())) for part in ("train", "validation")] for arm in arms]
    return [History(np.array(arm["running_loss"]), *both) for arm, both in zip(arms, metrics, strict=True)]


@pytest.fixture(scope="module")
def recorded() -> list[History]:
    return arms_of(RECORD)


@pytest.mark.parametrize(("record", "margins"), [(RECORD, (0.005, 0.01, 0.04)), (SECOND, (0.006, 0.01, 0.039))])
def test_the_recorded_seeds_have_the_same_answers_whatever_the_margin(record, margins):
    """The first record was judged by its last epoch alone, by the first version of this code, on another machine."""
    expected = [verdict["answer"] for verdict in json.loads((RECORD / "report.json").read_text())["verdicts"]]
    arms = arms_of(record)
    for margin in (*margins, 0.007, 0.02):
        assert [verdict.answer for verdict in judge(*arms, loss_margin=margin)] == expected
    for margin in (0.0005, 0.002, 0.008):
        assert [verdict.answer for verdict in judge(*arms, accuracy_margin=margin)] == expected


def test_the_second_record_holds_its_verdicts():
    found = json.loads((SECOND / "report.json").read_text())["verdicts"]["dropout 0.2"]
    for verdict, before in zip(judge(*arms_of(SECOND), name="dropout 0.2"), found, strict=True):
        assert (verdict.claim, verdict.answer, verdict.note) == (before["claim"], before["answer"], before["note"])
        assert verdict.interval._asdict() == pytest.approx(before["interval"], rel=1e-12)


@pytest.mark.parametrize("record", [RECORD, SECOND])
def test_the_mean_of_five_epochs_is_more_precise_than_the_last(record):
    plain, dropped = arms_of(record)
    for measure, most in (("loss", 0.75), ("accuracy", 0.6)):
        difference = getattr(dropped.validation, measure) - getattr(plain.validation, measure)
        assert difference[:, -5:].mean(axis=1).std() < most * difference[:, -1].std()


@pytest.mark.parametrize(("seeds", "decided"), [(4, 0.7), (8, 0.85)])
def test_few_of_the_recorded_seeds_decide_most_claims_and_none_wrongly(recorded, seeds, decided):
    expected, rng = [verdict.answer for verdict in judge(*recorded)], np.random.default_rng(0)
    found = []
    for _ in range(100):
        few = rng.choice(32, seeds, replace=False)
        arms = [jax.tree.map(lambda leaf, few=few: leaf[few], arm) for arm in recorded]
        found.append([verdict.answer for verdict in judge(*arms)])
    right = np.array(found) == expected
    undecided = np.isin(found, ["undecided", "negligible"])
    assert (right | undecided).all()
    assert right.mean() > decided


def test_the_seeds_that_are_needed_decide(recorded):
    """With the spread of a few seeds, for an effect that is known."""
    rng, needed = np.random.default_rng(1), []
    for _ in range(200):
        verdict = compare("", rng.normal(0.006, 0.02, 6), np.zeros(6), quantity="", margin=0.001)
        needed.append(verdict.seeds_needed())
    # Of a two-sided test at the 5% level that excludes 0 half of the time.
    assert 30 < np.median(needed) < 80
    assert compare("", np.ones(1), np.zeros(1), quantity="").seeds_needed() is None


def test_summary_by_hand():
    loss, accuracy = np.array([0.7, 0.5, 0.4, 0.45, 0.6, 0.8]), np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    train = Metrics(np.array([0.6, 0.5, 0.3, 0.2, 0.1, 0.1]), accuracy)
    summary = summarize(History(loss, train, Metrics(loss, accuracy)))
    assert summary._fields[:5] == ("best_epoch", "best_loss", "final_loss", "late_rise", "gap")
    # The last five epochs: the loss is 0.55, the training loss 0.24.
    np.testing.assert_allclose(summary, [3, 0.4, 0.55, 0.15, 0.31, 0.2, 0.3])
    two = jax.tree.map(lambda leaf: leaf[:2], History(loss, train, Metrics(loss, accuracy)))
    assert summarize(two).final_loss == pytest.approx(0.6)


def test_an_interval_is_scipy_s():
    values = np.array([0.1, 0.4, 0.2, 0.7, 0.5])
    measured, wider = interval(values), interval(jnp.array(values), width=2.0)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (measured.low, measured.high) == pytest.approx((expected.low, expected.high))
    assert (measured.mean, measured.n) == (pytest.approx(values.mean()), 5)
    assert measured.effect_size == pytest.approx(values.mean() / values.std(ddof=1))
    assert wider.high - wider.low == pytest.approx(2 * (measured.high - measured.low), rel=1e-5)
    assert str(measured) == f"+0.3800 [{expected.low:+.4f}, {expected.high:+.4f}]"
    expected = stats.ttest_rel(values, values[::-1]).confidence_interval(0.95)
    assert paired(values, values[::-1])[1:3] == pytest.approx((expected.low, expected.high))


def test_intervals_of_one_seed_and_of_equal_seeds():
    one = interval(np.array([0.3]))
    assert (one.mean, one.n) == (0.3, 1)
    assert np.isnan(one[1:4]).all()
    assert str(one) == "+0.3000 (one seed, no interval)"
    assert interval(np.full(3, -0.5)) == (-0.5, -0.5, -0.5, -np.inf, 3)


def test_each_half_of_the_seeds_chooses_for_the_other():
    loss = np.array([[0.9, 0.2, 0.7], [0.9, 0.8, 0.1], [0.9, 0.4, 0.3], [0.0, 0.9, 0.3], [0.9, 0.5, 0.9]])
    even, odd = loss[[0, 2, 4]].mean(axis=0).argmin(), loss[[1, 3]].mean(axis=0).argmin()
    assert (even, odd) == (1, 2)
    assert best_epochs(loss).tolist() == [odd, even, odd, even, odd]
    assert best_epochs(loss[:1]).tolist() == [1]
    chosen = loss[np.arange(5), [odd, even, odd, even, odd]]
    np.testing.assert_allclose(late_rises(loss), loss.mean(axis=1) - chosen)


@pytest.mark.parametrize("seeds", [4, 32])
@pytest.mark.parametrize("shape", ["flat", "recorded"])
def test_intervals_at_chosen_epochs_cover_the_truth_in_95_of_100_cases(recorded, shape, seeds):
    """Curves that vary as the recorded ones do, around means that are known."""
    losses = np.stack([arm.validation.loss for arm in recorded])
    arms, _, epochs = losses.shape
    deviations = np.concatenate(list(losses - losses.mean(axis=1, keepdims=True)), axis=1)
    # 32 seeds do not determine all correlations of 60 epochs.
    covariance = 0.8 * np.cov(deviations.T) + 0.2 * np.diag(deviations.var(axis=0, ddof=1))
    x, means = np.arange(epochs), np.zeros((arms, epochs))
    if shape == "recorded":
        means = np.array([np.polynomial.Polynomial.fit(x, mean, 5)(x) for mean in losses.mean(axis=1)])
    cases, covered = 600, np.zeros(3)
    draws = np.random.default_rng(0).multivariate_normal(means.ravel(), covariance, (cases, seeds), method="cholesky")
    for loss in draws.reshape(cases, seeds, arms, epochs).swapaxes(1, 2):
        chosen = [best_epochs(of_arm) for of_arm in loss]
        there = [of_arm[np.arange(seeds), epoch] for of_arm, epoch in zip(loss, chosen, strict=True)]
        truth = [mean[epoch].mean() for mean, epoch in zip(means, chosen, strict=True)]
        found = [paired(there[1], there[0], width=CHOSEN_WIDTH)]
        found += [interval(late_rises(of_arm), width=CHOSEN_WIDTH) for of_arm in loss]
        final = means[:, -LAST:].mean(axis=1)
        expected = truth[1] - truth[0], final[0] - truth[0], final[1] - truth[1]
        covered += [one.low <= true <= one.high for one, true in zip(found, expected, strict=True)]
    assert (covered / cases > 0.94).all()


FLAT, FAIR = made(curves()), made(curves(), gap=np.full(8, 0.2))


def rising(rise, noise):
    return made(curves(rise=rise, rise_noise=noise))


def parted(gap, noise):
    return made(curves(), gap=gap + noise * NOISE)


def shifted(shift, noise):
    return made(curves() + (shift + noise * NOISE)[:, None])


@pytest.mark.parametrize(
    ("claim", "arms", "supported", "refuted", "undecided"),
    [
        (RISES, lambda *rise: (rising(*rise), FLAT), (0.08, 0.005), (0.0, 0.005), (0.02, 0.03)),
        (STAYS, lambda *rise: (FLAT, rising(*rise)), (0.0, 0.005), (0.08, 0.005), (0.02, 0.03)),
        (NARROWS, lambda *gap: (parted(*gap), FAIR), (0.3, 0.01), (0.1, 0.01), (0.2, 0.1)),
        (CLOSES, lambda *gap: (FLAT, parted(*gap)), (0.0, 0.005), (0.1, 0.01), (0.02, 0.05)),
        (FINAL, lambda *shift: (FLAT, shifted(*shift)), (-0.05, 0.01), (0.05, 0.01), (0.0, 0.1)),
        (STOPPING, lambda *shift: (FLAT, shifted(*shift)), (-0.05, 0.01), (0.05, 0.01), (0.0, 0.1)),
        (ACCURACY, lambda x, s: (FLAT, made(curves(), accuracy=x + s * NOISE)), (0.9, 0.01), (0.8, 0.01), (0.88, 0.01)),
    ],
)
def test_each_claim_has_each_answer(claim, arms, supported, refuted, undecided):
    """From a mean over the seeds and its noise."""
    found = [answers(*arms(*numbers))[claim] for numbers in (supported, refuted, undecided)]
    assert found == ["supported", "refuted", "undecided"]


def test_a_difference_within_the_margin_is_negligible_unless_it_refutes():
    slightly_less = answers(FLAT, made(curves() - 0.005, accuracy=0.8795))
    assert slightly_less[FINAL] == slightly_less[STOPPING] == "negligible"
    assert slightly_less[ACCURACY] == "refuted"
    slightly_more = judge(FLAT, made(curves() + 0.005, accuracy=0.8805))
    assert {verdict.claim: verdict.answer for verdict in slightly_more}[FINAL] == "refuted"
    assert (slightly_more[-1].answer, slightly_more[-1].note) == ("negligible", "at most 0.0005")
    assert judge(FLAT, FLAT, name="dropout 0.3")[-1].claim == "dropout 0.3 raises accuracy"


VEE = 0.3 + 0.02 * np.abs(np.arange(1, EPOCHS + 1) - np.array([[10], [11]])) + 0.001 * NOISE[:, None, None]
ONE_EPOCH = made(curves()[:, :1])


@pytest.mark.parametrize(
    ("claim", "plain", "dropped", "answer"),
    [
        (RISES, made(VEE[:, 0]), FLAT, "supported"),  # Lowest in epoch 10 of 20,
        (RISES, made(VEE[:, 1]), FLAT, "undecided"),  # and in epoch 11, which is not early.
        *((claim, ONE_EPOCH, ONE_EPOCH, "undecided") for claim in (RISES, STAYS)),
        # Early stopping is a rival: dropout has the lower last loss, and the plain network the lower best one.
        (FINAL, made(curves(rise=0.1, level=0.33)), made(curves(level=0.37, seed=1)), "supported"),
        (STOPPING, made(curves(rise=0.1, level=0.33)), made(curves(level=0.37, seed=1)), "refuted"),
    ],
)
def test_verdicts_at_the_edges(claim, plain, dropped, answer):
    assert answers(plain, dropped)[claim] == answer


def test_one_seed_decides_nothing_and_few_are_weak():
    for seeds, note in ((1, "one seed decides nothing"), (2, "weak: 2 seeds"), (3, "weak: 3 seeds"), (4, "")):
        verdicts = judge(made(curves(seeds, rise=0.1)), made(curves(seeds)))
        notes = [verdict.note for verdict in verdicts]
        assert all(found.endswith(note) if note else not found or "at most" in found for found in notes)
        assert seeds > 1 or {verdict.answer for verdict in verdicts} == {"undecided"}


NAN = made(curves(3))
NAN.train.loss[1, 0] = np.nan
RUN = Run({}, made(curves(3)), {})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: summarize(RUN), TypeError, "history must be a History, got Run; pass its .history"),
        (lambda: summarize(made(np.zeros((3, 0)))), ValueError, "leaves [..., epochs] of one shape, got [[3, 0]]"),
        (lambda: judge(FLAT, NAN), ValueError, "dropped holds numbers that are not finite, in runs [[1]]; leave these"),
        (lambda: judge(FLAT, made(curves(5))), ValueError, "must have the same seeds, got [[8, 20], [5, 20]]"),
        (lambda: judge(made(curves()[0]), FLAT), ValueError, "plain must have leaves [seeds, epochs] of one shape"),
        (lambda: judge(FLAT._replace(train=FLAT[2]._replace(loss=NOISE)), FLAT), ValueError, "got [[8], [8, 20]]"),
        (lambda: interval(np.array([])), ValueError, "values must have shape [seeds] and not be empty, got [0]"),
        (lambda: paired(NOISE, NOISE[:1]), ValueError, "first and second must have the same seeds, got 8 and 1"),
        (lambda: best_epochs(NOISE), ValueError, "loss must have shape [seeds, epochs]"),
        # NumPy takes NaN for the lowest loss, so half of the other seeds would get the epoch where a run diverged.
        (lambda: late_rises(NAN.train.loss), ValueError, "loss holds numbers that are not finite, in runs [[1]]"),
    ],
)
def test_bad_input_is_named(call, error, message, unchecked):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_holm_rejects_step_by_step():
    rng, bent = np.random.default_rng(0), 0
    for _ in range(20):
        pairs = [(rng.normal(gain, 1, 8), rng.normal(0, 1, 8)) for gain in (3, 2, 2, 1, 1, 0, 0)]
        p_values = holm([compare("better", *pair, quantity="accuracy") for pair in pairs])
        p = np.array([stats.ttest_rel(*pair).pvalue for pair in pairs])
        for level in (*np.linspace(0.001, 0.5, 50), *p_values[p_values < 1]):
            rejected = set()
            for i, smallest in enumerate(np.argsort(p)):
                if p[smallest] > level / (len(p) - i) + 1e-12:
                    break
                rejected.add(smallest)
            assert rejected == set(np.flatnonzero(p_values <= level))
        # Where a larger p would get the smaller value, it gets the same.
        bent += len(set(p_values[p_values < 1])) < (p_values < 1).sum()
    assert bent > 0


def test_equal_arms_and_one_seed_are_no_evidence():
    same, better = NOISE, (NOISE + 1, np.roll(NOISE, 1))
    verdicts = [compare("better", *pair, quantity="x") for pair in ((same, same), better, (np.ones(1), np.zeros(1)))]
    assert holm(verdicts).tolist() == [1.0, pytest.approx(3 * stats.ttest_rel(*better).pvalue), 1.0]
