"""Confidence intervals over repetitions, and verdicts based on them. Pure functions."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from fashion_jax import _checks

LEVEL = 0.95
# Below these margins a difference counts as negligible: a twentieth of the losses at hand, and 20 of 10,000 images.
LOSS_MARGIN, ACCURACY_MARGIN = 0.02, 0.002
MOST_SEEDS = 10_000
# With fewer seeds intervals say little: for two, Student's t multiplies the standard error by 12.7.
FEW_SEEDS = 4

Answer = Literal["supported", "refuted", "negligible", "undecided"]
Side = Literal["above", "below"]
PerSeed = Float[Array | np.ndarray, " seeds"]


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
        margin: The largest difference that counts as negligible.
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

    values = numbers("values", values, "seeds")
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
    first, second = numbers("first", first, "seeds"), numbers("second", second, "seeds")
    if len(first) != len(second):
        raise ValueError(f"first and second must have the same seeds, got {len(first)} and {len(second)}")
    return interval(first - second, width=width)


def compare(claim: str, first: PerSeed, second: PerSeed, *, quantity: str, margin: float = ACCURACY_MARGIN) -> Verdict:
    """Check the claim that the first of two arms has the higher numbers, from the interval of `paired`.

    >>> compare("it helps", np.array([0.9, 0.91]), np.array([0.8, 0.812]), quantity="accuracy").answer
    'supported'
    """
    return decide(claim, quantity, paired(first, second), "above", margin=margin)


def holm(verdicts: Sequence[Verdict]) -> Float[np.ndarray, " verdicts"]:
    """Compute the p-values of two-sided paired t-tests against the thresholds, adjusted for their number.

    In at least 95% of such studies, all verdicts with an adjusted p-value below 0.05 are right.

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scand. J. Statist. 6 (1979).

    >>> better = compare("it helps", np.array([0.9, 0.91, 0.9]), np.array([0.8, 0.8, 0.81]), quantity="accuracy")
    >>> holm([better, better]).round(4).tolist()
    [0.0066, 0.0066]
    """
    from scipy.special import stdtr, stdtrit

    mean, low, _, _, n = np.transpose([verdict.interval for verdict in verdicts])
    with np.errstate(divide="ignore", invalid="ignore"):
        # Intervals may be wider than Student's.
        error = (mean - low) / stdtrit(n - 1, (1 + LEVEL) / 2)
        t = (mean - [verdict.threshold for verdict in verdicts]) / error
    # One seed, or arms that are equal, are no evidence.
    p = np.nan_to_num(2 * stdtr(n - 1, -np.abs(t)), nan=1.0)
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(np.sort(p) * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1.0)[np.argsort(order)]


def decide(
    claim: str, quantity: str, measured: Interval, side: Side, *, margin: float, threshold: float = 0.0
) -> Verdict:
    """Return the answer that an interval gives to the claim that its quantity lies above or below the threshold.

    >>> decide("it differs", "loss", Interval(0.001, -0.002, 0.004, 0.2, 8), "above", margin=0.02).answer
    'negligible'
    """
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


def numbers(name: str, values: Float[Array | np.ndarray, "..."], *axes: str) -> Float[np.ndarray, "..."]:
    """Return values in float64.

    Raises:
        ValueError: They have other axes, there are none, or one is not finite.

    >>> numbers("loss", np.array([1.0, 2.0]), "seeds")
    array([1., 2.])
    """
    values = np.asarray(values, np.float64)
    if values.ndim != len(axes) or not values.size:
        raise ValueError(f"{name} must have shape [{', '.join(axes)}] and not be empty, got {list(values.shape)}")
    # NumPy takes NaN for the lowest, so one diverged run would choose the epoch of half of the others.
    _checks.finite(name, values.reshape(len(values), -1))
    return values
