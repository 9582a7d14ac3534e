"""One run: `fit` returns the same as a loop over the steps."""

import contextlib
import functools
import mmap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweep_worker import CONFIG, equal, parts, same

from fashion_jax import FashionMLP, TrainConfig, subset
from fashion_jax.devices import _map
from fashion_jax.train import evaluate, fit, init_state, train_epoch
from fashion_jax.types import Batch, Best

KEY = jax.random.key(3)
COMPILATION = "/jax/core/compile/backend_compile_duration"
# The validation loss is lowest in the ninth of ten epochs.
OPTIONS = {"key": KEY, "config": CONFIG, "learning_rate": 0.02, "dropout_rate": 0.2}


@pytest.fixture(scope="module")
def data(small, splits):
    return parts(small, splits)


@pytest.fixture(scope="module")
def whole(data):
    return fit(*data, **OPTIONS, epochs=10)


def last(leaf):
    return leaf[-1]


def close(first, second, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), first, second)


def test_the_same_arguments_give_the_same_run(data, whole):
    fit(*data, **OPTIONS | {"dropout_rate": 0.7}, epochs=1)
    equal(fit(*data, **OPTIONS, epochs=10), whole)
    same(fit(*data, **OPTIONS, epochs=3).history, jax.tree.map(lambda leaf: leaf[:3], whole.history))
    for change in ({"key": jax.random.key(4)}, {"dropout_rate": 0.3}, {"learning_rate": 0.01}):
        other = fit(*data, **OPTIONS | change, epochs=10)
        assert (other.history.running_loss != whole.history.running_loss).all()


def test_other_numbers_and_epochs_compile_nothing(data, whole, unchecked):
    again = TrainConfig(model=FashionMLP(hidden=(16,)), optimizer=optax.adamw, train_eval_size=150)
    cases = ((0.0, 0.1, 1), (0.5, 1e-4, 3), (np.float32(0.2), jnp.float32(0.1), 2))
    events, before = [], _map._cache_size()
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    try:
        for rate, learning_rate, epochs in cases:
            numbers = {"dropout_rate": rate, "learning_rate": learning_rate}
            fit(*data, key=jax.random.key(epochs), config=again, epochs=epochs, **numbers)
        assert (COMPILATION in events, _map._cache_size()) == (False, before)
        jax.jit(lambda x: x + 1)(1)
        assert COMPILATION in events
    finally:
        jax.monitoring.clear_event_listeners()


def test_a_run_is_a_loop_over_epochs(data, whole):
    # The training loss is evaluated on a fixed part.
    train, validation, part = jax.tree.map(jnp.array, (*data, subset(data[0], 150, key=jax.random.key(0))))
    numbers = {"dropout_rate": 0.2, "learning_rate": 0.02}
    state = init_state(KEY, config=CONFIG, **numbers)
    best = Best(state.params, np.inf, 0)
    for epoch in range(10):
        state, losses = train_epoch(state, train, KEY, config=CONFIG, **numbers)
        on_train, on_validation = (evaluate(state.params, batch, config=CONFIG) for batch in (part, validation))
        expected = [losses.mean(), *on_train, *on_validation]
        np.testing.assert_allclose([curve[epoch] for curve in whole.history.curves().values()], expected, rtol=2e-4)
        if on_validation.loss < best.loss:
            best = Best(state.params, on_validation.loss, epoch + 1)
    close((whole.state, whole.best), (state, best), rtol=1e-3, atol=1e-3)
    assert whole.best.epoch == whole.history.validation.loss.argmin() + 1 == 9
    assert whole.best.loss == whole.history.validation.loss.min()
    assert {type(leaf) for leaf in jax.tree.leaves(whole)} == {np.ndarray}


def test_a_run_starts_where_another_one_ended(data, whole):
    first = fit(*data, **OPTIONS, epochs=3)
    rest = fit(*data, **OPTIONS, epochs=7, start=first.state)
    same(rest.state, whole.state)
    same(rest.history, jax.tree.map(lambda leaf: leaf[3:], whole.history))
    assert rest.best.epoch == 6
    # Its best parameters start a new one.
    with pytest.warns(match="the losses have not changed since epoch 1"):
        still = fit(*data, **OPTIONS | {"learning_rate": 0.0}, epochs=2, start=whole.best)
    same(still.state.params, whole.best.params)
    np.testing.assert_allclose(still.history.validation.loss, whole.best.loss, rtol=1e-6)
    assert (int(still.state.step), int(still.best.epoch)) == (8, 1)
    started = init_state(KEY, config=CONFIG)._replace(params=whole.best.params)
    equal(*(fit(*data, **OPTIONS, epochs=2, start=start) for start in (whole.best, started)))


def aligned(array) -> np.ndarray:
    """Copy to the start of a page, which JAX could use as it is, without a copy of its own."""
    copy = np.frombuffer(mmap.mmap(-1, array.nbytes), array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


def test_the_caller_s_arrays_stay_and_may_change_afterwards(data, whole):
    own = [Batch(*map(aligned, batch)) for batch in data]
    ends = []

    def spoil(end):
        if not ends:
            same(own, list(data))
        ends.append(end)
        for batch in own:
            batch.images[:], batch.labels[:] = 0, 0

    equal(fit(*own, **OPTIONS, epochs=10, callbacks=[spoil]), whole)
    same(ends[2].fetch_state(), fit(*data, **OPTIONS, epochs=3).state)


def test_callbacks_are_called_in_order_with_what_is_returned(data):
    calls = []
    callbacks = [lambda end, name=name: calls.append((name, end)) for name in "ab"]
    run = fit(*data, **OPTIONS, epochs=2, callbacks=iter(callbacks))
    assert [(name, end.epoch, end.epochs) for name, end in calls] == [(n, e, 2) for e in (1, 2) for n in "ab"]
    end, numbers = calls[-1][1], {"dropout_rate": 0.2, "learning_rate": 0.02}
    assert (end.axes, end.hyperparameters) == ({}, numbers)
    same(end.history, run.history)
    same(end.fetch_state(), run.state)
    assert end.rows() == [{**numbers, "epoch": 2, **{name: curve[1] for name, curve in run.history.curves().items()}}]


@pytest.mark.parametrize(("answer", "epochs"), [(True, 3), (np.True_, 3), (None, 5), (np.False_, 5), (17, 5), ("a", 5)])
def test_a_callback_that_returns_true_ends_the_run(data, whole, answer, epochs):
    calls = []
    callbacks = [lambda end: end.epoch == 3 and answer, lambda end: calls.append(end.epoch)]
    run = fit(*data, **OPTIONS, epochs=5, callbacks=callbacks)
    assert calls == list(range(1, epochs + 1))
    same(run.history, jax.tree.map(lambda leaf: leaf[:epochs], whole.history))


def test_other_parameters_may_be_evaluated(data):
    """An average of the parameters."""
    average_of = optax.contrib.schedule_free_eval_params
    config = TrainConfig(model=CONFIG.model, optimizer=optax.contrib.schedule_free_sgd, eval_params=average_of)
    ends = []
    run = fit(*data, key=KEY, config=config, learning_rate=0.5, epochs=6, callbacks=[ends.append])
    states = [end.fetch_state() for end in ends]
    averages = [average_of(state.opt_state, state.params) for state in states]
    train, validation = jax.tree.map(jnp.array, data)
    for end, average in zip(ends, averages, strict=True):
        close(jax.tree.map(last, end.history.train), evaluate(average, train, config=config), rtol=1e-3)
        close(jax.tree.map(last, end.history.validation), evaluate(average, validation, config=config), rtol=1e-3)
    assert np.abs(states[-1].params["fc1"]["kernel"] - averages[-1]["fc1"]["kernel"]).max() > 1e-2
    close(run.best.params, averages[run.history.validation.loss.argmin()], rtol=1e-5)


def test_a_network_learns(trained):
    history = trained.history
    assert (np.diff(history.running_loss) < 0).all()
    assert (history.validation.accuracy > [0.7, 0.75, 0.78]).all()
    assert (history.train.loss[1:] < history.running_loss[1:]).all()


def test_a_run_that_diverges_raises(data, whole):
    with pytest.raises(FloatingPointError, match=r"^training diverged in epoch 1; a lower learning_rate may help$"):
        fit(*data, **OPTIONS | {"learning_rate": 1e30}, epochs=2)
    params = jax.tree.map(np.array, whole.state.params)
    params["fc2"]["bias"][3] = np.nan
    with pytest.raises(FloatingPointError, match="diverged in epoch 1"):
        fit(*data, **OPTIONS, epochs=2, start=whole.state._replace(params=params))
    huge = fit(*data, **OPTIONS | {"learning_rate": 1e5}, epochs=1)
    assert 1e6 < huge.history.running_loss[0] < np.inf


@pytest.mark.parametrize(
    ("switches", "optimizer"),
    [
        ((jax.debug_nans(True), jax.debug_infs(True), jax.enable_checks(True)), optax.adam),
        ((jax.debug_nans(True), jax.debug_infs(True), jax.enable_x64(True)), optax.adam),
        ((jax.numpy_dtype_promotion("strict"),), optax.adam),
    ],
)
def test_healthy_runs_pass_the_checks_of_jax(data, tmp_path, switches, optimizer):
    config = TrainConfig(model=FashionMLP(hidden=()), optimizer=optimizer, batch_size=50)
    with contextlib.ExitStack() as stack:
        for switch in switches:
            stack.enter_context(switch)
        expected = {np.dtype(jnp.result_type(float))}
        for epochs in (1, 2):
            run = fit(*data, key=KEY, config=config, epochs=epochs, checkpoint=tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves((run.history, run.state.params))} == expected
