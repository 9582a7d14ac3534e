"""The network: a multilayer perceptron with dropout, as Flax Linen modules.

The only module that imports Flax. It takes raw `uint8` images and returns log-probabilities, so that no caller has to
remember how the pixels are standardised.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.summary import tabulate
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Key, UInt8

from fashion_jax.config import TrainConfig
from fashion_jax.threefry import is_threefry, uniform

Params = dict[str, Any]

# Flax's collection of masks that were drawn ahead.
_MASKS = "masks"


def check_rate(rate: Any, name: str = "dropout_rate") -> Any:
    """Refuse a concrete dropout rate outside [0, 1), and give it as Python's own number.

    A traced rate is given back as it is: its value is not known yet.

    Args:
        rate: Share of units to drop.
        name: What to call it in the error.

    Raises:
        TypeError: It is not a scalar number.
        ValueError: It is outside [0, 1) or NaN.

    >>> check_rate(0)
    0.0
    >>> check_rate(1.0)
    Traceback (most recent call last):
    ValueError: dropout_rate must lie in [0, 1), got 1.0
    """
    if isinstance(rate, Tracer):
        return rate
    # What float() reads all the same.
    if isinstance(rate, (bool, str, bytes, bytearray)) or getattr(rate, "dtype", np.dtype(float)).kind in "bc":
        raise TypeError(f"{name} must be one number in [0, 1), got {rate!r}")
    try:
        value = float(rate)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be one number in [0, 1), got {rate!r}") from None
    # Programs take the rate as float32, in which 1 - 1e-9 is 1.
    if not 0 <= value < 1 or np.float32(value) == 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")
    return value


class Dropout(nn.Module):
    """Zero each entry with probability `rate` and scale the others by 1 / (1 - rate).

    Unlike `flax.linen.Dropout`, the rate may be a traced value, so one compiled program serves every rate, and a rate
    outside [0, 1) is refused. Two rates with the same key share their uniform draws: what the lower one drops, the
    higher one drops too. At rate 0 the output is the input, bit for bit.

    Source: Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 15 (2014), in
    the inverted form that PyTorch uses.

    Attributes:
        rate: Share of entries to drop, in [0, 1).
        after_relu: The input is the output of a ReLU, whose zeros pass no gradient on. The backward pass then tells
            from the output what was dropped; otherwise a compiler may draw the mask there a second time.

    Raises:
        ValueError: A concrete rate is outside [0, 1).

    >>> x = jnp.ones(8)
    >>> y = Dropout(0.5).apply({}, x, deterministic=False, rngs={"dropout": jax.random.key(0)})
    >>> sorted({float(entry) for entry in y})
    [0.0, 2.0]
    """

    rate: float | Float[Array, ""]
    after_relu: bool = False

    def __post_init__(self) -> None:
        check_rate(self.rate, "rate")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "..."], *, deterministic: bool) -> Float[Array, "..."]:
        """Apply dropout to `x`, or return it as it is when `deterministic`."""
        if deterministic:
            return x
        select = _select_after_relu if self.after_relu else _select
        # A rate of float32, as lanes have it, would widen half precision, and Python's float would not.
        scaled = x / jnp.asarray(1 - self.rate, jnp.result_type(float))
        if jnp.issubdtype(x.dtype, jnp.floating):
            scaled = scaled.astype(x.dtype)
        return select(self.keep_mask(x.shape), scaled)

    def keep_mask(self, shape: tuple[int, ...]) -> Bool[Array, "*shape"]:
        """Draw which entries stay, from the "dropout" stream of random numbers, if `draw_masks` has not done so."""

        def draw():
            return uniform(self.make_rng("dropout"), shape) >= self.rate

        # Where the parameters may change too, every collection was asked for, as when a network is initialised. A mask
        # among its variables would be the same at each step.
        ahead = self.is_mutable_collection(_MASKS) and not self.is_mutable_collection("params")
        return self.variable(_MASKS, "keep", draw).value if ahead or self.has_variable(_MASKS, "keep") else draw()


class FashionMLP(nn.Module):
    """A multilayer perceptron: ReLU, dropout after each hidden ReLU, log-softmax output; by default the tutorial's.

    Weights and biases start as in `torch.nn.Linear`: uniform in +-1/sqrt(fan_in). The layers are called fc1, fc2, ...
    as in the tutorial.

    Attributes:
        hidden: Units of each hidden layer, input side first.
        dropout_rate: Share of hidden units to drop while training, in [0, 1); may be a traced value.
        input_dropout: Share of pixels to drop while training, after they are standardised.
        dtype: Type that the matrix products are computed in; the parameters' own if None, in full precision on every
            device, unless `jax_default_matmul_precision` is set.
        classes: Number of classes.

    Raises:
        ValueError: A concrete rate is outside [0, 1).

    >>> model = FashionMLP()
    >>> images = jnp.zeros((2, 28, 28), jnp.uint8)
    >>> variables = model.init(jax.random.key(0), images, deterministic=True)
    >>> model.apply(variables, images, deterministic=True).shape
    (2, 10)
    """

    hidden: Sequence[int] = (256, 128, 64)
    dropout_rate: float | Float[Array, ""] = 0.2
    input_dropout: float = 0.0
    dtype: str | None = None
    classes: int = 10

    def __post_init__(self) -> None:
        check_rate(self.dropout_rate)
        check_rate(self.input_dropout, "input_dropout")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: UInt8[Array, "n *pixels"], *, deterministic: bool) -> Float[Array, "n classes"]:
        """Compute log-probabilities of the classes.

        Args:
            x: Images as they are stored, 0 to 255.
            deterministic: True switches dropout off; False needs `rngs={"dropout": key}`.

        Raises:
            TypeError: The images are not `uint8`.
            ValueError: The images do not have a leading batch axis.
        """
        if x.ndim < 3:
            raise ValueError(f"images must have shape [n, height, width], got {list(x.shape)}")
        x = standardise(x).reshape(x.shape[0], -1)
        if self.input_dropout:
            x = Dropout(self.input_dropout, name="dropout0")(x, deterministic=deterministic)
        for i, units in enumerate(self.hidden, start=1):
            x = nn.relu(_linear(x, units, self.dtype, f"fc{i}"))
            x = Dropout(self.dropout_rate, after_relu=True, name=f"dropout{i}")(x, deterministic=deterministic)
        return nn.log_softmax(_linear(x, self.classes, self.dtype, f"fc{len(self.hidden) + 1}"))


def build_model(config: TrainConfig, dropout_rate: float | Float[Array, ""] = 0.0) -> nn.Module:
    """Build the network that a config asks for.

    Args:
        config: `config.model`, or the fields that describe a `FashionMLP`.
        dropout_rate: Share of hidden units to drop while training; may be a traced value.

    Raises:
        TypeError: `config.model` does not give a Flax module.

    >>> build_model(TrainConfig(hidden=(32,))).hidden
    (32,)
    """
    if config.model is None:
        return FashionMLP(config.hidden, dropout_rate, config.input_dropout, config.dtype, config.classes)
    expected = "config.model must give a flax.linen.Module when called with dropout_rate"
    if isinstance(config.model, nn.Module):
        raise TypeError(f"{expected}, as its class does; got the module itself, {config.model!r}")
    model = config.model(dropout_rate=dropout_rate)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{expected}, got {model!r}")
    return model


def draw_masks(
    params: Params, key: Key[Array, ""], n: int, *, config: TrainConfig, dropout_rate: float | Float[Array, ""]
) -> dict[str, Any]:
    """Draw the dropout masks that the network would draw for n examples, so that many steps' can be drawn together.

    Args:
        params: The model's parameters; the masks do not depend on them.
        key: The step's key.
        n: Number of examples.
        config: What the network is.
        dropout_rate: Share of hidden units to drop; may be a traced value.

    Returns:
        The variables to apply the network with, beside its parameters. Empty if the network has to draw for itself:
        `config.model` may compute its rates from its parameters, which are not known ahead, and generators other than
        Threefry draw other numbers under `jax.vmap`.

    >>> config = TrainConfig(hidden=(32,))
    >>> key = jax.random.key(0)
    >>> masks = draw_masks(init_params(key, config), key, 64, config=config, dropout_rate=0.2)
    >>> jax.tree.map(jnp.shape, masks)
    {'masks': {'dropout1': {'keep': (64, 32)}}}
    """
    if config.model is not None or not is_threefry(key):
        return {}
    images = jnp.zeros((n, *config.image_shape), jnp.uint8)
    _, masks = build_model(config, dropout_rate).apply(
        {"params": params}, images, deterministic=False, rngs={"dropout": key}, mutable=[_MASKS]
    )
    return cast(dict[str, Any], masks)


def init_params(key: Key[Array, ""], config: TrainConfig) -> Params:
    """Draw the initial weights of a config's network.

    Args:
        key: For the draws.
        config: What the network is.

    Raises:
        ValueError: The network keeps other variables than parameters, or gives something else than log-probabilities
            [n, classes].

    >>> jax.tree.map(jnp.shape, init_params(jax.random.key(0), TrainConfig(hidden=(32,))))["fc2"]
    {'bias': (10,), 'kernel': (32, 10)}
    """
    images = jnp.zeros((1, *config.image_shape), jnp.uint8)
    output, variables = build_model(config).init_with_output(key, images, deterministic=True)
    if set(variables) - {"params"}:
        others = ", ".join(sorted(set(variables) - {"params"}))
        raise ValueError(f"config.model must keep parameters only, got other variables too: {others}")
    if output.shape != (1, config.classes):
        raise ValueError(
            f"the network must give log-probabilities [n, {config.classes}], got {['n', *output.shape[1:]]}"
        )
    return cast(Params, variables.get("params", {}))


def check_log_probabilities(params: Params, config: TrainConfig) -> None:
    """Refuse a network of one's own that gives no log-probabilities: logits would train without a word.

    It applies the network to one image.

    Args:
        params: The model's parameters.
        config: What the network is; that of `FashionMLP` is not looked at.

    Raises:
        ValueError: The probabilities do not sum to 1.

    >>> class Logits(nn.Module):
    ...     dropout_rate: Any
    ...     @nn.compact
    ...     def __call__(self, x, *, deterministic):
    ...         return nn.Dense(10)(standardise(x).reshape(len(x), -1))
    >>> config = TrainConfig(model=Logits)
    >>> check_log_probabilities(init_params(jax.random.key(0), config), config)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: config.model must give log-probabilities, ...; end it with jax.nn.log_softmax
    """
    if config.model is None:
        return
    total = float(_total_probability(params, config=config))
    # bfloat16 is off by some hundredths.
    if not abs(total - 1) <= 0.1:
        raise ValueError(
            f"config.model must give log-probabilities, got numbers whose exponentials sum to {total:.4g}, not to 1; "
            "end it with jax.nn.log_softmax"
        )


@functools.partial(jax.jit, static_argnames="config")
def _total_probability(params, *, config):
    # No image of one shade: a network may divide by the spread of its pixels.
    pixels = np.arange(math.prod(config.image_shape)) % 256
    images = jnp.asarray(pixels, jnp.uint8).reshape(1, *config.image_shape)
    log_probs = build_model(config).apply({"params": params}, images, deterministic=True)
    return jnp.exp(cast(Array, log_probs).astype(jnp.float32)).sum()


@functools.lru_cache
def sizes(config: TrainConfig) -> tuple[int, int]:
    """Count the parameters of a config's network, and the numbers that its modules give for one image.

    >>> sizes(TrainConfig())[0]
    242762
    """
    params = jax.eval_shape(functools.partial(init_params, config=config), jax.random.key(0))

    def outputs(params):
        images = jnp.zeros((1, *config.image_shape), jnp.uint8)
        return build_model(config).apply(
            {"params": params}, images, deterministic=True, capture_intermediates=True, mutable=["intermediates"]
        )

    count, per_image = (
        sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, jax.eval_shape(outputs, params))
    )
    return count, per_image


def check_params(params: Params, config: TrainConfig) -> None:
    """Refuse parameters that do not fit a config.

    Args:
        params: The model's parameters.
        config: What the network is.

    Raises:
        ValueError: A layer is missing, is one too many, or has another shape.

    >>> check_params({"fc1": {"kernel": np.zeros((784, 10)), "bias": np.zeros(9)}}, TrainConfig(hidden=()))
    Traceback (most recent call last):
    ValueError: params do not fit the config: fc1.bias must have shape [10], got [9]
    """
    expected, found = _expected_shapes(config), _shapes(params)
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is not part of the network" for name in found if name not in expected]
    wrong += [
        f"{name} must have shape {shape}, got {found[name]}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if wrong:
        raise ValueError(f"params do not fit the config: {'; '.join(wrong)}")


# Tracing how the network starts takes longer than classifying a thousand images.
@functools.lru_cache(maxsize=128)
def _expected_shapes(config: TrainConfig) -> dict[str, list[int]]:
    return _shapes(jax.eval_shape(functools.partial(init_params, config=config), jax.random.key(0)))


def _shapes(params) -> dict[str, list[int]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): list(np.shape(leaf)) for path, leaf in leaves}


def standardise(images: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Map pixels from 0..255 to [-1, 1], in the tutorial's two steps: x/255, then (x - 0.5)/0.5.

    Raises:
        TypeError: The images are not `uint8`: scaled already, they would train a network without a word.

    >>> standardise(jnp.array([0, 255], jnp.uint8)).tolist()
    [-1.0, 1.0]
    """
    if images.dtype != jnp.uint8:
        raise TypeError(
            f"images must be uint8 pixels from 0 to 255, got {images.dtype}; the model standardises them itself, so do "
            "not scale them before"
        )
    return (images.astype(jnp.result_type(float)) / 255 - 0.5) / 0.5


def summary(model: nn.Module, image_shape: Sequence[int] = (28, 28)) -> str:
    """Tell a model's layers, their output shapes and parameter counts, as a table.

    Args:
        model: A module that is called like `FashionMLP`.
        image_shape: Shape of one image.

    >>> "242,762" in summary(FashionMLP())
    True
    """
    images = jnp.zeros((1, *image_shape), jnp.uint8)
    table = tabulate(
        model,
        jax.random.key(0),
        compute_flops=False,
        console_kwargs={"width": 110, "force_terminal": False, "force_jupyter": False},
    )
    return table(images, deterministic=True)


def _select(keep, x):
    return jnp.where(keep, x, 0)


_select_after_relu = jax.custom_jvp(_select)


@_select_after_relu.defjvp
def _select_after_relu_jvp(primals, tangents):
    y = _select_after_relu(*primals)
    return y, jnp.where(y != 0, tangents[1], 0)


def _linear(x, features: int, dtype: str | None, name: str):
    bound = 1 / math.sqrt(x.shape[-1])

    def init(key, shape, dtype):
        return (2 * uniform(key, shape) - 1).astype(dtype) * bound

    # By JAX's default GPUs multiply float32 in TF32, which has ten bits, and TPUs in bfloat16; PyTorch does neither.
    # Whoever has chosen another default means it.
    chosen = dtype is not None or jax.default_matmul_precision.value is not None
    precision = None if chosen else jax.lax.Precision.HIGHEST
    param_dtype = jnp.result_type(float)
    layer = nn.Dense(
        features,
        dtype=dtype,
        kernel_init=init,
        bias_init=init,
        param_dtype=param_dtype,
        precision=precision,
        name=name,
    )
    return layer(x).astype(param_dtype)
