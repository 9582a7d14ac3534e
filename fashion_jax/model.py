"""The network: a multilayer perceptron with dropout, as Flax Linen modules.

Images go in as they are stored, raw uint8; log-probabilities come out.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from fashion_jax import _checks
from fashion_jax._threefry import uniform


class Dropout(nn.Module):
    """Zero each entry with probability `rate` and scale the others by 1 / (1 - rate).

    Unlike in `flax.linen.Dropout`, the rate may be traced, so one compiled program serves every rate. Two rates share
    their uniform draws: an entry that the lower rate drops, the higher one drops too. At rate 0 the output equals the
    input bit for bit.

    Attributes:
        rate: Probability of dropping an entry, in [0, 1).

    Raises:
        ValueError: A concrete rate is outside [0, 1).

    Source: Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 15 (2014), in
    PyTorch's inverted form.

    >>> x = jnp.ones(8)
    >>> y = Dropout(0.5).apply({}, x, deterministic=False, rngs={"dropout": jax.random.key(0)})
    >>> sorted({float(entry) for entry in y})
    [0.0, 2.0]
    """

    rate: float | Float[Array, ""]

    def __post_init__(self) -> None:
        _checks.rate("rate", self.rate)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "..."], *, deterministic: bool) -> Float[Array, "..."]:
        """Apply dropout to `x`, or return it unchanged if `deterministic`."""
        if deterministic:
            return x
        keep = uniform(self.make_rng("dropout"), x.shape) >= self.rate
        # Half precision is divided in full precision, as a traced rate has it.
        scaled = (x.astype(jnp.result_type(float)) / (1 - self.rate)).astype(x.dtype)
        return jnp.where(keep, scaled, 0)


@_checks.known_fields
class FashionMLP(nn.Module):
    """A multilayer perceptron: ReLU and dropout after each hidden layer, log-softmax output; the tutorial's by default.

    Weights and biases are initialized as in `torch.nn.Linear`, uniformly in +-1/sqrt(fan_in). The layers are called
    fc1, fc2, ... as in the tutorial.

    Attributes:
        hidden: Width of each hidden layer, first to last.
        classes: Number of classes.
        dropout_rate: Fraction of hidden units to drop while training, in [0, 1); a hyperparameter of `fit` and `sweep`.
        dtype: Type of the matrix products, such as `jnp.bfloat16`; float32 in full precision if None.

    >>> model = FashionMLP()
    >>> images = jnp.zeros((2, 28, 28), jnp.uint8)
    >>> variables = model.init(jax.random.key(0), images, deterministic=True)
    >>> model.apply(variables, images, deterministic=True).shape
    (2, 10)
    """

    hidden: tuple[int, ...] = (256, 128, 64)
    classes: int = 10
    dropout_rate: float | Float[Array, ""] = 0.0
    dtype: Any = None

    def __post_init__(self) -> None:
        _checks.rate("dropout_rate", self.dropout_rate)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: UInt8[Array, "n *pixels"], *, deterministic: bool) -> Float[Array, "n classes"]:
        """Compute log-probabilities of the classes.

        Args:
            images: Raw pixels, 0 to 255.
            deterministic: True switches dropout off; False needs `rngs={"dropout": key}`.
        """
        x = normalize(images).reshape(len(images), -1)
        for i, width in enumerate(self.hidden, start=1):
            x = nn.relu(_linear(x, width, self.dtype, f"fc{i}"))
            x = Dropout(self.dropout_rate, name=f"dropout{i}")(x, deterministic=deterministic)
        return nn.log_softmax(_linear(x, self.classes, self.dtype, f"fc{len(self.hidden) + 1}"))


def normalize(images: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Map pixels from 0..255 to [-1, 1] in the tutorial's two steps: x/255, then (x - 0.5)/0.5.

    Raises:
        TypeError: The images are not uint8: a network would silently train on pixels scaled twice.

    >>> normalize(jnp.array([0, 255], jnp.uint8)).tolist()
    [-1.0, 1.0]
    """
    if images.dtype != jnp.uint8:
        raise TypeError(f"images must be raw uint8 pixels, which the model normalizes, got {images.dtype}")
    return (images.astype(jnp.result_type(float)) / 255 - 0.5) / 0.5


def _linear(x: Float[Array, "n inputs"], features: int, dtype: Any, name: str) -> Any:
    bound = 1 / math.sqrt(x.shape[-1])

    def init(key, shape, dtype):
        return (2 * uniform(key, shape) - 1).astype(dtype) * bound

    # By JAX's default GPUs multiply float32 in TF32, TPUs in bfloat16; PyTorch does neither.
    # A default that the user has set wins.
    full = dtype is None and jax.default_matmul_precision.value is None
    layer = nn.Dense(
        features,
        dtype=dtype or jnp.result_type(float),
        param_dtype=jnp.result_type(float),
        precision=jax.lax.Precision.HIGHEST if full else None,
        kernel_init=init,
        bias_init=init,
        name=name,
    )
    return layer(x).astype(jnp.result_type(float))
