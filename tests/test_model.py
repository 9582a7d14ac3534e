import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import scipy.stats

from fashion_jax._threefry import uniform
from fashion_jax.config import TrainConfig
from fashion_jax.model import Dropout, FashionMLP
from fashion_jax.steps import init_state, train_step
from fashion_jax.types import Batch

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def params():
    return init_state(KEY).params


def dropout(x, rate):
    return Dropout(rate).apply({}, x, deterministic=False, rngs={"dropout": KEY})


def test_weights_and_biases_start_as_in_torch_nn_linear(params):
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 242_762
    starts = set()
    for layer, fan_in in zip(params.values(), (784, 256, 128, 64), strict=True):
        for leaf in layer.values():
            scaled = np.asarray(leaf, np.float64).ravel() * math.sqrt(fan_in)
            assert abs(scaled).max() <= 1
            assert scipy.stats.kstest(scaled, scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-3
            starts.add(tuple(scaled[:5].round(4)))
    assert len(starts) == 8


def test_dropout_keeps_the_expectation_and_masks_are_nested():
    x = jax.random.normal(jax.random.key(1), (200, 100)) + 3
    before, traced = np.zeros(x.shape, bool), jax.jit(dropout)
    for rate in (0.0, 0.1, 0.2, 0.5, 0.9):
        dropped = np.asarray(dropout(x, rate) == 0)
        for y in (dropout(x, rate), traced(x, rate)):
            np.testing.assert_allclose(y, np.where(dropped, 0, x) / (1 - np.float32(rate)), rtol=1e-6)
        # Four standard errors of a proportion.
        assert dropped.mean() == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / x.size))
        assert (dropped | ~before).all()
        before = dropped
    assert traced._cache_size() == 1


def test_masks_differ_between_layers(params, small):
    for first, second in itertools.combinations(parity.draw_masks(params, small.images[:64], KEY, 0.5), 2):
        assert (first[:, :64] != second[:, :64]).mean() == pytest.approx(0.5, abs=0.05)


def test_rate_0_is_the_identity_bit_for_bit(params, small, monkeypatch):
    x = jax.random.normal(KEY, (64, 64))
    np.testing.assert_array_equal(dropout(x, 0.0), x)
    np.testing.assert_array_equal(jax.jit(dropout)(x, 0.0), x)
    # Operation by operation: two compiled programs may round differently.
    apply = functools.partial(FashionMLP().apply, {"params": params}, jnp.array(small.images), rngs={"dropout": KEY})
    np.testing.assert_array_equal(apply(deterministic=False), apply(deterministic=True))
    # One draw of eight million is 0 exactly.
    monkeypatch.setattr("fashion_jax.model.uniform", lambda key, shape: jnp.zeros(shape))
    np.testing.assert_array_equal(dropout(x, 0.0), x)
    np.testing.assert_array_equal(dropout(x, 1e-6), jnp.zeros_like(x))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dropout_keeps_the_type_whatever_the_rate_s(dtype, unchecked):
    x = jax.random.normal(jax.random.key(1), (50, 40)).astype(dtype)
    rates = (0.3, np.float32(0.3), jnp.float32(0.3))
    for result in [dropout(x, rate) for rate in rates] + [jax.jit(dropout)(x, rate) for rate in rates]:
        assert result.dtype == dtype
        # A rate of Python's is rounded to the type first.
        np.testing.assert_allclose(result.astype(float), dropout(x.astype(float), 0.3), rtol=2 * jnp.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("rate", "error"),
    [(rate, ValueError) for rate in (-0.2, 1.0, 1 - 1e-9, 1.5, math.nan, math.inf, np.float32(1), jnp.array(-0.1))]
    + [(rate, TypeError) for rate in ("0.2", None, True, (0.1, 0.2), np.complex64(0.2), jnp.array(False))],
)
def test_a_concrete_rate_lies_in_0_1(rate, error, unchecked):
    for build in (Dropout, lambda rate: FashionMLP(dropout_rate=rate)):
        with pytest.raises(error, match=r"rate must (lie in \[0, 1\)|be (finite|a number)), got"):
            build(rate)


@pytest.mark.parametrize(
    ("dtype", "default", "precision"),
    [(None, None, "HIGHEST"), (None, "tensorfloat32", "HIGH"), ("bfloat16", None, "DEFAULT")],
)
def test_products_are_in_float32_unless_something_else_was_chosen(small, dtype, default, precision):
    """On GPUs JAX's own default is TF32, for the products of the forward pass and of both gradients."""
    config = TrainConfig(model=FashionMLP(dtype=dtype))
    state, batch = init_state(KEY, config=config), Batch(*(leaf[:64] for leaf in small))
    with jax.default_matmul_precision(default):
        lowered = jax.jit(functools.partial(train_step, config=config)).lower(state, batch, KEY)
    products = [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 4 + 4 + 3
    for line in products:
        assert ("bf16" in line) == (dtype == "bfloat16")
        found = re.search(r"precision = \[(\w+), (\w+)\]", line)
        assert (found.groups() if found else ("DEFAULT", "DEFAULT")) == (precision, precision)
    after, metrics = lowered.out_info
    assert {leaf.dtype for leaf in jax.tree.leaves((after.params, metrics))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
@pytest.mark.parametrize(("wide", "partitionable"), [(False, True), (True, True), (False, False)])
def test_uniform_is_jax_random_uniform_bit_for_bit(implementation, wide, partitionable):
    """With 64-bit numbers JAX would draw twice the bits by default; the older Threefry counts differently."""

    def draw_all(keys, draw):
        return [jax.vmap(lambda key, shape=shape: draw(key, shape))(keys) for shape in ((), (0,), (64, 257))]

    with jax.enable_x64(wide), jax.threefry_partitionable(partitionable):
        keys = jax.vmap(lambda seed: jax.random.key(seed, impl=implementation))(jnp.array([0, 1, 2**31], jnp.uint32))
        expected = draw_all(keys, functools.partial(jax.random.uniform, dtype=jnp.float32))
        jax.tree.map(np.testing.assert_array_equal, jax.jit(draw_all, static_argnums=1)(keys, uniform), expected)
