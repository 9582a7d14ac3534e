"""Networks written in `flax.nnx`: `from_nnx` gives them the form of a Linen module, `Dropout` has a traced rate."""

import functools
import inspect
from collections.abc import Hashable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from fashion_jax import _checks
from fashion_jax._convolution import convolve
from fashion_jax._threefry import uniform


class Dropout(nnx.Module):
    """Zero each entry with probability `rate` and scale the others by 1 / (1 - rate), like `fashion_jax.model.Dropout`.

    Unlike in `flax.nnx.Dropout`, the rate may be traced. `train()` and `eval()` of a module switch it on and off.

    Args:
        rate: Probability of dropping an entry, in [0, 1).
        rngs: Source of the stream `dropout`.

    >>> dropout = Dropout(0.5, rngs=nnx.Rngs(0))
    >>> sorted({float(entry) for entry in dropout(jnp.ones(8))})
    [0.0, 2.0]
    """

    def __init__(self, rate: float | Float[Array, ""], *, rngs: nnx.Rngs):
        self.rate: Any = _checks.rate("rate", rate)
        self.rngs: nnx.RngStream = rngs["dropout"].fork()
        self.deterministic: bool = False

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Apply dropout to `x`, or return it unchanged if `deterministic`."""
        if self.deterministic:
            return x
        keep = uniform(self.rngs(), x.shape) >= self.rate
        scaled = (x.astype(jnp.result_type(float)) / (1 - self.rate)).astype(x.dtype)
        return jnp.where(keep, scaled, 0)


def from_nnx(network: type[nnx.Module], **arguments: Any) -> nn.Module:
    """Return a Linen module, for `TrainConfig`, that computes the outputs of an NNX network.

    Dropout and BatchNorm are switched by the network's `train()` and `eval()`. Parameters and statistics have the names
    of its attributes.

    Args:
        network: An NNX class. It is called with the arguments and `rngs`; an instance, with raw uint8 images, returns
            log-probabilities.
        **arguments: Arguments of the class. Floats, given here or by default, are hyperparameters of `fit` and `sweep`.

    Raises:
        TypeError: An argument is not hashable, or the class does not take it.

    >>> import jax
    >>> from fashion_jax.model import normalize
    >>> class Net(nnx.Module):
    ...     def __init__(self, hidden, dropout_rate=0.0, *, rngs):
    ...         self.fc1, self.fc2 = nnx.Linear(784, hidden, rngs=rngs), nnx.Linear(hidden, 10, rngs=rngs)
    ...         self.dropout = Dropout(dropout_rate, rngs=rngs)
    ...     def __call__(self, images):
    ...         x = self.fc1(normalize(images).reshape(len(images), -1))
    ...         return nnx.log_softmax(self.fc2(self.dropout(nnx.relu(x))))
    >>> model = from_nnx(Net, hidden=32)
    >>> model.dropout_rate, model.init(jax.random.key(0), jnp.zeros((1, 28, 28), jnp.uint8), deterministic=True).keys()
    (0.0, dict_keys(['params']))
    """
    # The metaclass of NNX hides the arguments of a class.
    parameters = inspect.signature(network.__init__).parameters
    values = {name: parameter.default for name, parameter in parameters.items()} | arguments
    floats = {name: value for name, value in values.items() if isinstance(value, float)}
    fixed = {name: value for name, value in arguments.items() if name not in floats}
    for name, value in fixed.items():
        if not isinstance(value, Hashable):
            raise TypeError(f"{name} must be hashable, such as a tuple in place of a list; got {_checks.got(value)}")
    return _linen_class(network, tuple(fixed.items()), tuple(floats))(**floats)


@functools.lru_cache
def _linen_class(network: Any, fixed: tuple[tuple[str, Any], ...], floats: tuple[str, ...]) -> type[nn.Module]:
    @nn.compact
    def call(self, images: UInt8[Array, "n *pixels"], *, deterministic: bool) -> Float[Array, "n classes"]:
        streams = {name: self.make_rng(name) for name in ("params", "dropout") if self.has_rng(name)}
        # Without a stream of its name, a layer asks for the default one, of which nothing is used.
        rngs = nnx.Rngs(0, **streams)
        module = network(**dict(fixed), **{name: getattr(self, name) for name in floats}, rngs=rngs)
        parts = {"params": nnx.state(module, nnx.Param), "batch_stats": nnx.state(module, nnx.BatchStat)}
        for collection, state in parts.items():
            fresh = nnx.to_pure_dict(state)
            stored = {name: self.variable(collection, name, fresh.get, name).value for name in fresh}
            nnx.replace_by_pure_dict(state, stored)
            nnx.update(module, state)
        module.eval() if deterministic else module.train()
        module.set_attributes(nnx.Conv, conv_general_dilated=convolve, raise_if_not_found=False)
        log_probs = module(images)
        if self.is_mutable_collection("batch_stats"):
            for name, value in nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)).items():
                self.put_variable("batch_stats", name, value)
        return log_probs

    return type(network.__name__, (nn.Module,), {"__annotations__": dict.fromkeys(floats, float), "__call__": call})
