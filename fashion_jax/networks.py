"""Other networks to compare with the tutorial's."""

from typing import Literal

import flax.linen as nn
from jaxtyping import Array, Float, UInt8

from fashion_jax._checks import known_fields
from fashion_jax.model import Dropout, normalize


@known_fields
class NormalizedMLP(nn.Module):
    """A multilayer perceptron with batch or layer normalization before each ReLU, and dropout after it.

    With batch normalization, `predict` and `evaluate` take the state or the best of a run, which hold its running
    statistics.

    Attributes:
        hidden: Width of each hidden layer, first to last.
        norm: Which normalization.
        classes: Number of classes.
        dropout_rate: As in `FashionMLP`.

    Source: Ioffe and Szegedy, "Batch Normalization", ICML 2015; Ba, Kiros and Hinton, "Layer Normalization",
    arXiv:1607.06450, 2016.

    >>> import jax, jax.numpy as jnp
    >>> images = jnp.zeros((2, 28, 28), jnp.uint8)
    >>> NormalizedMLP(norm="batch").init(jax.random.key(0), images, deterministic=True).keys()
    dict_keys(['params', 'batch_stats'])
    """

    hidden: tuple[int, ...] = (256, 128, 64)
    norm: Literal["batch", "layer"] = "batch"
    classes: int = 10
    dropout_rate: float | Float[Array, ""] = 0.0

    @nn.compact
    def __call__(self, images: UInt8[Array, "n *pixels"], *, deterministic: bool) -> Float[Array, "n classes"]:
        """Compute log-probabilities of the classes, as `FashionMLP` does."""
        x = normalize(images).reshape(len(images), -1)
        for width in self.hidden:
            norm = nn.BatchNorm(use_running_average=deterministic) if self.norm == "batch" else nn.LayerNorm()
            x = nn.relu(norm(nn.Dense(width)(x)))
            x = Dropout(self.dropout_rate)(x, deterministic=deterministic)
        return nn.log_softmax(nn.Dense(self.classes)(x))
