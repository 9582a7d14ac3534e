"""The statistics against SciPy and by simulation, each verdict driven to each answer, and the recorded 32 seeds."""

import functools
import itertools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from benchmarks.tables import recorded_arms
from fashion_jax.evidence import CHOSEN_WIDTH, LAST, best_epochs, judge, late_rises, summarize
from fashion_jax.statistics import compare, holm, interval, paired
from fashion_jax.types import History, Metrics, Run

RECORDS = Path(__file__).parents[1] / "benchmarks" / "records"
FIRST = RECORDS / "2026-11-24-amd-epyc-2-cores" / "seeds32"
SECOND = RECORDS / "2026-11-28-intel-xeon-2-cores" / "seeds32"
EPOCHS = 20
arms_of = functools.cache(lambda record: recorded_arms((record / "history.json").read_text()))
NOISE = np.random.default_rng(5).normal(0, 1, 8)
# The claims, in their order.
RISES, STAYS, NARROWS, CLOSES, FINAL, STOPPING, ACCURACY = range(7)


def made(loss, *, gap=0.1, accuracy=0.88) -> History:
    """A History [seeds, epochs] with a given validation loss, and gap and accuracy per seed."""
    loss = np.asarray(loss, np.float64)
    gap, accuracy = (np.broadcast_to(np.asarray(value, float)[..., None], loss.shape) for value in (gap, accuracy))
    return History(loss - gap, Metrics(loss - gap, accuracy), Metrics(loss, accuracy))


def curves(seeds=8, *, rise=0.0, level=0.35, seed=0):
    """Fall until epoch 5, then rise by `rise`; rise and level may differ from seed to seed."""
    epochs = np.arange(1, EPOCHS + 1)
    fall, ramp = 0.04 * np.clip(5 - epochs, 0, None), np.clip(epochs - 5, 0, None) / (EPOCHS - 5)
    rise, level = (np.reshape(value, (-1, 1)) for value in (rise, level))
    return level + fall + rise * ramp + 0.002 * np.random.default_rng(seed).standard_normal((seeds, EPOCHS))


def answers(plain, dropped):
    return [verdict.answer for verdict in judge(plain, dropped)]


@pytest.mark.parametrize("record", [FIRST, SECOND])
def test_the_recorded_seeds_have_the_same_answers_whatever_the_margin(record):
    """The first record was judged by its last epoch alone, by the first version of this code, on another machine."""
    expected = [verdict["answer"] for verdict in json.loads((FIRST / "report.json").read_text())["verdicts"]]
    margins = [{"loss_margin": margin} for margin in (0.006, 0.007, 0.01, 0.02, 0.039)]
    for margin in [*margins, *({"accuracy_margin": margin} for margin in (0.0005, 0.002, 0.008))]:
        assert [verdict.answer for verdict in judge(*arms_of(record), **margin)] == expected


def test_the_second_record_holds_its_verdicts():
    found = json.loads((SECOND / "report.json").read_text())["verdicts"]["dropout 0.2"]
    for verdict, before in zip(judge(*arms_of(SECOND), name="dropout 0.2"), found, strict=True):
        assert (verdict.claim, verdict.answer, verdict.note) == (before["claim"], before["answer"], before["note"])
        assert verdict.interval._asdict() == pytest.approx(before["interval"], rel=1e-12)


def test_the_mean_of_five_epochs_is_more_precise_than_the_last():
    stds = []
    for measures in (zip(*(arm.validation[:2] for arm in arms_of(record)), strict=True) for record in (FIRST, SECOND)):
        for difference in (dropped - plain for plain, dropped in measures):
            stds += [difference[:, -1].std(ddof=1), difference[:, -5:].mean(axis=1).std(ddof=1)]
    # As in `docs/evidence.md`.
    assert [float(f"{std:.2g}") for std in stds] == [0.027, 0.012, 0.0058, 0.0021, 0.017, 0.012, 0.0048, 0.0027]


def test_the_seeds_that_are_needed_decide():
    """With the spread of a few seeds, for an effect that is known."""
    rng = np.random.default_rng(1)
    effects = rng.normal(0.006, 0.02, (200, 6))
    needed = [compare("", effect, np.zeros(6), quantity="", margin=0.001).seeds_needed() for effect in effects]
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
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert measured == pytest.approx((values.mean(), low, high, values.mean() / values.std(ddof=1), 5))
    assert wider.high - wider.low == pytest.approx(2 * (high - low), rel=1e-5)
    expected = stats.ttest_rel(values, values[::-1]).confidence_interval()
    assert paired(values, values[::-1])[1:3] == pytest.approx((expected.low, expected.high))
    # One seed, and equal seeds.
    assert interval(np.array([0.3])) == pytest.approx((0.3, np.nan, np.nan, np.nan, 1), nan_ok=True)
    assert interval(np.full(3, -0.5)) == (-0.5, -0.5, -0.5, -np.inf, 3)


def test_each_half_of_the_seeds_chooses_for_the_other():
    loss = np.array([[0.9, 0.2, 0.7], [0.9, 0.8, 0.1], [0.9, 0.4, 0.3], [0.0, 0.9, 0.3], [0.9, 0.5, 0.9]])
    # The mean of the even seeds is lowest in epoch 1, that of the odd ones in epoch 2.
    assert (best_epochs(loss).tolist(), best_epochs(loss[:1]).tolist()) == ([2, 1, 2, 1, 2], [1])
    np.testing.assert_allclose(late_rises(loss), loss.mean(axis=1) - loss[range(5), [2, 1, 2, 1, 2]])


@pytest.mark.parametrize("seeds", [4, 32])
@pytest.mark.parametrize("flat", [True, False])
def test_intervals_at_chosen_epochs_cover_the_truth_in_95_of_100_cases(flat, seeds):
    """Curves that vary as the recorded ones do, around means that are known."""
    losses, x = np.stack([arm.validation.loss for arm in arms_of(FIRST)]), np.arange(30)
    means = losses.mean(axis=1)
    deviations = np.concatenate(list(losses - means[:, None]), axis=1)
    # 32 seeds do not determine all correlations of 60 epochs.
    covariance = 0.8 * np.cov(deviations.T) + 0.2 * np.diag(deviations.var(axis=0, ddof=1))
    means = np.array([0 * mean if flat else np.polynomial.Polynomial.fit(x, mean, 5)(x) for mean in means])
    cases, covered = 600, np.zeros(3)
    draws = np.random.default_rng(0).multivariate_normal(means.ravel(), covariance, (cases, seeds), method="cholesky")
    for loss in draws.reshape(cases, seeds, *means.shape).swapaxes(1, 2):
        chosen = np.array([best_epochs(of_arm) for of_arm in loss])
        plain, dropped = np.take_along_axis(loss, chosen[..., None], axis=2)[..., 0]
        truth = np.take_along_axis(means, chosen, axis=1).mean(axis=1)
        expected = truth[1] - truth[0], *(means[:, -LAST:].mean(axis=1) - truth)
        found = [paired(dropped, plain, width=CHOSEN_WIDTH)]
        found += [interval(late_rises(of_arm), width=CHOSEN_WIDTH) for of_arm in loss]
        covered += [one.low <= true <= one.high for one, true in zip(found, expected, strict=True)]
    assert (covered / cases > 0.94).all()


FLAT = made(curves())


@pytest.mark.parametrize(
    ("claim", "place", "arm", "supported", "refuted", "undecided"),
    [
        (RISES, 0, lambda rise: made(curves(rise=rise)), (0.08, 0.005), (0.0, 0.005), (0.02, 0.03)),
        (STAYS, 1, lambda rise: made(curves(rise=rise)), (0.0, 0.005), (0.08, 0.005), (0.02, 0.03)),
        (NARROWS, 0, lambda gap: made(curves(), gap=gap), (0.2, 0.01), (0.0, 0.01), (0.1, 0.1)),
        (CLOSES, 1, lambda gap: made(curves(), gap=gap), (0.0, 0.005), (0.1, 0.01), (0.02, 0.05)),
        (FINAL, 1, lambda level: made(curves(level=level)), (0.3, 0.01), (0.4, 0.01), (0.35, 0.1)),
        (STOPPING, 1, lambda level: made(curves(level=level)), (0.3, 0.01), (0.4, 0.01), (0.35, 0.1)),
        (ACCURACY, 1, lambda x: made(curves(), accuracy=x), (0.9, 0.01), (0.8, 0.01), (0.88, 0.01)),
    ],
)
def test_each_claim_has_each_answer(claim, place, arm, supported, refuted, undecided):
    """From the mean over the seeds of a quantity of one arm, and its noise."""
    found = []
    for mean, noise in (supported, refuted, undecided):
        arms = [FLAT, FLAT]
        arms[place] = arm(mean + noise * NOISE)
        found.append(answers(*arms)[claim])
    assert found == ["supported", "refuted", "undecided"]


VEE = 0.3 + 0.02 * np.abs(np.arange(1, EPOCHS + 1) - np.array([[10], [11]])) + 0.001 * NOISE[:, None, None]
ONE_EPOCH = made(curves()[:, :1])
LESS, MORE = made(curves() - 0.005, accuracy=0.8795), made(curves() + 0.005, accuracy=0.8805)


@pytest.mark.parametrize(
    ("claim", "plain", "dropped", "answer"),
    [
        (RISES, made(VEE[:, 0]), FLAT, "supported"),  # Lowest in epoch 10 of 20,
        (RISES, made(VEE[:, 1]), FLAT, "undecided"),  # and in epoch 11, which is not early.
        *((claim, ONE_EPOCH, ONE_EPOCH, "undecided") for claim in (RISES, STAYS)),
        # Early stopping is a rival: dropout has the lower last loss, and the plain network the lower best one.
        (FINAL, made(curves(rise=0.1, level=0.33)), made(curves(level=0.37, seed=1)), "supported"),
        (STOPPING, made(curves(rise=0.1, level=0.33)), made(curves(level=0.37, seed=1)), "refuted"),
        # Within the margin; but what is refuted is not negligible.
        *((claim, FLAT, LESS, "negligible") for claim in (FINAL, STOPPING)),
        (ACCURACY, FLAT, LESS, "refuted"),
        (FINAL, FLAT, MORE, "refuted"),
        (ACCURACY, FLAT, MORE, "negligible, at most 0.0005"),
    ],
)
def test_verdicts_at_the_edges(claim, plain, dropped, answer):
    verdict = judge(plain, dropped)[claim]
    assert f"{verdict.answer}, {verdict.note}".startswith(answer)


def test_one_seed_decides_nothing_and_few_are_weak():
    for seeds, note in enumerate(("one seed decides nothing", "weak: 2 seeds", "weak: 3 seeds", ""), start=1):
        verdicts = judge(made(curves(seeds, rise=0.1)), made(curves(seeds)))
        assert all(re.sub(r"at most [\d.]+(; )?", "", verdict.note) == note for verdict in verdicts)
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
        # NumPy takes NaN for the lowest loss, so half of the other seeds would get the epoch where a run diverged.
        (lambda: late_rises(NAN.train.loss), ValueError, "loss holds numbers that are not finite, in runs [[1]]"),
    ],
)
def test_bad_input_is_named(call, error, message, unchecked):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_holm_is_the_closed_test_of_bonferroni():
    """A claim is rejected where Bonferroni rejects every set of claims that it belongs to."""
    rng = np.random.default_rng(0)
    sets = [list(chosen) for size in range(1, 8) for chosen in itertools.combinations(range(7), size)]
    for _ in range(20):
        pairs = [(rng.normal(gain, 1, 8), rng.normal(0, 1, 8)) for gain in (3, 2, 2, 1, 1, 0, 0)]
        p = np.array([stats.ttest_rel(*pair).pvalue for pair in pairs])
        expected = [max(min(len(chosen) * min(p[chosen]), 1) for chosen in sets if i in chosen) for i in range(7)]
        found = holm([compare("better", *pair, quantity="accuracy") for pair in pairs])
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    # Equal arms and one seed are no evidence.
    same, better = NOISE, (NOISE + 1, np.roll(NOISE, 1))
    verdicts = [compare("better", *pair, quantity="x") for pair in ((same, same), better, (np.ones(1), np.zeros(1)))]
    assert holm(verdicts).tolist() == [1.0, pytest.approx(3 * stats.ttest_rel(*better).pvalue), 1.0]
