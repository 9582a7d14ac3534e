import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fashion_jax import TrainConfig, model
from fashion_jax.model import Dropout, FashionMLP, draw_masks, init_params, standardise, summary
from fashion_jax.threefry import bits, uniform

KEY = jax.random.key(0)


# Outside a jit, each of the operations would be compiled by itself.
new_params = jax.jit(init_params, static_argnums=1)


def variables(model, images):
    return jax.jit(functools.partial(model.init, deterministic=True))(KEY, images)


def dropout(x, rate, key=KEY):
    return Dropout(rate).apply({}, x, deterministic=False, rngs={"dropout": key})


@pytest.fixture(scope="module")
def images(splits):
    return jnp.array(splits.test.images[:500])


def test_parameter_count_and_layer_names(images):
    params = variables(FashionMLP(), images)["params"]
    assert list(params) == ["fc1", "fc2", "fc3", "fc4"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 242_762


def test_summary_counts_each_layer():
    table = summary(FashionMLP())
    for count in ("200,960", "32,896", "8,256", "650", "242,762"):
        assert count in table


def test_initialisation_fills_pytorch_s_bounds(images):
    params = variables(FashionMLP(), images)["params"]
    for layer, fan_in in zip(params.values(), (784, 256, 128, 64), strict=True):
        bound = 1 / math.sqrt(fan_in)
        for leaf in layer.values():
            assert abs(leaf).max() <= bound
            # The largest of n uniform draws misses the bound by 1/n on average.
            assert abs(leaf).max() > bound * (1 - 20 / leaf.size)
        assert float(layer["kernel"].std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_output_is_log_softmax_of_a_float64_forward_pass(images):
    model = FashionMLP()
    params = variables(model, images)
    x = ((np.asarray(images, np.float64) / 255 - 0.5) / 0.5).reshape(len(images), -1)
    for i in range(1, 5):
        layer = {name: np.asarray(leaf, np.float64) for name, leaf in params["params"][f"fc{i}"].items()}
        x = x @ layer["kernel"] + layer["bias"]
        x = np.maximum(x, 0) if i < 4 else x
    expected = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    log_probs = model.apply(params, images, deterministic=True)
    np.testing.assert_allclose(log_probs, expected, atol=1e-5)
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1, atol=1e-5)


def test_standardise_matches_the_tutorial_s_two_steps():
    pixels = np.arange(256, dtype=np.uint8)
    expected = (pixels.astype(np.float64) / 255 - 0.5) / 0.5
    # Two roundings of numbers below 1, half an ulp each and doubled by the last step, and that step's own.
    np.testing.assert_allclose(standardise(jnp.array(pixels)), expected, rtol=0, atol=2**-22)


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5, 0.9])
def test_dropout_leaves_zero_or_the_scaled_entry(rate):
    x = jax.random.normal(jax.random.key(1), (200, 100)) + 3
    y = dropout(x, rate)
    dropped = np.asarray(y == 0)
    np.testing.assert_allclose(np.where(dropped, 0, x) / (1 - np.float32(rate)), y, rtol=1e-6)
    # Four standard errors of a proportion.
    assert dropped.mean() == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / x.size))


def test_dropout_is_fresh_for_each_key_and_each_layer():
    x = jnp.ones((64, 64))
    assert not (dropout(x, 0.5) == dropout(x, 0.5, jax.random.key(1))).all()
    np.testing.assert_array_equal(dropout(x, 0.5), dropout(x, 0.5))

    images = jnp.zeros((64, 28, 28), jnp.uint8)
    model = FashionMLP(hidden=(64, 64), dropout_rate=0.5)
    params = variables(model, images)
    # Biases of 1 and kernels of 0 make every unit alive, so that a zero is a dropped unit.
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, leaf.ndim == 1), params)
    _, state = model.apply(
        params,
        images,
        deterministic=False,
        rngs={"dropout": KEY},
        capture_intermediates=True,
        mutable=["intermediates"],
    )
    first, second = (state["intermediates"][f"dropout{i}"]["__call__"][0] == 0 for i in (1, 2))
    assert 0.4 < first.mean() < 0.6
    assert not (first == second).all()


def test_a_higher_rate_drops_all_that_a_lower_one_drops():
    x = jnp.ones((64, 64))
    low, high = dropout(x, 0.2) == 0, dropout(x, 0.5) == 0
    assert (high | ~low).all()


def test_deterministic_switches_dropout_off(images):
    x = jnp.ones((8, 8))
    np.testing.assert_array_equal(Dropout(0.5).apply({}, x, deterministic=True), x)
    params = variables(FashionMLP(), images)
    expected = FashionMLP(dropout_rate=0.0).apply(params, images, deterministic=True)
    np.testing.assert_array_equal(FashionMLP(dropout_rate=0.5).apply(params, images, deterministic=True), expected)


def test_deterministic_has_no_default(images):
    with pytest.raises(TypeError, match="deterministic"):
        FashionMLP().init(KEY, images)
    with pytest.raises(TypeError, match="deterministic"):
        Dropout(0.5).apply({}, jnp.ones(3))


def test_masks_drawn_ahead_are_the_network_s_own(images):
    config = TrainConfig(input_dropout=0.1)
    params = new_params(KEY, config)
    model = FashionMLP(dropout_rate=0.3, input_dropout=0.1)
    keys = jax.random.split(KEY, 3)
    draw = jax.vmap(lambda key: draw_masks(params, key, len(images), config=config, dropout_rate=0.3))
    drawn = jax.jit(draw)(keys)
    assert set(drawn["masks"]) == {"dropout0", "dropout1", "dropout2", "dropout3"}
    for i, key in enumerate(keys):
        expected = model.apply({"params": params}, images, deterministic=False, rngs={"dropout": key})
        masks = jax.tree.map(lambda leaf, i=i: leaf[i], drawn)
        # Without a key there is nothing to draw from.
        np.testing.assert_array_equal(model.apply({"params": params, **masks}, images, deterministic=False), expected)


def test_masks_that_cannot_be_drawn_ahead_are_left_to_the_network():
    config = TrainConfig()
    params = new_params(KEY, config)
    assert draw_masks(params, jax.random.key(0, impl="rbg"), 5, config=config, dropout_rate=0.2) == {}
    assert draw_masks(params, KEY, 5, config=TrainConfig(model=FashionMLP), dropout_rate=0.2) == {}
    no_layers = TrainConfig(hidden=())
    assert draw_masks(new_params(KEY, no_layers), KEY, 5, config=no_layers, dropout_rate=0.2) == {}


def test_no_mask_is_among_the_variables(images):
    keys = {"params": KEY, "dropout": KEY}
    model = FashionMLP(dropout_rate=0.5)
    initial = jax.eval_shape(lambda: model.init(keys, images, deterministic=False))
    assert set(initial) == {"params"}
    apply = functools.partial(model.apply, deterministic=False, rngs=keys, mutable=True)
    _, changed = jax.eval_shape(apply, initial, images)
    assert set(changed) == {"params"}


def test_rate_0_is_no_dropout_bit_for_bit(images):
    x = jax.random.normal(KEY, (64, 64))
    np.testing.assert_array_equal(dropout(x, 0.0), x)
    params = variables(FashionMLP(), images)
    without = FashionMLP().apply(params, images, deterministic=True)
    at_zero = FashionMLP(dropout_rate=0.0).apply(params, images, deterministic=False, rngs={"dropout": KEY})
    np.testing.assert_array_equal(at_zero, without)


def test_rate_0_keeps_what_draws_a_0(monkeypatch):
    """One draw of eight million is 0 exactly."""
    monkeypatch.setattr(model, "uniform", lambda key, shape: jnp.zeros(shape))
    np.testing.assert_array_equal(dropout(jnp.ones(5), 0.0), jnp.ones(5))
    np.testing.assert_array_equal(dropout(jnp.ones(5), 1e-6), jnp.zeros(5))


def test_the_rate_may_be_traced():
    x = jnp.ones((64, 64))
    traced = jax.jit(lambda rate: dropout(x, rate))
    for rate in (0.0, 0.2, 0.7):
        np.testing.assert_array_equal(traced(rate), dropout(x, rate))
    batched = jax.vmap(lambda rate: dropout(x, rate))(jnp.array([0.0, 0.2]))
    np.testing.assert_array_equal(batched[1], dropout(x, 0.2))


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_after_a_relu_the_gradients_are_the_same_bit_for_bit(rate):
    x = jax.random.normal(KEY, (64, 256)).at[0].set(0.0)
    weights = jax.random.normal(jax.random.key(1), x.shape)

    def derivatives(after_relu):
        def layers(x, rate):
            layer = Dropout(rate, after_relu)
            return layer.apply({}, jax.nn.relu(x), deterministic=False, rngs={"dropout": KEY})

        backward = jax.grad(lambda x, rate: (weights * layers(x, rate)).sum(), argnums=(0, 1))(x, rate)
        forward = jax.jvp(layers, (x, rate), (weights, 1.0))
        return backward, forward

    derived = derivatives(after_relu=True)
    jax.tree.map(np.testing.assert_array_equal, derived, derivatives(after_relu=False))
    assert all(leaf.any() for leaf in jax.tree.leaves(derived))


@pytest.mark.parametrize("rate", [-0.2, 1.0, 1.5, math.nan, math.inf, np.float32(1), jnp.array(-0.1)])
def test_rates_outside_the_range_are_refused(rate, unchecked):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        Dropout(rate)
    with pytest.raises(ValueError, match=r"dropout_rate must lie in \[0, 1\)"):
        FashionMLP(dropout_rate=rate)


@pytest.mark.parametrize("rate", ["0.2", None, True, (0.1, 0.2), np.complex64(0.2), jnp.array(False)])
def test_rates_of_a_wrong_type_are_refused(rate, unchecked):
    with pytest.raises(TypeError, match="must be one number"):
        FashionMLP(dropout_rate=rate)


def test_images_of_a_wrong_type_are_refused(unchecked):
    scaled = jnp.zeros((2, 28, 28), jnp.float32)
    one = jnp.zeros((28, 28), jnp.uint8)
    with pytest.raises(TypeError, match="must be uint8 pixels from 0 to 255, got float32"):
        FashionMLP().init(KEY, scaled, deterministic=True)
    with pytest.raises(ValueError, match=r"\[n, height, width\]"):
        FashionMLP().init(KEY, one, deterministic=True)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (64, 256), (3, 5, 2)])
@pytest.mark.parametrize("seed", [0, 1, 2**31])
def test_uniform_is_jax_random_uniform_bit_for_bit(shape, seed):
    key = jax.random.key(seed)
    np.testing.assert_array_equal(uniform(key, shape), jax.random.uniform(key, shape))
    np.testing.assert_array_equal(jax.jit(uniform, static_argnums=1)(key, shape), jax.random.uniform(key, shape))
    np.testing.assert_array_equal(bits(key, shape), jax.random.bits(key, shape, jnp.uint32))


def test_uniform_maps_over_keys_and_serves_other_generators():
    keys = jax.random.split(KEY, 5)
    expected = np.stack([jax.random.uniform(key, (9,)) for key in keys])
    np.testing.assert_array_equal(jax.vmap(lambda key: uniform(key, (9,)))(keys), expected)
    other = jax.random.key(0, impl="rbg")
    # With 64-bit numbers too, where JAX would draw bits twice as wide.
    for wide in (False, True):
        with jax.enable_x64(wide):
            np.testing.assert_array_equal(uniform(other, (9,)), jax.random.uniform(other, (9,), jnp.float32))
            assert bits(other, (9,)).dtype == bits(KEY, (9,)).dtype == jnp.uint32


def test_uniform_is_jax_random_uniform_with_its_older_counters():
    with jax.threefry_partitionable(False):
        np.testing.assert_array_equal(uniform(KEY, (7, 3)), jax.random.uniform(KEY, (7, 3)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dropout_keeps_the_type_whatever_the_rate_s(dtype, unchecked):
    """`fit` traces a Python float, `sweep` a float32."""
    x = jax.random.normal(jax.random.key(1), (50, 40)).astype(dtype)
    rates = (0.3, np.float32(0.3), jnp.float32(0.3))
    results = [dropout(x, rate) for rate in rates] + [jax.jit(dropout)(x, rate) for rate in rates]
    for result in results:
        assert result.dtype == dtype
        np.testing.assert_array_equal(result, results[0])
    np.testing.assert_array_equal(dropout(x, jnp.float32(0.0)), x)
