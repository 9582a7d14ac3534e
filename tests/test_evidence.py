"""The statistics against their definitions and by simulation, and every verdict driven to all three answers."""

import json

import numpy as np
import pytest
from scipy import stats

from benchmarks.harness import RECORDS
from fashion_jax import History, Metrics, evidence
from fashion_jax.evidence import best_epochs, compare, interval, judge, late_rises, paired, summarise

EPOCHS = 20


def made(loss, *, gap=0.1, accuracy=0.88) -> History:
    """A History of [seeds, epochs] with a given validation loss, fair gap and accuracy."""
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


def answers(plain, dropout):
    return {verdict.claim: verdict.answer for verdict in judge(plain, dropout)}


def test_summary_by_hand():
    loss = np.array([[0.5, 0.4, 0.45, 0.6], [0.5, 0.45, 0.4, 0.42]])
    accuracy = np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]])
    train_loss = np.array([[0.5, 0.3, 0.2, 0.1], [0.5, 0.4, 0.3, 0.3]])
    summary = summarise(History(loss, Metrics(train_loss, accuracy), Metrics(loss, accuracy)))
    assert summary.best_epoch.tolist() == [2, 3]
    assert summary.best_loss.tolist() == [0.4, 0.4]
    assert summary.final_loss.tolist() == [0.6, 0.42]
    np.testing.assert_allclose(summary.late_rise, [0.2, 0.02])
    np.testing.assert_allclose(summary.fair_gap, [0.5, 0.12])
    assert summary.best_accuracy.tolist() == [0.2, 0.7]
    assert summary.final_accuracy.tolist() == [0.4, 0.8]
    one = summarise(History(loss[0], Metrics(train_loss[0], accuracy[0]), Metrics(loss[0], accuracy[0])))
    assert one.best_epoch == 2
    assert one.late_rise == pytest.approx(0.2)


def test_interval_is_student_s_t():
    values = np.array([0.1, 0.4, 0.2, 0.7, 0.5])
    half = stats.t.ppf(0.975, 4) * values.std(ddof=1) / np.sqrt(5)
    measured = interval(values)
    assert measured.mean == pytest.approx(values.mean())
    assert (measured.low, measured.high) == pytest.approx((values.mean() - half, values.mean() + half))
    assert measured.effect_size == pytest.approx(values.mean() / values.std(ddof=1))
    assert measured.n == 5


def test_interval_covers_the_truth_in_95_of_100_cases():
    rng = np.random.default_rng(1)
    intervals = [interval(rng.standard_normal(6) + 3.0) for _ in range(3_000)]
    covered = np.mean([measured.low < 3.0 < measured.high for measured in intervals])
    assert covered == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / 3_000))


def test_one_seed_has_no_interval():
    measured = interval(np.array([0.3]))
    assert measured.mean == 0.3
    assert np.isnan([measured.low, measured.high, measured.effect_size]).all()
    assert "no interval" in str(measured)


def test_equal_seeds_have_an_interval_of_no_width():
    assert interval(np.array([0.5, 0.5]))[:3] == (0.5, 0.5, 0.5)
    assert interval(np.zeros(3)).effect_size == 0
    assert interval(np.full(3, -0.5)).effect_size == -np.inf


def test_pairing_removes_what_seeds_share(unchecked):
    rng = np.random.default_rng(2)
    shared = rng.standard_normal(8)
    second = shared + 0.1 + 0.01 * rng.standard_normal(8)
    difference = paired(second, shared)
    assert difference.low > 0.05
    assert difference.high - difference.low < 0.1 * (interval(second).high - interval(second).low)
    with pytest.raises(ValueError, match="same seeds"):
        paired(shared, second[:5])
    with pytest.raises(ValueError, match="at least one seed"):
        interval(np.array([]))


def test_each_half_of_the_seeds_chooses_for_the_other():
    loss = np.array([[0.9, 0.2, 0.7], [0.9, 0.8, 0.1], [0.9, 0.4, 0.3], [0.0, 0.9, 0.3], [0.9, 0.5, 0.9]])
    expected = [loss[[1, 3]].mean(axis=0).argmin(), loss[[0, 2, 4]].mean(axis=0).argmin()]
    assert expected == [2, 1]
    assert evidence.best_epochs(loss).tolist() == [2, 1, 2, 1, 2]
    assert evidence.best_epochs(loss[:1]).tolist() == [1]


def test_an_epoch_chosen_by_the_others_does_not_flatter():
    """The trap: the minimum of a noisy flat curve lies below its end, although nothing rises."""
    flat = np.random.default_rng(3).normal(0.4, 0.01, (4_000, EPOCHS))
    assert summarise(made(flat)).late_rise.mean() > 0.01
    honest = [late_rises(group).mean() for group in flat.reshape(500, 8, EPOCHS)]
    assert abs(np.mean(honest)) < 4 * np.std(honest) / np.sqrt(500)


@pytest.fixture(scope="module")
def recorded():
    """The validation losses of a committed run: [arms, 32 seeds, 30 epochs]."""
    path = RECORDS / "2026-11-24-amd-epyc-2-cores" / "seeds32" / "history.json"
    return np.array([arm["validation"]["loss"] for arm in json.loads(path.read_text())["arms"].values()])


@pytest.mark.parametrize("seeds", [4, 32])
@pytest.mark.parametrize("shape", ["flat", "recorded"])
def test_intervals_at_chosen_epochs_cover_the_truth_in_95_of_100_cases(recorded, shape, seeds):
    """Curves that vary as the recorded ones do, around means that are known."""
    arms, _, epochs = recorded.shape
    deviations = np.concatenate(list(recorded - recorded.mean(axis=1, keepdims=True)), axis=1)
    # 32 seeds do not tell all correlations of 60 epochs.
    covariance = 0.8 * np.cov(deviations.T) + 0.2 * np.diag(deviations.var(axis=0, ddof=1))
    means = np.zeros((arms, epochs))
    if shape == "recorded":
        x = np.arange(epochs)
        means = np.array([np.polynomial.Polynomial.fit(x, mean, 5)(x) for mean in recorded.mean(axis=1)])
    cases, covered, every = 1_000, np.zeros(3), np.arange(seeds)
    draws = np.random.default_rng(0).multivariate_normal(means.ravel(), covariance, (cases, seeds), method="cholesky")
    for losses in draws.reshape(cases, seeds, arms, epochs):
        chosen = [evidence.best_epochs(losses[:, arm]) for arm in range(arms)]
        there = [losses[every, arm, chosen[arm]] for arm in range(arms)]
        truth = [means[arm, chosen[arm]].mean() for arm in range(arms)]
        found = [paired(there[1], there[0], width=evidence.CHOSEN_WIDTH)]
        found += [interval(late_rises(losses[:, arm]), width=evidence.CHOSEN_WIDTH) for arm in range(arms)]
        expected = truth[1] - truth[0], means[0, -1] - truth[0], means[1, -1] - truth[1]
        covered += [one.low <= true <= one.high for one, true in zip(found, expected, strict=True)]
    assert (covered / cases > 0.94).all()


@pytest.mark.parametrize(
    ("rise", "rise_noise", "answer"),
    [(0.08, 0.005, "supported"), (0.0, 0.005, "refuted"), (0.02, 0.03, "undecided")],
)
def test_without_dropout_the_loss_turns_early_and_rises(rise, rise_noise, answer):
    plain = made(curves(rise=rise, rise_noise=rise_noise))
    assert answers(plain, made(curves()))["without dropout the validation loss turns early and rises"] == answer


def test_a_late_turn_is_not_an_early_one():
    loss = np.concatenate([np.linspace(0.6, 0.3, EPOCHS - 2), [0.4, 0.45]]) + np.random.default_rng(4).normal(
        0, 1e-3, (8, EPOCHS)
    )
    claim = "without dropout the validation loss turns early and rises"
    assert answers(made(loss), made(curves()))[claim] == "undecided"


@pytest.mark.parametrize(
    ("rise", "rise_noise", "answer"),
    [(0.0, 0.005, "supported"), (0.08, 0.005, "refuted"), (0.02, 0.03, "undecided")],
)
def test_with_dropout_it_does_not(rise, rise_noise, answer):
    dropout = made(curves(rise=rise, rise_noise=rise_noise))
    assert answers(made(curves()), dropout)["with dropout it does not"] == answer


NOISE = np.random.default_rng(5).normal(0, 1, 8)


@pytest.mark.parametrize(
    ("shift", "noise", "answer"), [(0.1, 0.01, "supported"), (-0.1, 0.01, "refuted"), (0.0, 0.1, "undecided")]
)
def test_dropout_narrows_the_gap(shift, noise, answer):
    plain, dropout = made(curves(), gap=0.2 + shift + noise * NOISE), made(curves(), gap=np.full(8, 0.2))
    assert answers(plain, dropout)["dropout narrows the gap"] == answer


@pytest.mark.parametrize(
    ("gap", "noise", "answer"), [(0.0, 0.005, "supported"), (0.1, 0.01, "refuted"), (0.02, 0.05, "undecided")]
)
def test_dropout_closes_the_gap(gap, noise, answer):
    assert answers(made(curves()), made(curves(), gap=gap + noise * NOISE))["dropout closes the gap"] == answer


@pytest.mark.parametrize(
    ("shift", "noise", "answer"), [(-0.05, 0.01, "supported"), (0.05, 0.01, "refuted"), (0.0, 0.1, "undecided")]
)
@pytest.mark.parametrize(
    "claim",
    [
        "dropout lowers the final validation loss",
        "dropout lowers the validation loss more than stopping early does",
    ],
)
def test_dropout_lowers_the_loss(claim, shift, noise, answer):
    plain = curves()
    assert answers(made(plain), made(plain + (shift + noise * NOISE)[:, None]))[claim] == answer


def test_stopping_early_is_a_rival():
    """Dropout has the lower last loss, and the plain net the lower best one."""
    plain, dropout = made(curves(rise=0.1, level=0.33)), made(curves(level=0.37, seed=1))
    verdicts = answers(plain, dropout)
    assert verdicts["dropout lowers the final validation loss"] == "supported"
    assert verdicts["dropout lowers the validation loss more than stopping early does"] == "refuted"


@pytest.mark.parametrize(
    ("shift", "noise", "answer"), [(0.02, 0.003, "supported"), (-0.02, 0.003, "refuted"), (0.0, 0.01, "undecided")]
)
def test_dropout_raises_accuracy(shift, noise, answer):
    plain, dropout = made(curves(), accuracy=np.full(8, 0.88)), made(curves(), accuracy=0.88 + shift + noise * NOISE)
    assert answers(plain, dropout)["dropout raises accuracy"] == answer


def test_the_recorded_verdict_on_stopping_early_does_not_hang_on_the_split(recorded):
    rng, means = np.random.default_rng(0), []
    for _ in range(200):
        plain, dropout = recorded[:, rng.permutation(recorded.shape[1])]
        verdict = {v.claim: v for v in judge(made(plain), made(dropout))}[
            "dropout lowers the validation loss more than stopping early does"
        ]
        means.append(verdict.interval.mean)
        assert verdict.answer != "supported"
    assert min(means) > 0


def test_from_a_single_epoch_nothing_rises():
    verdicts = answers(made(curves()[:, :1]), made(curves(seed=1)[:, :1]))
    assert verdicts["without dropout the validation loss turns early and rises"] == "undecided"
    assert verdicts["with dropout it does not"] == "undecided"


def test_one_seed_decides_nothing_and_few_are_weak():
    for seeds, note in ((1, "one seed decides nothing"), (2, "weak: 2 seeds"), (3, "weak: 3 seeds"), (4, "")):
        verdicts = judge(made(curves(seeds, rise=0.1)), made(curves(seeds)))
        assert {verdict.note for verdict in verdicts} == {note}
        if seeds == 1:
            assert {verdict.answer for verdict in verdicts} == {"undecided"}


def test_arms_must_share_their_seeds():
    with pytest.raises(ValueError, match=r"\[seeds, epochs\] of the same seeds"):
        judge(made(curves(4)), made(curves(5)))
    with pytest.raises(ValueError, match=r"\[seeds, epochs\] of the same seeds"):
        judge(made(curves(4)[0]), made(curves(4)[0]))


def test_a_verdict_carries_its_numbers():
    plain, dropout = made(curves(rise=0.08)), made(curves(seed=1))
    verdict = next(v for v in judge(plain, dropout) if v.claim == "dropout lowers the final validation loss")
    difference = np.asarray(dropout.validation.loss)[:, -1] - np.asarray(plain.validation.loss)[:, -1]
    assert verdict.interval == evidence.interval(difference)
    assert str(verdict.interval) == (
        f"{verdict.interval.mean:+.4f} [{verdict.interval.low:+.4f}, {verdict.interval.high:+.4f}]"
    )


def test_no_verdict_rests_on_a_run_s_own_lowest_loss():
    """Of a flat noisy curve it lies far below the curve."""
    noisy = np.random.default_rng(6).normal(0.4, 0.02, (200, EPOCHS))
    verdicts = answers(made(noisy), made(np.full_like(noisy, 0.39)))
    assert verdicts["without dropout the validation loss turns early and rises"] == "refuted"
    assert verdicts["dropout lowers the validation loss more than stopping early does"] == "supported"
    assert answers(made(np.full_like(noisy, 0.39)), made(noisy))["with dropout it does not"] == "supported"


@pytest.mark.parametrize(("lowest", "answer"), [(10, "supported"), (11, "undecided")])
def test_early_is_the_first_half_of_the_epochs(lowest, answer):
    loss = 0.3 + 0.02 * np.abs(np.arange(1, EPOCHS + 1) - lowest) + 0.001 * NOISE[:, None]
    claim = "without dropout the validation loss turns early and rises"
    assert answers(made(loss), made(curves()))[claim] == answer


def test_a_loss_that_falls_to_the_end_does_not_turn():
    loss = np.linspace(0.6, 0.3, EPOCHS) + 0.001 * NOISE[:, None]
    assert answers(made(loss), made(curves()))["without dropout the validation loss turns early and rises"] == "refuted"


def test_the_accuracy_that_is_judged_is_the_last_one():
    """At its best epoch the plain network is the more accurate one, in the end it is not."""
    plain, dropout = made(curves(rise=0.1)), made(curves(rise=0.1), accuracy=np.full(8, 0.85))
    falling = np.linspace(0.9, 0.8, EPOCHS) + 0.001 * NOISE[:, None]
    plain = plain._replace(validation=plain.validation._replace(accuracy=falling))
    assert answers(plain, dropout)["dropout raises accuracy"] == "supported"


def test_a_training_loss_that_nobody_measured_is_refused():
    """As in PyTorch's curves."""
    arm = made(curves(2))
    unknown = np.full((2, EPOCHS), np.nan)
    with pytest.raises(ValueError, match=r"numbers that are not finite, in runs \[\[0\], \[1\]\]"):
        summarise(arm._replace(train=Metrics(unknown, unknown)))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_stopped_run_does_not_choose_for_the_others(wrong):
    """NumPy takes NaN for the lowest loss, so half of the others would get the epoch where it stopped."""
    loss = curves(rise=0.15)
    loss[1, 3:] = wrong
    for choose in (best_epochs, late_rises):
        with pytest.raises(ValueError, match=r"loss holds numbers that are not finite, in seeds \[\[1\]\]"):
            choose(loss)


@pytest.mark.parametrize("wrong", [np.nan, -np.inf])
def test_numbers_that_are_not_finite_have_no_interval(wrong):
    numbers, good = np.array([1.0, wrong, 2.0]), np.ones(3)
    calls = {
        "values": lambda: interval(numbers),
        "first": lambda: paired(numbers, good),
        "second": lambda: compare("it helps", good, numbers, quantity="accuracy"),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"{name} holds numbers that are not finite, in seeds \[\[1\]\]"):
            call()


@pytest.mark.parametrize("width", [0.0, -1.0, np.nan])
def test_an_interval_has_a_width(width):
    with pytest.raises(ValueError, match="width must be positive, got"):
        interval(np.arange(3.0), width=width)


def test_an_accuracy_that_is_not_finite_is_refused():
    accuracy = np.full((2, EPOCHS), 0.88)
    accuracy[1, 0] = np.nan
    arm = made(curves(2))
    arm = arm._replace(validation=arm.validation._replace(accuracy=accuracy))
    for call in (lambda: summarise(arm), lambda: judge(made(curves(2)), arm)):
        with pytest.raises(ValueError, match=r"not finite, in runs \[\[1\]\]"):
            call()
