"""The statistics: from Histories to numbers, and from numbers to verdicts on the tutorial's claims.

Pure functions. Seeds are the repetitions: within a seed all arms share initial weights, batch order and dropout draws,
so arms are compared by paired differences.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import stdtrit

from fashion_jax.train import History

LEVEL = 0.95
# Halves of the seeds that choose epochs for each other are not quite independent: Student's intervals would cover the
# truth in 91 to 96% of cases, and those that are wider by this factor do in 95 to 98% (simulated, see tests).
CHOSEN_WIDTH = 1.15
# A rise or a gap below a twentieth of the losses at hand is called none.
SMALL_LOSS = 0.02
# Fewer seeds than this give intervals that mean little: with two, Student's t multiplies the standard error by 12.7.
FEW_SEEDS = 4

Answer = Literal["supported", "refuted", "undecided"]


class Summary(NamedTuple):
    """What one run says, or many: every leaf has the History's axes without the last.

    Attributes:
        best_epoch: Epoch with the lowest validation loss, from 1.
        best_loss: Validation loss there, in nats. It is the smallest of many noisy numbers, so it flatters; see
            `late_rises` for a rise that does not.
        final_loss: Validation loss after the last epoch.
        late_rise: `final_loss` minus `best_loss`.
        fair_gap: Validation loss minus training loss after the last epoch, both with dropout off.
        best_accuracy: Validation accuracy at the best epoch.
        final_accuracy: Validation accuracy after the last epoch.
    """

    best_epoch: Int[np.ndarray, "*runs"]
    best_loss: Float[np.ndarray, "*runs"]
    final_loss: Float[np.ndarray, "*runs"]
    late_rise: Float[np.ndarray, "*runs"]
    fair_gap: Float[np.ndarray, "*runs"]
    best_accuracy: Float[np.ndarray, "*runs"]
    final_accuracy: Float[np.ndarray, "*runs"]


class Interval(NamedTuple):
    """A mean over n seeds with its 95% confidence interval; the bounds are NaN for one seed.

    Attributes:
        mean: Mean over seeds.
        low: Lower bound.
        high: Upper bound.
        effect_size: Mean in units of the standard deviation over seeds (Cohen's d for paired differences).
        n: Number of seeds.
    """

    mean: float
    low: float
    high: float
    effect_size: float
    n: int

    def __str__(self) -> str:
        if self.n == 1:
            return f"{self.mean:+.4f} (one seed, no interval)"
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


class Verdict(NamedTuple):
    """A claim, the numbers that bear on it, and what they allow to say.

    Attributes:
        claim: What is claimed.
        answer: "supported", "refuted" or "undecided".
        quantity: What was measured.
        interval: The measured mean with its interval.
        note: How weak the evidence is, if it is.
    """

    claim: str
    answer: Answer
    quantity: str
    interval: Interval
    note: str


def check_history(history: History, name: str, *, axes: tuple[str, ...] | None = None) -> None:
    """Refuse what is no History.

    Args:
        history: What to look at; all leaves have one shape, whose last axis holds at least one epoch.
        name: What to call it in the error.
        axes: Names of the axes that it must have, the last of them "epochs"; any number if left out.

    Raises:
        TypeError: It is not a History of numbers.
        ValueError: Leaves have other axes, or hold nothing.

    >>> from fashion_jax.train import Metrics
    >>> curve = np.array([0.5, 0.4])
    >>> check_history(History(curve, Metrics(curve, curve), Metrics(curve, curve)), "arm", axes=("runs", "epochs"))
    Traceback (most recent call last):
    ValueError: arm must have leaves [runs, epochs], got [2]
    """
    try:
        leaves = [history.running_loss, *history.train, *history.validation]
        kinds = {np.asarray(leaf).dtype.kind for leaf in leaves}
    except (AttributeError, TypeError):
        raise TypeError(f"{name} must be a History, got {type(history).__name__}") from None
    if not kinds <= set("fiu"):
        raise TypeError(f"{name} must hold numbers, got {', '.join(str(np.asarray(leaf).dtype) for leaf in leaves)}")
    shapes = {np.shape(leaf) for leaf in leaves}
    expected = "[..., epochs]" if axes is None else f"[{', '.join(axes)}]"
    if len(shapes) > 1:
        raise ValueError(f"{name} must have leaves {expected} of one shape, got {sorted(map(list, shapes))}")
    (shape,) = shapes
    if not shape or 0 in shape or (axes is not None and len(shape) != len(axes)):
        raise ValueError(f"{name} must have leaves {expected}, got {list(shape)}")


def summarise(history: History) -> Summary:
    """Reduce each run to a few numbers.

    Args:
        history: Leaves [..., epochs].

    Raises:
        TypeError: It is not a History.
        ValueError: Its leaves have other axes, there is no epoch, or a loss or an accuracy is not finite, as of a lane
            that was stopped.

    >>> from fashion_jax.train import Metrics
    >>> curve = np.array([0.5, 0.4, 0.45])
    >>> summary = summarise(History(curve, Metrics(curve - 0.1, curve), Metrics(curve, 1 - curve)))
    >>> int(summary.best_epoch), float(summary.late_rise.round(3)), float(summary.fair_gap.round(3))
    (2, 0.05, 0.1)
    """
    check_history(history, "history")
    loss = np.asarray(history.validation.loss, np.float64)
    accuracy = np.asarray(history.validation.accuracy, np.float64)
    training_loss = np.asarray(history.train.loss, np.float64)
    finite = np.isfinite(np.stack([loss, accuracy, training_loss])).all(axis=(0, -1))
    _check_finite(finite, "history", "runs")
    best = loss.argmin(axis=-1)
    best_loss, best_accuracy = _at(loss, best), _at(accuracy, best)
    final_loss = np.asarray(loss[..., -1])
    return Summary(
        np.asarray(best + 1),
        best_loss,
        final_loss,
        np.asarray(final_loss - best_loss),
        np.asarray(final_loss - training_loss[..., -1]),
        best_accuracy,
        np.asarray(accuracy[..., -1]),
    )


def interval(values: Float[np.ndarray, " seeds"], *, width: float = 1.0) -> Interval:
    """Give the mean over seeds and its 95% interval.

    Args:
        values: One number a seed.
        width: How many times as wide as Student's the interval is to be.

    Raises:
        TypeError: The values are no numbers.
        ValueError: There is no seed, a value is not finite, or `width` is not positive.

    Source: Student, "The Probable Error of a Mean", Biometrika 6 (1908).

    >>> print(interval(np.array([1.0, 2.0, 3.0])))
    +2.0000 [-0.4841, +4.4841]
    """
    values = _by_seed(values, "values")
    if not width > 0:
        raise ValueError(f"width must be positive, got {width}")
    mean, n = float(values.mean()), len(values)
    if n == 1:
        return Interval(mean, np.nan, np.nan, np.nan, 1)
    sd = float(values.std(ddof=1))
    if sd <= 1e-12 * abs(mean):
        return Interval(mean, mean, mean, np.copysign(np.inf, mean) if mean else 0.0, n)
    # What scipy.stats.t.ppf calls; all of scipy.stats would take half a second to import.
    half = width * sd / np.sqrt(n) * stdtrit(n - 1, (1 + LEVEL) / 2)
    return Interval(mean, float(mean - half), float(mean + half), mean / sd, n)


def paired(first: Float[np.ndarray, " seeds"], second: Float[np.ndarray, " seeds"], *, width: float = 1.0) -> Interval:
    """Compare two arms that share their seeds: the interval of `first - second`.

    Args:
        first: One number a seed.
        second: The same seeds in the other arm.
        width: How many times as wide as Student's the interval is to be.

    Raises:
        TypeError: The values are no numbers.
        ValueError: The arms differ in their number of seeds, there is no seed, or a value is not finite.

    >>> paired(np.array([0.38, 0.37]), np.array([0.42, 0.43])).mean.__round__(3)
    -0.05
    """
    first, second = _by_seed(first, "first"), _by_seed(second, "second")
    if first.shape != second.shape:
        raise ValueError(f"paired arms must have the same seeds, got {list(first.shape)} and {list(second.shape)}")
    return interval(first - second, width=width)


def best_epochs(loss: Float[np.ndarray, "seeds epochs"]) -> Int[np.ndarray, " seeds"]:
    """Choose for each seed the epoch at which the mean loss of the other half of the seeds is lowest, from 0.

    A run's own lowest loss is lowest partly by luck. An epoch that other runs chose carries none of that run's luck.
    If all the others chose, most seeds would get one epoch, and all the luck that made it the lowest: the differences
    at such epochs vary together, and Student's t takes them for independent.

    Args:
        loss: One curve a seed; first, third, ... seed are one half. A single seed can choose for itself alone.

    Raises:
        TypeError: The losses are no numbers.
        ValueError: There are other axes, there is no seed or no epoch, or a loss is not finite.

    Source: cross-fitting with two folds, as in Chernozhukov et al., "Double/debiased machine learning", 2018.

    >>> best_epochs(np.array([[3.0, 1.0, 2.0], [3.0, 2.0, 1.0]])).tolist()
    [2, 1]
    """
    loss = _curves(loss)
    if len(loss) == 1:
        return loss.argmin(axis=1)
    chosen = [loss[half::2].mean(axis=0).argmin() for half in (0, 1)]
    return np.array([chosen[1 - seed % 2] for seed in range(len(loss))])


def late_rises(loss: Float[np.ndarray, "seeds epochs"]) -> Float[np.ndarray, " seeds"]:
    """Tell how much higher each run's last loss is than its loss at the epoch that `best_epochs` gives.

    Unlike the end minus the minimum this can be negative, and is 0 on average for a flat noisy curve.

    Args:
        loss: One curve a seed.

    Raises:
        TypeError: The losses are no numbers.
        ValueError: There are other axes, there is no seed or no epoch, or a loss is not finite.

    >>> late_rises(np.array([[3.0, 1.0, 2.0], [3.0, 2.0, 1.5]])).tolist()
    [0.0, -0.5]
    """
    loss = _curves(loss)
    return loss[:, -1] - _at(loss, best_epochs(loss))


def judge(plain: History, dropout: History) -> list[Verdict]:
    """Check the tutorial's claims against runs without and with dropout.

    A claim is supported or refuted when the whole 95% interval lies on one side, and undecided otherwise. One seed
    decides nothing.

    Args:
        plain: Runs without dropout; leaves [seeds, epochs].
        dropout: Runs with dropout, of the same seeds.

    Returns:
        One verdict a claim.

    Raises:
        TypeError: An arm is not a History.
        ValueError: Leaves have other axes, the arms do not share their seeds, or a number is not finite.

    >>> from fashion_jax.train import Metrics
    >>> up, flat = np.array([[0.4, 0.5], [0.4, 0.51]]), np.array([[0.4, 0.4], [0.41, 0.4]])
    >>> arms = [History(loss, Metrics(loss, 1 - loss), Metrics(loss, 1 - loss)) for loss in (up, flat)]
    >>> judge(*arms)[0].answer
    'supported'
    """
    check_history(plain, "plain")
    check_history(dropout, "dropout")
    losses = [np.asarray(history.validation.loss, np.float64) for history in (plain, dropout)]
    if losses[0].ndim != 2 or losses[0].shape != losses[1].shape:
        raise ValueError(
            f"both arms must have leaves [seeds, epochs] of the same seeds, got {[list(loss.shape) for loss in losses]}"
        )
    without, with_dropout = summarise(plain), summarise(dropout)
    rises = [interval(late_rises(loss), width=CHOSEN_WIDTH) for loss in losses]
    gap = interval(with_dropout.fair_gap)
    chosen = [_at(loss, best_epochs(loss)) for loss in losses]
    epochs = losses[0].shape[1]
    early = losses[0].mean(axis=0).argmin() + 1 <= epochs / 2

    rise = "rise from the best epoch to the last"
    # From a single epoch nothing can rise, and nothing can fail to.
    rose: list[Answer] = ["undecided" if epochs == 1 else _above(measured, SMALL_LOSS) for measured in rises]
    return [
        _verdict(
            "without dropout the validation loss turns early and rises",
            rose[0] if early or rose[0] != "supported" else "undecided",
            f"{rise}, above {SMALL_LOSS}",
            rises[0],
        ),
        _verdict("with dropout it does not", _opposite(rose[1]), f"{rise}, below {SMALL_LOSS}", rises[1]),
        _verdict(
            "dropout narrows the gap",
            _above(narrowed := paired(without.fair_gap, with_dropout.fair_gap), 0.0),
            "fair gap, without minus with",
            narrowed,
        ),
        _verdict(
            "dropout closes the gap",
            _opposite(_above(gap, SMALL_LOSS)),
            f"fair gap with dropout, below {SMALL_LOSS}",
            gap,
        ),
        _verdict(
            "dropout lowers the final validation loss",
            _opposite(_above(loss := paired(with_dropout.final_loss, without.final_loss), 0.0)),
            "final loss, with minus without",
            loss,
        ),
        _verdict(
            "dropout lowers the validation loss more than stopping early does",
            _opposite(_above(stopped := paired(chosen[1], chosen[0], width=CHOSEN_WIDTH), 0.0)),
            "loss at the best epoch, with minus without",
            stopped,
        ),
        _verdict(
            "dropout raises accuracy",
            _above(accuracy := paired(with_dropout.final_accuracy, without.final_accuracy), 0.0),
            "final accuracy, with minus without",
            accuracy,
        ),
    ]


def compare(
    claim: str, first: Float[np.ndarray, " seeds"], second: Float[np.ndarray, " seeds"], *, quantity: str
) -> Verdict:
    """Check the claim that one arm has the higher numbers of two.

    It is supported when the whole 95% interval of the paired differences is above 0, refuted when it is below, and
    undecided otherwise. One seed decides nothing.

    Args:
        claim: What is claimed.
        first: One number a seed, in the arm that is said to have the higher ones.
        second: The same seeds in the other arm.
        quantity: What the numbers are.

    Raises:
        TypeError: The values are no numbers.
        ValueError: The arms differ in their number of seeds, there is no seed, or a value is not finite.

    >>> compare("it helps", np.array([0.9, 0.91]), np.array([0.8, 0.812]), quantity="accuracy").answer
    'supported'
    """
    difference = paired(first, second)
    return _verdict(claim, _above(difference, 0.0), quantity, difference)


def _numbers(values, name: str) -> np.ndarray:
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must hold numbers, got {values!r}") from None


def _by_seed(values, name: str) -> np.ndarray:
    values = _numbers(values, name)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name} must have shape [seeds] with at least one seed, got {list(values.shape)}")
    _check_finite(np.isfinite(values), name, "seeds")
    return values


def _curves(loss) -> np.ndarray:
    loss = _numbers(loss, "loss")
    if loss.ndim != 2 or not loss.size:
        raise ValueError(f"loss must have shape [seeds, epochs] with at least one of each, got {list(loss.shape)}")
    # NumPy takes NaN for the lowest, so one stopped run would choose the epoch of half of the others.
    _check_finite(np.isfinite(loss).all(axis=1), "loss", "seeds")
    return loss


def _check_finite(finite, name: str, axis: str) -> None:
    """Refuse what is not finite; `finite` tells for each run, or each seed, whether all of it is."""
    if not np.all(finite):
        lost = np.argwhere(~finite).tolist()
        raise ValueError(f"{name} holds numbers that are not finite, in {axis} {lost}; leave them out, from every arm")


def _at(curves, epochs):
    return np.asarray(np.take_along_axis(curves, np.asarray(epochs)[..., None], axis=-1)[..., 0])


def _above(measured: Interval, threshold: float) -> Answer:
    if measured.low > threshold:
        return "supported"
    return "refuted" if measured.high < threshold else "undecided"


def _opposite(answer: Answer) -> Answer:
    opposites: dict[Answer, Answer] = {"supported": "refuted", "refuted": "supported", "undecided": "undecided"}
    return opposites[answer]


def _verdict(claim: str, answer: Answer, quantity: str, measured: Interval) -> Verdict:
    note = ""
    if measured.n == 1:
        note = "one seed decides nothing"
    elif measured.n < FEW_SEEDS:
        note = f"weak: {measured.n} seeds"
    return Verdict(claim, answer, quantity, measured, note)
