"""The evidence: from histories to numbers, and from numbers to verdicts on the tutorial's claims.

Pure functions. Seeds are the repetitions: within a seed all arms share initial weights, batch order and dropout draws,
so arms are compared by paired differences.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from fashion_jax import _checks
from fashion_jax.statistics import (
    ACCURACY_MARGIN,
    LOSS_MARGIN,
    PerSeed,
    Verdict,
    compare,
    decide,
    interval,
    numbers,
    paired,
)
from fashion_jax.types import History

# Halves of the seeds that choose epochs for each other are not quite independent: Student's intervals cover the truth
# in 91 to 94% of cases, intervals wider by this factor in 94 to 96% (simulated in the tests).
CHOSEN_WIDTH = 1.15
# "Final" is the mean of as many epochs at the end: single epochs are noisy, and a seed hardly differs from another.
LAST = 5
Curves = Float[Array | np.ndarray, "*runs epochs"]


class Summary(NamedTuple):
    """A few numbers for each run; every leaf has the axes of the history but the last.

    "best" is the epoch with the run's lowest validation loss, counted from 1. The smallest of many noisy numbers is
    biased downward; `late_rises` computes an unbiased rise. "final" is the mean of the last five epochs (of all, if
    there are fewer). `late_rise` is `final_loss` minus `best_loss`, and `gap` is the final validation loss minus the
    final training loss (eval mode).
    """

    best_epoch: Int[np.ndarray, "*runs"]
    best_loss: Float[np.ndarray, "*runs"]
    final_loss: Float[np.ndarray, "*runs"]
    late_rise: Float[np.ndarray, "*runs"]
    gap: Float[np.ndarray, "*runs"]
    best_accuracy: Float[np.ndarray, "*runs"]
    final_accuracy: Float[np.ndarray, "*runs"]


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
    loss = numbers("loss", loss, "seeds", "epochs")
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
    loss = numbers("loss", loss, "seeds", "epochs")
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
        loss_margin: The largest difference of losses that counts as negligible, in nats.
        accuracy_margin: The same for accuracies.

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
        decide("without dropout the validation loss turns early and rises", rise, rises[0], "above", **of_rise),
        decide(f"with {name} it does not", rise, rises[1], "below", **of_rise),
        decide(f"{name} narrows the gap", "gap (eval mode), without minus with", narrowed, "above", **of_loss),
        decide(f"{name} closes the gap", f"gap (eval mode) with {name}", interval(with_.gap), "below", **of_rise),
        decide(f"{name} lowers the final validation loss", f"final validation loss, {minus}", loss, "below", **of_loss),
        decide(f"{name} lowers the loss more than stopping early does", best_loss, stopped, "below", **of_loss),
        decide(f"{name} raises accuracy", f"final accuracy, {minus}", accuracy, "above", margin=accuracy_margin),
    )
    epochs = losses[0].shape[1]
    late = losses[0].mean(axis=0).argmin() + 1 > epochs / 2
    if epochs == 1 or (late and turns.answer == "supported"):
        turns = turns._replace(answer="undecided")
    if epochs == 1:
        stays = stays._replace(answer="undecided")
    return [turns, stays, *others]


def compare_rivals(scores: Mapping[str, Mapping[str, PerSeed]], pairs: Iterable[tuple[str, str]]) -> list[Verdict]:
    """Check for each pair of rivals that the first is more accurate, and that it has the lower loss.

    Args:
        scores: "accuracy" and "loss" of each rival, one number for each repetition; the rivals share repetitions.
        pairs: Names of two rivals each.

    >>> scores = {"dropout": {"accuracy": np.array([0.9, 0.91]), "loss": np.array([0.3, 0.3])}}
    >>> scores["nothing"] = {"accuracy": np.array([0.8, 0.812]), "loss": np.array([0.4, 0.401])}
    >>> [verdict.answer for verdict in compare_rivals(scores, [("dropout", "nothing")])]
    ['supported', 'supported']
    """
    verdicts = []
    for a, b in pairs:
        more, fewer = (scores[a]["accuracy"], scores[b]["accuracy"]), (scores[b]["loss"], scores[a]["loss"])
        in_nats = {"quantity": "NLL, second minus first", "margin": LOSS_MARGIN}
        verdicts.append(compare(f"{a}: more accurate than {b}", *more, quantity="accuracy, first minus second"))
        verdicts.append(compare(f"{a}: lower loss than {b}", *fewer, **in_nats))
    return verdicts


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


def _at(curves: Curves, epochs: Int[np.ndarray, "*runs"]) -> Float[np.ndarray, "*runs"]:
    return np.asarray(np.take_along_axis(np.asarray(curves), epochs[..., None], axis=-1)[..., 0])


def _final(curves: Curves) -> Float[np.ndarray, "*runs"]:
    return np.asarray(curves[..., -LAST:].mean(axis=-1))
