"""A new loss, data set, optimiser and model, each in a few lines through the public API.

The examples of `docs/extending.md`, which are tests too, train with most of them.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fashion_jax import Batch, Dropout, TrainConfig, fit, predict_mc
from fashion_jax.interop import export, export_onnx, from_torch, load_exported, save_safetensors, to_torch
from fashion_jax.model import check_log_probabilities, standardise
from fashion_jax.predict import predict, probabilities
from fashion_jax.sweep import lanes_that_fit, sweep
from fashion_jax.train import evaluate, evaluated_params, init_state, negative_log_likelihood, train_step

KEY = jax.random.key(0)


def focal_loss(log_probs, labels):
    """Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, with gamma = 2."""
    loss = negative_log_likelihood(log_probs, labels)
    return (1 - jnp.exp(-loss)) ** 2 * loss


def mean_loss(log_probs, labels):
    return negative_log_likelihood(log_probs, labels).mean()


class Unhashable(dict):
    def __call__(self, log_probs, labels):
        return negative_log_likelihood(log_probs, labels)


class Convolutional(nn.Module):
    width: int = 8
    dropout_rate: float | jax.Array = 0.0

    @nn.compact
    def __call__(self, x, *, deterministic):
        x = nn.relu(nn.Conv(self.width, (5, 5), strides=2)(standardise(x)[..., None]))
        x = nn.relu(nn.Conv(2 * self.width, (3, 3), strides=2)(x))
        x = Dropout(self.dropout_rate)(x.reshape(x.shape[0], -1), deterministic=deterministic)
        return nn.log_softmax(nn.Dense(10)(x))


def test_a_new_loss(small):
    plain = TrainConfig(hidden=(16,))
    config = replace(plain, loss=focal_loss)
    run = fit(small, small, key=KEY, config=config, epochs=3)
    log_probs = jnp.log(predict(run.state.params, small.images, config=config))
    expected = -np.asarray(log_probs, np.float64)[np.arange(len(small.labels)), small.labels].mean()
    assert run.history.validation.loss[-1] == pytest.approx(expected, rel=1e-4)
    assert (run.history.running_loss < fit(small, small, key=KEY, config=plain, epochs=3).history.running_loss).all()


def test_a_new_optimiser(small):
    config = TrainConfig(hidden=(16,), learning_rate=0.1, optimiser=functools.partial(optax.sgd, momentum=0.9))
    state = init_state(KEY, config=config)
    batch = Batch(jnp.array(small.images[:64]), jnp.array(small.labels[:64]))

    def mean_loss(params):
        log_probs = jnp.log(probabilities(params, batch.images, config=config))
        return negative_log_likelihood(log_probs, batch.labels).mean()

    after, _ = train_step(state, batch, KEY, config=config, dropout_rate=0.0)
    expected = jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, state.params, jax.grad(mean_loss)(state.params))
    for found, leaf in zip(jax.tree.leaves(after.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, leaf, atol=1e-6)
    assert fit(small, small, key=KEY, config=config, epochs=3).history.validation.accuracy[-1] > 0.6


def test_a_new_data_set_with_other_classes(small):
    kinds = Batch(small.images, (small.labels >= 5).astype(np.int32))
    config = TrainConfig(hidden=(32,), classes=2)
    run = sweep(kinds, kinds, seeds=[0, 1], dropout_rates=[0.0, 0.5], config=config, epochs=2)
    assert (run.history.validation.accuracy > 0.85).all()
    lane = jax.tree.map(lambda leaf: leaf[0, 0], run.state.params)
    assert predict(lane, small.images[:3], config=config).shape == (3, 2)
    with pytest.raises(ValueError, match=r"train\.labels must lie in 0\.\.1, got 0\.\.9"):
        fit(small, kinds, key=KEY, config=config)


def test_a_convolutional_network(small, tmp_path):
    small = Batch(small.images[:640], small.labels[:640])
    config = TrainConfig(model=Convolutional)
    run = sweep(small, small, seeds=[0, 1], dropout_rates=[0.0, 0.5], config=config, epochs=2)
    assert (run.history.validation.accuracy[..., -1] > 0.4).all()
    lane = jax.tree.map(lambda leaf: leaf[1, 0], run.state.params)
    rows = predict(lane, small.images[:40], config=config)
    by_lanes = predict_mc(lane, small.images[:40], key=KEY, samples=50, dropout_rate=0.5, config=config)
    assert np.abs(by_lanes.probabilities - rows).mean() < 0.1
    export(lane, config, tmp_path / "network.stablehlo")
    np.testing.assert_allclose(load_exported(tmp_path / "network.stablehlo")(small.images[:40]), rows, atol=1e-5)
    assert lanes_that_fit(jax.devices("cpu")[0], config) == 1
    with pytest.raises(
        ValueError, match=r"config\.model is .*Convolutional: .* the perceptron alone; export takes any"
    ):
        save_safetensors(tmp_path / "network.safetensors", lane, config=config)


class Tanh(nn.Module):
    """A network whose parameters cannot be told from the perceptron's."""

    dropout_rate: float | jax.Array = 0.0

    @nn.compact
    def __call__(self, x, *, deterministic):
        x = standardise(x).reshape(x.shape[0], -1)
        for i, units in enumerate((256, 128, 64), start=1):
            x = nn.tanh(nn.Dense(units, name=f"fc{i}")(x))
        return nn.log_softmax(nn.Dense(10, name="fc4")(x))


def test_another_network_is_not_written_as_the_perceptron(tmp_path):
    config = TrainConfig(model=Tanh)
    params = init_state(KEY, config=config).params
    for write in (
        lambda: export_onnx(params, config, tmp_path / "network.onnx"),
        lambda: save_safetensors(tmp_path / "network.safetensors", params, config=config),
        lambda: from_torch(to_torch(params), config=config),
    ):
        with pytest.raises(ValueError, match=r"config\.model is .*Tanh: .* the perceptron alone; export takes any"):
            write()
    assert not list(tmp_path.iterdir())


def test_a_run_of_ones_own_parts_goes_on_from_a_checkpoint(small, tmp_path):
    small = Batch(small.images[:320], small.labels[:320])
    wide = functools.partial(Convolutional, width=4)
    config = TrainConfig(model=wide, loss=focal_loss, optimiser=optax.lion, learning_rate=3e-4, average_decay=0.9)
    arguments = {"key": KEY, "config": config, "dropout_rate": 0.2}
    whole = fit(small, small, **arguments, epochs=3)
    fit(small, small, **arguments, epochs=1, checkpoint=tmp_path)
    resumed = fit(small, small, **arguments, epochs=3, checkpoint=tmp_path)
    for found, expected in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(found, expected)
    other = TrainConfig(**{field: getattr(config, field) for field in ("model", "optimiser", "learning_rate")})
    with pytest.raises(ValueError, match=r"config\.loss is .*focal_loss"):
        fit(small, small, key=KEY, config=other, dropout_rate=0.2, epochs=3, checkpoint=tmp_path)


def test_the_average_is_what_is_evaluated_and_kept(small):
    config = TrainConfig(hidden=(16,), average_decay=0.99)
    run = fit(small, small, key=KEY, config=config, epochs=2)
    averaged = evaluated_params(run.state, config=config)
    assert evaluate(averaged, small, config=config).loss == run.history.validation.loss[-1]
    assert evaluate(run.state.params, small, config=config).loss != run.history.validation.loss[-1]
    assert evaluate(run.best.params, small, config=config).loss == run.history.validation.loss.min()


def test_label_smoothing_is_optaxs(small):
    plain = TrainConfig(hidden=(16,))
    config = replace(plain, label_smoothing=0.1)
    state = init_state(KEY, config=config)
    batch = Batch(jnp.array(small.images[:64]), jnp.array(small.labels[:64]))
    _, metrics = train_step(state, batch, KEY, config=config, dropout_rate=0.0)
    logits = np.log(predict(state.params, small.images[:64], config=config))
    targets = optax.smooth_labels(jax.nn.one_hot(batch.labels, 10), 0.1)
    assert float(metrics.loss) == pytest.approx(optax.softmax_cross_entropy(logits, targets).mean().item(), rel=1e-5)
    # What is reported of evaluations stays comparable.
    assert evaluate(state.params, batch, config=config) == evaluate(state.params, batch, config=plain)


def test_bfloat16_is_for_the_products_alone(small):
    plain, half = TrainConfig(hidden=(64,)), TrainConfig(hidden=(64,), dtype="bfloat16")
    runs = [fit(small, small, key=KEY, config=config, dropout_rate=0.2, epochs=3) for config in (plain, half)]
    assert {leaf.dtype for leaf in jax.tree.leaves(runs[1].state.params)} == {jnp.dtype("float32")}
    assert predict(runs[1].state.params, small.images[:2], config=half).dtype == np.float32
    losses = [run.history.validation.loss for run in runs]
    assert not np.array_equal(*losses)
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)
    text = jax.jit(lambda params: evaluate(params, small, config=half)).lower(runs[1].state.params).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all("bf16" in line for line in products)


def test_no_pixel_is_dropped_in_evaluation(small):
    plain, config = TrainConfig(hidden=(8,)), TrainConfig(hidden=(8,), input_dropout=0.5)
    params = init_state(KEY, config=plain).params
    found, expected = (evaluate(params, small, config=of) for of in (config, plain))
    np.testing.assert_array_equal(found, expected)


def test_input_dropout_drops_pixels_and_leaves_the_other_masks_alone(small):
    batch = Batch(jnp.array(small.images[:64]), jnp.array(small.labels[:64]))
    plain, config = TrainConfig(hidden=()), TrainConfig(hidden=(), input_dropout=0.5)
    params = init_state(KEY, config=config).params
    found = train_step(init_state(KEY, config=config), batch, KEY, config=config, dropout_rate=0.0)[1].loss
    pixels = standardise(batch.images).reshape(64, -1)
    dropped = Dropout(0.5)
    losses = [
        negative_log_likelihood(
            nn.log_softmax(
                dropped.apply({}, pixels, deterministic=False, rngs={"dropout": jax.random.key(i)})
                @ params["fc1"]["kernel"]
                + params["fc1"]["bias"][None]
            ),
            batch.labels,
        ).mean()
        for i in range(200)
    ]
    assert abs(found - np.mean(losses)) < 5 * np.std(losses)
    assert found != train_step(init_state(KEY, config=plain), batch, KEY, config=plain, dropout_rate=0.0)[1].loss


def test_the_config_survives_json():
    config = TrainConfig(hidden=(32, 16), shift=2, flip=True, dtype="bfloat16", max_norm=3.0, decay_steps=10)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config
    assert TrainConfig.from_dict({"hidden": [32]}) == TrainConfig(hidden=(32,))
    named = TrainConfig(loss=focal_loss, optimiser=functools.partial(optax.sgd, momentum=0.9)).as_dict()
    assert named["loss"].endswith("focal_loss")
    assert json.loads(json.dumps(named["optimiser"]))["keywords"] == {"momentum": 0.9}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (np.float64(0.9), 0.9),
        (jnp.float32(0.5), 0.5),
        (jnp.bfloat16(0.5), 0.5),
        (np.arange(2), [0, 1]),
        (jnp.ones((1, 2)), [[1.0, 1.0]]),
        (np.dtype("float32"), "float32"),
        ((nn.relu, None, "a"), ["jax.nn.relu", None, "a"]),
        ({1_000: np.float32(0.5)}, {"1000": 0.5}),
        (functools.partial(focal_loss, labels=np.int8(3)), {"labels": 3}),
    ],
)
def test_arguments_of_a_partial_are_told(given, told):
    config = TrainConfig(model=functools.partial(Convolutional, width=given))
    found = json.loads(json.dumps(config.as_dict(), allow_nan=False))["model"]["keywords"]["width"]
    if isinstance(found, str) or (isinstance(found, list) and isinstance(found[0], str)):
        found = json.loads(json.dumps(found).replace("jax._src.nn.functions.relu", "jax.nn.relu"))
    assert (found["keywords"] if isinstance(given, functools.partial) else found) == told


def test_an_argument_that_json_cannot_hold_is_named(small, tmp_path):
    config = TrainConfig(hidden=(8,), loss=functools.partial(focal_with, {"gamma": 2 + 0j}))
    with pytest.raises(
        TypeError, match=r"loss has an argument that JSON cannot hold, \(2\+0j\); give a named function"
    ):
        config.as_dict()
    few = Batch(small.images[:64], small.labels[:64])
    fit(few, few, key=KEY, config=config, epochs=1)
    with pytest.raises(TypeError, match="loss has an argument"):
        fit(few, few, key=KEY, config=config, epochs=1, checkpoint=tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def focal_with(options, log_probs, labels):
    return focal_loss(log_probs, labels)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda dropout_rate: None, TypeError, r"config\.model must give a flax\.linen\.Module"),
        (lambda dropout_rate: nn.Sequential([nn.Dense(3)]), TypeError, "deterministic"),
        (Convolutional(), TypeError, r"config\.model must give a flax\.linen\.Module .* got the module itself, Convol"),
    ],
)
def test_what_is_no_network_is_refused(model, error, message):
    with pytest.raises(error, match=message):
        init_state(KEY, config=TrainConfig(model=model))


def test_networks_with_other_outputs_or_state_are_refused():
    class Eleven(Convolutional):
        @nn.compact
        def __call__(self, x, *, deterministic):
            return nn.Dense(11)(standardise(x).reshape(len(x), -1))

    class Normalised(Convolutional):
        @nn.compact
        def __call__(self, x, *, deterministic):
            return nn.Dense(10)(nn.BatchNorm(use_running_average=deterministic)(standardise(x).reshape(len(x), -1)))

    with pytest.raises(ValueError, match=r"must give log-probabilities \[n, 10\], got \['n', 11\]"):
        init_state(KEY, config=TrainConfig(model=Eleven))
    with pytest.raises(ValueError, match="must keep parameters only, got other variables too: batch_stats"):
        init_state(KEY, config=TrainConfig(model=Normalised))


class Logits(nn.Module):
    dropout_rate: float | jax.Array = 0.0
    end: Callable = staticmethod(lambda logits: logits)

    @nn.compact
    def __call__(self, x, *, deterministic):
        return self.end(nn.Dense(10)(standardise(x).reshape(len(x), -1)))


def test_logits_are_refused_before_training(small):
    config = TrainConfig(model=Logits)
    for train in (functools.partial(fit, key=KEY), functools.partial(sweep, seeds=[0], dropout_rates=[0.0])):
        with pytest.raises(
            ValueError, match=r"config\.model must give log-probabilities, .* end it with jax\.nn\.log_sof"
        ):
            train(small, small, config=config, epochs=1, on_epoch=pytest.fail)


class Normalised(nn.Module):
    """Undefined for images of one shade."""

    dropout_rate: float | jax.Array = 0.0
    end: Callable = staticmethod(nn.log_softmax)

    @nn.compact
    def __call__(self, x, *, deterministic):
        x = standardise(x).reshape(len(x), -1)
        x = (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)
        return self.end(nn.Dense(10)(x))


def test_no_padding_is_measured(small):
    """Whatever a network makes of a black image: NaN times a weight of 0 is NaN."""
    part = Batch(*(leaf[:50] for leaf in small))
    config = TrainConfig(model=Normalised, eval_batch_size=20, batch_size=20)
    run = fit(part, part, key=KEY, config=config, epochs=1)
    params = run.state.params
    log_probs = np.log(np.asarray(predict(params, part.images, config=config), np.float64))
    expected = -log_probs[np.arange(50), part.labels].mean()
    assert evaluate(params, part, config=config).loss == pytest.approx(expected, rel=1e-5)
    assert run.history.validation.loss[0] == pytest.approx(expected, rel=1e-5)


def test_logits_of_a_network_that_is_undefined_for_a_black_image_are_refused(small):
    logits = functools.partial(Normalised, end=Logits.end)
    with pytest.raises(ValueError, match=r"config\.model must give log-probabilities"):
        fit(small, small, key=KEY, config=TrainConfig(model=logits), epochs=1, on_epoch=pytest.fail)


def test_log_probabilities_of_half_precision_are_taken():
    config = TrainConfig(model=functools.partial(Logits, end=half_log_softmax))
    check_log_probabilities(init_state(KEY, config=config).params, config)


def half_log_softmax(logits):
    return nn.log_softmax(8 * logits.astype(jnp.bfloat16))


@pytest.mark.parametrize("loss", [lambda log_probs, labels: 0.5, mean_loss])
def test_a_loss_that_is_one_number_is_refused(small, loss):
    config = TrainConfig(loss=loss)
    with pytest.raises(ValueError, match=r"config\.loss must give one number an example, \[64\], got \[\]"):
        fit(small, small, key=KEY, config=config, epochs=1)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"image_shape": (28,)}, ValueError, r"image_shape must be \(height, width, \.\.\.\)"),
        ({"image_shape": [28, 28]}, TypeError, "image_shape must be a tuple of ints"),
        ({"classes": 1}, ValueError, "classes must be at least 2, got 1"),
        ({"input_dropout": 1.0}, ValueError, r"input_dropout must lie in \[0, 1\), got 1\.0"),
        ({"input_dropout": 1 - 1e-9}, ValueError, r"input_dropout must lie in \[0, 1\)"),
        ({"learning_rate": 10**400}, ValueError, "learning_rate must be positive and finite, got inf"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must lie in \[0, 1\)"),
        ({"label_smoothing": float("nan")}, ValueError, r"label_smoothing must lie in \[0, 1\), got nan"),
        ({"dtype": "float16"}, ValueError, 'dtype must be "bfloat16" or None'),
        ({"shift": -1}, ValueError, "shift must be at least 0"),
        ({"shift": 1.5}, TypeError, "shift must be an int"),
        ({"flip": 1}, TypeError, "flip must be a bool, got 1"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be at least 0"),
        ({"decay_steps": 0}, ValueError, "decay_steps must be at least 1"),
        ({"decay_steps": 5, "warmup_steps": 5}, ValueError, "more than warmup_steps, 5; got 5"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be at least 0 and finite"),
        ({"max_norm": 0.0}, ValueError, "max_norm must be positive and finite"),
        ({"average_decay": 1.0}, ValueError, r"average_decay must lie in \[0, 1\)"),
        ({"loss": 3}, TypeError, "loss must be callable, got 3"),
        ({"loss": Unhashable()}, TypeError, "loss must be hashable, as functions are, got"),
        ({"loss": focal_loss, "label_smoothing": 0.1}, ValueError, "label_smoothing would have no effect: loss"),
        ({"optimiser": optax.sgd, "weight_decay": 0.1}, ValueError, "weight_decay would have no effect"),
        ({"model": Convolutional, "hidden": (3,), "dtype": "bfloat16"}, ValueError, "hidden, dtype would have no eff"),
    ],
)
def test_bad_fields_are_refused(fields, error, message, unchecked):
    with pytest.raises(error, match=message):
        TrainConfig(**fields)
