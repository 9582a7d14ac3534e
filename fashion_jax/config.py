"""The structure of an experiment: everything that is fixed when a program is compiled."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from fashion_jax import _checks, _model_checks
from fashion_jax.model import FashionMLP
from fashion_jax.types import Measured, Metrics


def negative_log_likelihood(
    log_probs: Float[Array, "n classes"], labels: Int[Array | np.ndarray, " n"]
) -> Float[Array, " n"]:
    """Return each example's negative log-probability of its label, in nats.

    >>> loss = negative_log_likelihood(jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([0]))
    >>> f"{loss[0]:.4f}"
    '1.3863'
    """
    # A sum over the row instead of an index: its gradient needs no scatter.
    chosen = jnp.asarray(labels, int)[:, None] == jnp.arange(log_probs.shape[1])[None]
    return -jnp.where(chosen, log_probs, 0).sum(axis=1)


@_checks.known_fields
@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Model, optimizer, loss and batches; the tutorial's by default. One config is one compiled program.

    Attributes:
        model: A Flax Linen module, called as `model(images, deterministic=...)` with raw uint8 images; it returns
            log-probabilities [n, classes].
        optimizer: A factory such as `optax.adamw`, called with the hyperparameters that the model does not take. A
            schedule is part of it: `lambda learning_rate: optax.sgd(optax.cosine_decay_schedule(learning_rate, 938))`.
        loss: Maps log-probabilities [n, classes] and labels [n] to losses [n]. Evaluations always report the negative
            log likelihood.
        augment: Maps a key and images to images of the same shape and type, anew at each training step.
        eval_params: Maps the optimizer's state and the parameters to those to evaluate, such as
            `optax.contrib.schedule_free_eval_params`.
        batch_size: Examples per step.
        eval_batch_size: Examples evaluated at once; it bounds memory and changes results by rounding only.
        train_eval_size: Training examples on which the training loss is evaluated; None takes all.
        evaluate_every: Epochs from one evaluation to the next; the last epoch of a run is always evaluated.
        metrics: Additional metrics by name: functions of `log_probs` and `labels`, over all examples of an evaluation,
            or of `grads` and `updates`, at each step. Each returns a number. The argument names tell them apart.

    Functions are compared by identity, so create a lambda or a `functools.partial` once.

    Raises:
        TypeError: A field has the wrong type, or there is no such field.
        ValueError: A size is too small.

    >>> TrainConfig(batch_size=0)
    Traceback (most recent call last):
    ValueError: batch_size must be at least 1, got 0
    """

    model: nn.Module = FashionMLP()  # noqa: RUF009
    optimizer: Callable[..., Any] = optax.adam
    loss: Callable[..., Any] = negative_log_likelihood
    augment: Callable[..., Any] | None = None
    eval_params: Callable[..., Any] | None = None
    batch_size: int = 64
    eval_batch_size: int = 2_000
    train_eval_size: int | None = 10_000
    evaluate_every: int = 1
    metrics: Mapping[str, Callable[..., Any]] | tuple[tuple[str, Callable[..., Any]], ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.metrics, Mapping):  # A static argument must be hashable.
            object.__setattr__(self, "metrics", tuple(self.metrics.items()))
        _model_checks.structure(self)

    def metrics_of(self, *arguments: str) -> dict[str, Callable[..., Any]]:
        """Return the `metrics` that take the named arguments."""
        return {name: f for name, f in dict(self.metrics).items() if {*arguments} <= {*inspect.signature(f).parameters}}

    def measure(self, metrics: Metrics, **given: Any) -> Metrics | Measured:
        """Add the `metrics` that take the given arguments."""
        others = {name: function(**given) for name, function in self.metrics_of(*given).items()}
        return Measured(*metrics, others) if others else metrics
