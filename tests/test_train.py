import csv
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fashion_jax import Batch, FashionMLP, TrainConfig, fit, train
from fashion_jax.model import init_params
from fashion_jax.train import (
    evaluate,
    init_state,
    split_key,
    start_lane,
    train_and_evaluate_epoch,
    train_epoch,
    train_step,
)

CONFIG = TrainConfig()
KEY = jax.random.key(0)
COMPILATION = "/jax/core/compile/backend_compile_duration"


def to_device(batch):
    return jax.tree.map(jnp.array, batch)


def float64_loss_and_gradient(params, batch):
    """The network without dropout and its gradient, by hand, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = ((np.asarray(batch.images, np.float64) / 255 - 0.5) / 0.5).reshape(len(batch.labels), -1)
    activations = [x]
    for i in range(1, 5):
        x = activations[-1] @ params[f"fc{i}"]["kernel"] + params[f"fc{i}"]["bias"]
        activations.append(np.maximum(x, 0) if i < 4 else x)
    logits = activations.pop()
    log_probs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    log_probs -= logits.max(1, keepdims=True)
    n = len(batch.labels)
    loss = -log_probs[np.arange(n), batch.labels].mean()
    delta = (np.exp(log_probs) - np.eye(10)[np.asarray(batch.labels)]) / n
    gradient = {}
    for i in range(4, 0, -1):
        gradient[f"fc{i}"] = {"kernel": activations[i - 1].T @ delta, "bias": delta.sum(axis=0)}
        delta = delta @ params[f"fc{i}"]["kernel"].T * (activations[i - 1] > 0)
    return loss, log_probs, gradient


def assert_trees_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def assert_trees_close(first, second, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), first, second)


def test_the_stream_for_the_weights_draws_the_weights():
    expected = jax.jit(init_params, static_argnums=1)(split_key(KEY).init, CONFIG)
    assert_trees_close(init_state(KEY).params, expected, rtol=1e-6)


def test_negative_log_likelihood_against_numpy():
    logits = np.random.default_rng(0).normal(size=(50, 10))
    labels = np.random.default_rng(1).integers(0, 10, 50)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = [-row[label] for row, label in zip(log_probs, labels, strict=True)]
    actual = train.negative_log_likelihood(jnp.array(log_probs), jnp.array(labels))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_adam_steps_against_float64_numpy(small):
    batch = Batch(*(leaf[:64] for leaf in small))
    state = init_state(KEY)
    first, second = 0.0, 0.0
    for step in range(1, 4):
        before = state
        state, metrics = train_step(before, batch, KEY, config=CONFIG, dropout_rate=0.0)
        loss, log_probs, gradient = float64_loss_and_gradient(before.params, batch)
        assert float(metrics.loss) == pytest.approx(loss, rel=1e-5)
        assert float(metrics.accuracy) == (log_probs.argmax(axis=1) == batch.labels).mean()

        first = jax.tree.map(lambda g, m: 0.9 * m + 0.1 * g, gradient, first) if step > 1 else _scale(gradient, 0.1)
        squares = jax.tree.map(np.square, gradient)
        second = (
            jax.tree.map(lambda g, v: 0.999 * v + 0.001 * g, squares, second) if step > 1 else _scale(squares, 0.001)
        )
        adam = state.opt_state[0]
        assert_trees_close(adam.mu, first, rtol=1e-3, atol=1e-7)
        assert_trees_close(adam.nu, second, rtol=2e-3, atol=1e-10)

        def step_of_adam(before, m, v, step=step):
            update = (np.asarray(m, np.float64) / (1 - 0.9**step)) / (
                np.sqrt(np.asarray(v, np.float64) / (1 - 0.999**step)) + 1e-8
            )
            return np.asarray(before, np.float64) - 0.003 * update

        # Where a gradient is all but 0, Adam divides rounding by rounding; so the update is checked on the moments that
        # the step itself made.
        assert_trees_close(state.params, jax.tree.map(step_of_adam, before.params, adam.mu, adam.nu), atol=1e-7)
    assert int(state.step) == 3


def _scale(tree, factor):
    return jax.tree.map(lambda leaf: factor * leaf, tree)


@pytest.mark.parametrize(
    ("dtype", "default", "precision"),
    [(None, None, "HIGHEST"), (None, "tensorfloat32", "HIGH"), ("bfloat16", None, "DEFAULT")],
)
def test_matrix_products_are_in_float32_unless_something_else_was_chosen(small, dtype, default, precision):
    """On GPUs JAX's own default is TF32: forward products, and those of both gradients."""
    config = TrainConfig(dtype=dtype)
    state = init_state(jax.random.key(0), config=config)
    batch = Batch(*(leaf[:64] for leaf in small))
    step = jax.jit(functools.partial(train_step, config=config, dropout_rate=0.2))
    with jax.default_matmul_precision(default):
        text = step.lower(state, batch, jax.random.key(0)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 4 + 4 + 3
    found = [re.search(r"precision = \[(\w+), (\w+)\]", line) for line in products]
    assert {match.groups() if match else ("DEFAULT", "DEFAULT") for match in found} == {(precision, precision)}


def test_weights_mask_the_padding(small):
    state = init_state(KEY)
    real = Batch(*(leaf[:40] for leaf in small))
    padded = Batch(*(leaf[:64] for leaf in small))
    weights = jnp.arange(64) < 40
    expected = train_step(state, real, KEY, config=CONFIG, dropout_rate=0.0)
    actual = train_step(state, padded, KEY, config=CONFIG, dropout_rate=0.0, weights=weights.astype(jnp.float32))
    assert_trees_close(actual[1], expected[1], rtol=1e-6)
    assert_trees_close(actual[0].opt_state[0].mu, expected[0].opt_state[0].mu, rtol=1e-4, atol=1e-8)


def test_an_epoch_takes_every_example_once_in_a_new_order(small, monkeypatch):
    """Watch the real step inside the compiled epoch; the images carry their own number."""
    images = np.array(small.images)
    images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(1000), 256)
    numbered = to_device(Batch(images, small.labels))
    seen = {}
    taken = train._train_step

    def watched(state, batch, key, weights, *rest, config):
        # By the step's number: with ordered callbacks jaxlib 0.11.2 aborted while it compiled this for a GPU.
        jax.debug.callback(
            lambda step, *observed: seen.update({int(step): tuple(map(np.asarray, observed))}),
            state.step,
            batch.images[:, 0, :2].astype(jnp.int32),
            batch.labels,
            weights,
            jax.random.key_data(key),
        )
        return taken(state, batch, key, weights, *rest, config=config)

    monkeypatch.setattr(train, "_train_step", watched)
    config = TrainConfig(learning_rate=0.00301)  # Its own compilation, with the watcher in it.
    state = init_state(KEY, config=config)
    orders = []
    for epoch in range(2):
        state, losses = train_epoch(state, numbered, KEY, config=config, dropout_rate=0.2)
        jax.effects_barrier()
        assert sorted(seen) == list(range(16 * epoch, 16 * (epoch + 1)))
        pixels, taken_labels, weights, keys = zip(*(seen[step] for step in sorted(seen)), strict=True)
        assert [int(of_batch.sum()) for of_batch in weights] == [64] * 15 + [40]
        order = np.concatenate(
            [(of_batch @ [256, 1])[kept == 1] for of_batch, kept in zip(pixels, weights, strict=True)]
        )
        assert sorted(order) == list(range(1000))
        np.testing.assert_array_equal(np.concatenate(taken_labels)[:1000], small.labels[order])
        assert len({tuple(key) for key in keys}) == 16
        assert int(state.step) == 16 * (epoch + 1)
        assert losses.shape == (16,)
        orders.append(order)
        seen.clear()
    assert not (orders[0] == orders[1]).all()
    assert not (orders[0] == np.arange(1000)).all()


# Dropout would draw other masks for a shorter batch, so that epoch has none. The wide layer's masks are drawn for five
# steps at a time.
@pytest.mark.parametrize(
    ("n", "rate", "hidden"), [(1000, 0.0, CONFIG.hidden), (960, 0.2, CONFIG.hidden), (960, 0.2, (4096,))]
)
def test_an_epoch_is_its_steps(small, n, rate, hidden):
    """The compiled epoch against a plain loop over unpadded batches; documents how the keys are folded."""
    config = TrainConfig(hidden=hidden)
    data = to_device(Batch(*(leaf[:n] for leaf in small)))
    steps = -(-n // 64)
    start = init_state(KEY, config=config)
    start = start._replace(step=jnp.int32(steps))
    keys = split_key(KEY)
    order = jnp.argsort(jax.random.bits(jax.random.fold_in(keys.order, 1), (n,)))
    epoch_key = jax.random.fold_in(keys.dropout, 1)
    state, losses = start, []
    for step in range(steps):
        rows = order[step * 64 : (step + 1) * 64]
        batch = Batch(data.images[rows], data.labels[rows])
        key = jax.random.fold_in(epoch_key, step)
        state, metrics = train_step(state, batch, key, config=config, dropout_rate=rate)
        losses.append(float(metrics.loss))
    compiled, compiled_losses = train_epoch(start, data, KEY, config=config, dropout_rate=rate)
    np.testing.assert_allclose(compiled_losses, losses, rtol=1e-5)
    assert_trees_close(compiled.params, state.params, atol=1e-4)


def test_a_gpu_draws_masks_step_by_step_and_draws_the_same(small, monkeypatch):
    config = TrainConfig(hidden=(32, 16))
    data = to_device(Batch(*(leaf[:960] for leaf in small)))
    state = init_state(KEY, config=config)
    results = []
    for backend, stretch in {"cpu": 15, "gpu": 1}.items():
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert train._steps_in_a_stretch(15, config) == stretch
        # As a program of its own, traced anew.
        program = jax.jit(functools.partial(train._train_epoch.__wrapped__, config=config))
        results.append(program(state, data, KEY, 0.2))
    assert_trees_close(*results, atol=1e-5)


def test_evaluation_of_60_000_rows_against_float64_numpy(splits):
    params = init_state(jax.random.key(3)).params
    loss, log_probs, _ = float64_loss_and_gradient(params, splits.train)
    for size in (2_000, 7_777, 100_000):
        metrics = evaluate(params, to_device(splits.train), config=TrainConfig(eval_batch_size=size))
        assert float(metrics.loss) == pytest.approx(loss, rel=2e-6)
        # A tie within rounding may fall to another class.
        correct = (log_probs.argmax(axis=1) == splits.train.labels).sum()
        assert abs(float(metrics.accuracy) * 60_000 - correct) <= 2
    whole = train.eval_step(params, to_device(splits.train), config=CONFIG)
    assert float(whole.loss) == pytest.approx(loss, rel=2e-5)


def test_evaluation_is_deterministic_and_without_dropout(small):
    params = init_state(KEY).params
    data = to_device(small)
    first = evaluate(params, data, config=CONFIG)
    assert_trees_equal(first, evaluate(params, data, config=CONFIG))
    log_probs = FashionMLP(dropout_rate=0.9).apply({"params": params}, data.images, deterministic=True)
    expected = train.negative_log_likelihood(log_probs, data.labels).mean()
    assert float(first.loss) == pytest.approx(float(expected), rel=1e-6)


def test_one_key_one_run(small):
    runs = [fit(small, small, key=jax.random.key(seed), dropout_rate=0.2, epochs=2) for seed in (0, 0, 1)]
    assert_trees_equal(runs[0], runs[1])
    assert not (runs[0].history.running_loss == runs[2].history.running_loss).any()
    other_rate = fit(small, small, key=jax.random.key(0), dropout_rate=0.3, epochs=2)
    assert not (runs[0].history.running_loss == other_rate.history.running_loss).any()


def test_a_shorter_run_is_the_beginning_of_a_longer_one(small):
    short, long = (fit(small, small, key=KEY, dropout_rate=0.2, epochs=epochs) for epochs in (1, 3))
    assert_trees_equal(short.history, jax.tree.map(lambda leaf: leaf[:1], long.history))


def test_rate_0_is_the_run_without_dropout(small):
    with_rate = fit(small, small, key=KEY, dropout_rate=0.0, epochs=1)

    class NoDropout(FashionMLP):
        def __call__(self, x, *, deterministic):
            del deterministic
            return super().__call__(x, deterministic=True)

    without = fit(small, small, key=KEY, config=TrainConfig(model=NoDropout), epochs=1)
    assert_trees_equal(with_rate.state.params, without.state.params)


def test_one_compilation_serves_all_epochs_and_rates(small):
    events = []
    config = TrainConfig(hidden=(32,))
    first, second = jax.random.split(KEY)
    fit(small, small, key=KEY, config=config, dropout_rate=0.0, epochs=1)
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    try:
        fit(small, small, key=first, config=config, dropout_rate=0.2, epochs=3)
        fit(small, small, key=second, config=config, dropout_rate=0.5, epochs=1)
        assert COMPILATION not in events
        fit(small, small, key=KEY, config=TrainConfig(hidden=(33,)), epochs=1)
        assert COMPILATION in events
    finally:
        jax.monitoring.clear_event_listeners()


def test_history_holds_what_was_measured(small, splits):
    rows = []
    validation = Batch(*(leaf[:500] for leaf in splits.test))
    config = TrainConfig(train_eval_size=100)
    run = fit(small, validation, key=KEY, config=config, dropout_rate=0.2, epochs=2, on_epoch=rows.append)
    assert all(leaf.shape == (2,) for leaf in jax.tree.leaves(run.history))
    assert [row[:2] for row in rows] == [(1, 2), (2, 2)]
    assert {row[2:6] for row in rows} == {(config, 1_000, (0.2,), None)}
    for i, row in enumerate(rows):
        assert_trees_equal(row.history, jax.tree.map(lambda leaf, i=i: leaf[i], run.history))
        part = to_device(train.train_eval_part(small, config))
        assert len(part.labels) == 100
        expected = evaluate(row.fetch_state().params, part, config=config)
        assert row.history.train.loss == pytest.approx(float(expected.loss), rel=1e-6)
        expected = evaluate(row.fetch_state().params, to_device(validation), config=config)
        assert row.history.validation.loss == pytest.approx(float(expected.loss), rel=1e-6)
    assert_trees_equal(rows[-1].fetch_state(), run.state)


def test_the_fair_training_loss_may_use_all_examples(small):
    assert len(train.train_eval_part(small, TrainConfig(train_eval_size=None)).labels) == 1000
    assert len(train.train_eval_part(small, TrainConfig()).labels) == 1000


def test_the_caller_may_change_its_arrays_afterwards(small):
    images, labels = np.array(small.images), np.array(small.labels)

    def spoil(_):
        images[:] = 0

    expected = fit(small, small, key=KEY, epochs=2)
    assert_trees_equal(fit(Batch(images, labels), small, key=KEY, epochs=2, on_epoch=spoil).history, expected.history)


def reference_curves():
    with (Path(__file__).parent / "reference" / "pytorch_curves.csv").open() as file:
        yield from csv.DictReader(file)


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_a_short_run_on_the_real_data_falls_as_pytorch_s_do(splits, rate):
    run = fit(splits.train, splits.test, key=KEY, dropout_rate=rate, epochs=3)
    for epoch in (1, 2, 3):
        rows = [row for row in reference_curves() if float(row["dropout_rate"]) == rate and int(row["epoch"]) == epoch]
        assert len(rows) == 3
        for name, leaf, slack in (
            # Slack beyond the range of three runs: about three standard deviations between seeds.
            ("running_train_loss", run.history.running_loss, 0.010),
            ("test_loss", run.history.validation.loss, 0.06),
            ("test_accuracy", run.history.validation.accuracy, 0.03),
        ):
            seen = [float(row[name]) for row in rows]
            assert min(seen) - slack <= leaf[epoch - 1] <= max(seen) + slack, (name, epoch)
    assert (np.diff(run.history.running_loss) < 0).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": 0}, TypeError, "key must be one typed key"),
        ({"key": jax.random.split(KEY)}, TypeError, "key must be one typed key"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"epochs": 1.5}, TypeError, "epochs must be an int"),
        ({"dropout_rate": 1.0}, ValueError, r"dropout_rate must lie in \[0, 1\), got 1.0"),
        ({"dropout_rate": -0.2}, ValueError, r"dropout_rate must lie in \[0, 1\), got -0.2"),
    ],
)
def test_fit_refuses_bad_arguments(small, change, error, message, unchecked):
    arguments = {"key": KEY, "epochs": 1} | change
    with pytest.raises(error, match=message):
        fit(small, small, **arguments)


def test_fit_refuses_a_legacy_key(small, unchecked):
    with pytest.raises(TypeError, match=r"from jax\.random\.key\(seed\)"):
        fit(small, small, key=jax.random.PRNGKey(0), epochs=1)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda b: b._replace(images=b.images / 255), TypeError, "images must be uint8 pixels from 0 to 255"),
        (lambda b: b._replace(labels=b.labels.astype(np.float32)), TypeError, "labels must be integers"),
        (lambda b: b._replace(labels=b.labels[:5]), ValueError, r"images \[n, height, width\] and labels \[n\]"),
        (lambda b: b._replace(images=b.images.reshape(1000, -1)), ValueError, r"got \(1000, 784\)"),
        (lambda b: b._replace(labels=b.labels + 1), ValueError, r"must lie in 0\.\.9, got 1\.\.10"),
        (lambda b: Batch(b.images[:0], b.labels[:0]), ValueError, "at least one example"),
        (lambda b: b.images, TypeError, "must be a Batch of two arrays"),
    ],
)
@pytest.mark.parametrize("position", [0, 1])
def test_fit_refuses_bad_data(small, spoil, error, message, position, unchecked):
    data = [small, small]
    data[position] = spoil(small)
    with pytest.raises(error, match=f"{['train', 'validation'][position]}.*{message}"):
        fit(*data, key=KEY, epochs=1)


def test_the_epoch_with_evaluation_is_the_epoch_and_the_evaluations(small):
    data = to_device(small)
    train_eval, validation = (Batch(*(leaf[-size:] for leaf in data)) for size in (700, 200))
    config = TrainConfig(hidden=(32,), eval_batch_size=256)
    state = init_state(KEY, config=config)
    expected, losses = train_epoch(state, data, KEY, config=config, dropout_rate=0.2)
    lane, (history, good_steps) = train_and_evaluate_epoch(
        start_lane(state), data, train_eval, validation, KEY, config=config, dropout_rate=0.2
    )
    assert_trees_close(lane.state.params, expected.params, atol=1e-5)
    assert float(history.running_loss) == pytest.approx(float(losses.mean()), rel=1e-5)
    assert int(good_steps) == len(losses)
    for found, part in ((history.train, train_eval), (history.validation, validation)):
        assert_trees_close(found, evaluate(lane.state.params, part, config=config), atol=1e-6)


def test_evaluation_inside_a_jit_with_data_from_outside(small):
    data, params = to_device(small), init_state(KEY).params
    inside = jax.jit(lambda params: evaluate(params, data, config=CONFIG))(params)
    assert float(inside.loss) == pytest.approx(float(evaluate(params, data, config=CONFIG).loss), rel=1e-6)


def test_rates_of_any_type_share_a_program(small, unchecked):
    config = TrainConfig(hidden=(24,))
    batch = Batch(*(jnp.array(leaf[:64]) for leaf in small))
    state = init_state(KEY, config=config)
    before = train._train_step._cache_size()
    for rate in (0.2, 0, np.float32(0.2), jnp.float32(0.2)):
        train_step(state, batch, KEY, config=config, dropout_rate=rate)
    assert train._train_step._cache_size() == before + 1


def test_a_batch_is_no_larger_than_the_data(small):
    """With a billion, a batch as large as it was asked for would need terabytes."""
    part = Batch(*(jnp.array(leaf[:50]) for leaf in small))
    expected, huge = (
        train_epoch(init_state(KEY), part, KEY, config=TrainConfig(batch_size=size), dropout_rate=0.2)
        for size in (50, 10**9)
    )
    jax.tree.map(np.testing.assert_array_equal, huge, expected)
