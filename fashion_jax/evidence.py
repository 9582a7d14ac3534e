"""The statistics: from histories to numbers, and from numbers to verdicts on the tutorial's claims.

Pure functions. Seeds are the repetitions: within a seed all arms share initial weights, batch order and dropout draws,
so arms are compared by paired differences.
"""

import warnings
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from fashion_jax import _checks
from fashion_jax.types import History

LEVEL = 0.95
# Halves of the seeds that choose epochs for each other are not quite independent: Student's intervals cover the truth
# in 91 to 94% of cases, intervals wider by this factor in 94 to 96% (simulated in the tests).
CHOSEN_WIDTH = 1.15
# "Final" is the mean of as many epochs at the end: single epochs are noisy, and a seed hardly differs from another.
LAST = 5
# Below these margins a difference means nothing: a twentieth of the losses at hand, and 20 of 10,000 images.
LOSS_MARGIN, ACCURACY_MARGIN = 0.02, 0.002
MOST_SEEDS = 10_000
# With fewer seeds intervals say little: for two, Student's t multiplies the standard error by 12.7.
FEW_SEEDS = 4

Answer = Literal["supported", "refuted", "negligible", "undecided"]
Side = Literal["above", "below"]
PerSeed = Float[Array | np.ndarray, " seeds"]
Curves = Float[Array | np.ndarray, "*runs epochs"]


class Summary(NamedTuple):
    """A few numbers for each run; every leaf has the axes of the history but the last.

    "best" is the epoch with the run's lowest validation loss, counted from 1. The smallest of many noisy numbers is
    biased downward; `late_rises` has a rise that is not. "final" is the mean of the last five epochs (of all, if there
    are fewer). `late_rise` is `final_loss` minus `best_loss`, and `gap` is the final validation loss minus the final
    training loss (eval mode).
    """

    best_epoch: Int[np.ndarray, "*runs"]
    best_loss: Float[np.ndarray, "*runs"]
    final_loss: Float[np.ndarray, "*runs"]
    late_rise: Float[np.ndarray, "*runs"]
    gap: Float[np.ndarray, "*runs"]
    best_accuracy: Float[np.ndarray, "*runs"]
    final_accuracy: Float[np.ndarray, "*runs"]


class Interval(NamedTuple):
    """A mean over n seeds and its 95% confidence interval, with NaN as bounds for one seed.

    `effect_size` is the mean in units of the standard deviation over seeds (Cohen's d for paired differences).
    """

    mean: float
    low: float
    high: float
    effect_size: float
    n: int

    def __str__(self) -> str:
        bounds = "(one seed, no interval)" if self.n == 1 else f"[{self.low:+.4f}, {self.high:+.4f}]"
        return f"{self.mean:+.4f} {bounds}"


class Verdict(NamedTuple):
    """A claim, the answer, and the quantity that was measured.

    Attributes:
        claim: The claim, in words.
        answer: "refuted" if the whole interval lies on the other side of the threshold. Else "negligible" if it lies
            within the margin around 0, "supported" if it lies on the side that is claimed, "undecided" if on neither.
        quantity: The quantity and, if it is not 0, the threshold.
        interval: Its mean and 95% interval.
        threshold: Where the claim begins to hold.
        margin: The largest difference that means nothing.
        note: The largest effect that is not excluded, where that matters, and a warning of few seeds.
    """

    claim: str
    answer: Answer
    quantity: str
    interval: Interval
    threshold: float
    margin: float
    note: str

    def seeds_needed(self) -> int | None:
        """Estimate how many seeds would decide the claim, if mean and std stay as measured; None if they are unknown.

        >>> compare("it helps", np.array([0.9, 0.8, 0.9]), np.array([0.8, 0.8, 0.8]), quantity="x").seeds_needed()
        6
        """
        from scipy.special import stdtrit

        mean, low, _, _, n = self.interval
        if n == 1 or self.answer != "undecided":
            return None if n == 1 else n
        std = (mean - low) * np.sqrt(n) / stdtrit(n - 1, (1 + LEVEL) / 2)
        seeds = np.arange(2, MOST_SEEDS + 1)
        half = std / np.sqrt(seeds) * stdtrit(seeds - 1, (1 + LEVEL) / 2)
        # From the threshold, or inside the margin.
        decided = half < max(abs(mean - self.threshold), self.margin - abs(mean) if not self.threshold else 0)
        return int(seeds[decided.argmax()]) if decided.any() else MOST_SEEDS


def summarize(history: History) -> Summary:
    """Reduce each run to a few numbers.

    Args:
        history: Leaves [..., epochs].

    Raises:
        TypeError: It is not a History.
        ValueError: Leaves differ in shape, there is no epoch, or a number is not finite, as in a diverged run.

    >>> from fashion_jax.types import Metrics
    >>> curve = np.array([0.5, 0.4, 0.45])
    >>> summary = summarize(History(curve, Metrics(curve - 0.1, curve), Metrics(curve, 1 - curve)))
    >>> int(summary.best_epoch), float(summary.late_rise.round(3)), float(summary.gap.round(3))
    (2, 0.05, 0.1)
    """
    whole, history = history, _checks.history("history", history)
    loss, accuracy = history.validation.loss, history.validation.accuracy
    best = np.asarray(loss.argmin(axis=-1))
    best_loss, final_loss = _at(loss, best), _final(loss)
    return Summary(
        best_epoch=_checks.evaluated(whole)[best],
        best_loss=best_loss,
        final_loss=final_loss,
        late_rise=final_loss - best_loss,
        gap=final_loss - _final(history.train.loss),
        best_accuracy=_at(accuracy, best),
        final_accuracy=_final(accuracy),
    )


def interval(values: PerSeed, *, width: float = 1.0) -> Interval:
    """Compute the mean over seeds and its 95% interval, `width` times as wide as Student's.

    Raises:
        ValueError: There is no seed, or a value is not finite.

    Source: Student, "The Probable Error of a Mean", Biometrika 6 (1908).

    >>> print(interval(np.array([1.0, 2.0, 3.0])))
    +2.0000 [-0.4841, +4.4841]
    """
    # Imported here because it takes half as long as JAX; scipy.stats, whose t.ppf calls this, takes longer.
    from scipy.special import stdtrit

    values = _numbers("values", values, "seeds")
    mean, n = values.mean(), len(values)
    if n == 1:
        return Interval(float(mean), np.nan, np.nan, np.nan, 1)
    std = values.std(ddof=1)
    half = width * std / np.sqrt(n) * stdtrit(n - 1, (1 + LEVEL) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Interval(float(mean), float(mean - half), float(mean + half), float(mean / std), n)


def paired(first: PerSeed, second: PerSeed, *, width: float = 1.0) -> Interval:
    """Compute the `interval` of `first - second`, two arms that share their seeds.

    Raises:
        ValueError: The arms differ in their number of seeds, there is no seed, or a value is not finite.

    >>> paired(np.array([0.38, 0.37]), np.array([0.42, 0.43])).mean.__round__(3)
    -0.05
    """
    first, second = _numbers("first", first, "seeds"), _numbers("second", second, "seeds")
    if len(first) != len(second):
        raise ValueError(f"first and second must have the same seeds, got {len(first)} and {len(second)}")
    return interval(first - second, width=width)


def best_epochs(loss: Curves) -> Int[np.ndarray, " seeds"]:
    """Choose for each seed the epoch, from 0, at which the mean loss of the other half of the seeds is lowest.

    A run's own lowest loss is lowest partly by luck; an epoch that other runs chose carries none of it. If all the
    others chose, most seeds would share one epoch, and the luck that made it the lowest: Student's t would take
    dependent differences for independent ones. One half is every other seed; a single seed chooses for itself.

    Raises:
        ValueError: There is no seed or no epoch, or a loss is not finite.

    Source: cross-fitting with two folds, as in Chernozhukov et al., "Double/debiased machine learning", 2018.

    >>> best_epochs(np.array([[3.0, 1.0, 2.0], [3.0, 2.0, 1.0]])).tolist()
    [2, 1]
    """
    loss = _numbers("loss", loss, "seeds", "epochs")
    if len(loss) == 1:
        return loss.argmin(axis=1)
    chosen = [loss[half::2].mean(axis=0).argmin() for half in (0, 1)]
    return np.array([chosen[1 - seed % 2] for seed in range(len(loss))])


def late_rises(loss: Curves) -> Float[np.ndarray, " seeds"]:
    """Compute each run's final loss, the mean of the last five epochs, minus its loss at the epoch from `best_epochs`.

    Unlike the final loss minus the lowest this can be negative, and is 0 on average for a flat noisy curve.

    >>> late_rises(np.array([[2.0, 1.0, 2.0, 2.0, 2.0, 2.0], [2.0, 2.0, 1.5, 2.0, 2.0, 2.0]])).round(2).tolist()
    [-0.2, -0.1]
    """
    loss = _numbers("loss", loss, "seeds", "epochs")
    return _final(loss) - _at(loss, best_epochs(loss))


def judge(
    plain: History,
    dropped: History,
    *,
    name: str = "dropout",
    loss_margin: float = LOSS_MARGIN,
    accuracy_margin: float = ACCURACY_MARGIN,
) -> list[Verdict]:
    """Check the tutorial's claims against runs without and with dropout.

    One seed decides nothing.

    Args:
        plain: Runs without dropout; leaves [seeds, epochs].
        dropped: Runs with dropout, of the same seeds.
        name: The second arm in claims, such as "dropout 0.2".
        loss_margin: The largest difference of losses that means nothing, in nats.
        accuracy_margin: The same of accuracies.

    Raises:
        TypeError: An arm is not a History.
        ValueError: Leaves have other axes, the arms differ in shape, or a number is not finite.

    >>> from fashion_jax.types import Metrics
    >>> up, flat = np.array([[0.3, 0.5], [0.3, 0.51]]), np.array([[0.4, 0.4], [0.41, 0.4]])
    >>> arms = [History(loss, Metrics(loss, 1 - loss), Metrics(loss, 1 - loss)) for loss in (up, flat)]
    >>> judge(*arms)[0].answer
    'supported'
    """
    plain = _checks.history("plain", plain, "seeds", "epochs")
    dropped = _checks.history("dropped", dropped, "seeds", "epochs")
    losses = plain.validation.loss, dropped.validation.loss
    if losses[0].shape != losses[1].shape:
        raise ValueError(f"plain and dropped must have the same seeds, got {[list(loss.shape) for loss in losses]}")
    without, with_ = summarize(plain), summarize(dropped)
    rises = [interval(late_rises(loss), width=CHOSEN_WIDTH) for loss in losses]
    at_best = [_at(loss, best_epochs(loss)) for loss in losses]
    stopped = paired(at_best[1], at_best[0], width=CHOSEN_WIDTH)
    narrowed = paired(without.gap, with_.gap)
    loss = paired(with_.final_loss, without.final_loss)
    accuracy = paired(with_.final_accuracy, without.final_accuracy)
    rise, minus = "rise of the validation loss from the best epoch to the end", "with minus without"
    best_loss = f"validation loss at the best epoch, {minus}"
    of_loss, of_rise = {"margin": loss_margin}, {"margin": loss_margin, "threshold": loss_margin}
    turns, stays, *others = (
        _verdict("without dropout the validation loss turns early and rises", rise, rises[0], "above", **of_rise),
        _verdict(f"with {name} it does not", rise, rises[1], "below", **of_rise),
        _verdict(f"{name} narrows the gap", "gap (eval mode), without minus with", narrowed, "above", **of_loss),
        _verdict(f"{name} closes the gap", f"gap (eval mode) with {name}", interval(with_.gap), "below", **of_rise),
        _verdict(
            f"{name} lowers the final validation loss", f"final validation loss, {minus}", loss, "below", **of_loss
        ),
        _verdict(f"{name} lowers the loss more than stopping early does", best_loss, stopped, "below", **of_loss),
        _verdict(f"{name} raises accuracy", f"final accuracy, {minus}", accuracy, "above", margin=accuracy_margin),
    )
    epochs = losses[0].shape[1]
    late = losses[0].mean(axis=0).argmin() + 1 > epochs / 2
    if epochs == 1 or (late and turns.answer == "supported"):
        turns = turns._replace(answer="undecided")
    if epochs == 1:
        stays = stays._replace(answer="undecided")
    return [turns, stays, *others]


def compare(claim: str, first: PerSeed, second: PerSeed, *, quantity: str, margin: float = ACCURACY_MARGIN) -> Verdict:
    """Check the claim that the first of two arms has the higher numbers, from the interval of `paired`.

    >>> compare("it helps", np.array([0.9, 0.91]), np.array([0.8, 0.812]), quantity="accuracy").answer
    'supported'
    """
    return _verdict(claim, quantity, paired(first, second), "above", margin=margin)


def drop_diverged(arms: Mapping[str, History]) -> dict[str, History]:
    """Return the arms without the seeds that diverged in any of them, with a warning: arms are compared seed by seed.

    Args:
        arms: Title and history of each arm; leaves [seeds, epochs].

    Raises:
        FloatingPointError: No seed is left.

    >>> from fashion_jax.types import Metrics
    >>> curve = np.array([[0.5, 0.4], [0.5, np.nan]])
    >>> with warnings.catch_warnings(action="ignore"):
    ...     drop_diverged({"plain": History(curve, Metrics(curve, curve), Metrics(curve, curve))})["plain"].train.loss
    array([[0.5, 0.4]])
    """
    lost = np.any([np.isnan(arm.running_loss).any(axis=-1) for arm in arms.values()], axis=0)
    if lost.all():
        raise FloatingPointError("every seed diverged in some arm; a lower learning_rate may help")
    if lost.any():
        warnings.warn(f"seeds {np.flatnonzero(lost).tolist()} diverged and are left out of every arm", stacklevel=2)
    return {title: jax.tree.map(lambda leaf: np.asarray(leaf)[~lost], arm) for title, arm in arms.items()}


def _verdict(
    claim: str, quantity: str, measured: Interval, side: Side, *, margin: float, threshold: float = 0.0
) -> Verdict:
    above, below = measured.low > threshold, measured.high < threshold
    claimed, opposite = (above, below) if side == "above" else (below, above)
    largest = max(abs(measured.low), abs(measured.high))
    if opposite:
        answer = "refuted"
    elif not threshold and largest <= margin:
        answer = "negligible"
    else:
        answer = "supported" if claimed else "undecided"
    notes = [f"at most {largest:.4f}"] if answer in ("negligible", "undecided") and measured.n > 1 else []
    if measured.n < FEW_SEEDS:
        notes.append("one seed decides nothing" if measured.n == 1 else f"weak: {measured.n} seeds")
    quantity = f"{quantity}, {side} {threshold}" if threshold else quantity
    return Verdict(claim, answer, quantity, measured, threshold, margin, "; ".join(notes))


def _numbers(name: str, values: Float[Array | np.ndarray, "..."], *axes: str) -> Float[np.ndarray, "..."]:
    values = np.asarray(values, np.float64)
    if values.ndim != len(axes) or not values.size:
        raise ValueError(f"{name} must have shape [{', '.join(axes)}] and not be empty, got {list(values.shape)}")
    # NumPy takes NaN for the lowest, so one diverged run would choose the epoch of half of the others.
    _checks.finite(name, values.reshape(len(values), -1))
    return values


def _at(curves: Curves, epochs: Int[np.ndarray, "*runs"]) -> Float[np.ndarray, "*runs"]:
    return np.asarray(np.take_along_axis(np.asarray(curves), epochs[..., None], axis=-1)[..., 0])


def _final(curves: Curves) -> Float[np.ndarray, "*runs"]:
    return np.asarray(curves[..., -LAST:].mean(axis=-1))
