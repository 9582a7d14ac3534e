"""One run: `fit` returns the same as a loop over the steps."""

import contextlib
import mmap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweep_worker import CONFIG, LINEAR, close, equal, same

from fashion_jax import FashionMLP, TrainConfig, subset
from fashion_jax.train import evaluate, fit, init_state, train_epoch
from fashion_jax.types import Batch, Best

KEY = jax.random.key(3)
COMPILATION = "/jax/core/compile/backend_compile_duration"
OPTIONS = {"key": KEY, "config": CONFIG, "learning_rate": 0.02, "dropout_rate": 0.2}


@pytest.fixture(scope="module")
def whole(data):
    return fit(*data, **OPTIONS, epochs=10)


def test_the_same_arguments_give_the_same_run(data, whole):
    fit(*data, **OPTIONS | {"dropout_rate": 0.7}, epochs=1)
    equal(fit(*data, **OPTIONS, epochs=10), whole)
    same(fit(*data, **OPTIONS, epochs=3).history, jax.tree.map(lambda leaf: leaf[:3], whole.history))
    for change in ({"key": jax.random.key(4)}, {"dropout_rate": 0.3}, {"learning_rate": 0.01}):
        other = fit(*data, **OPTIONS | change, epochs=10)
        assert (other.history.running_loss != whole.history.running_loss).all()


def test_other_numbers_and_epochs_compile_nothing(data, whole, unchecked):
    again = TrainConfig(model=FashionMLP(hidden=(16,)), optimizer=optax.adamw, train_eval_size=150)
    events, cases = [], ((0.0, 0.1, 1), (0.5, 1e-4, 3), (np.float32(0.2), jnp.float32(0.1), 2))
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    try:
        for rate, learning_rate, epochs in cases:
            numbers = {"dropout_rate": rate, "learning_rate": learning_rate}
            fit(*data, key=jax.random.key(epochs), config=again, epochs=epochs, **numbers)
        assert COMPILATION not in events
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
    fresh = init_state(KEY, config=CONFIG)._replace(params=whole.best.params)
    equal(*(fit(*data, **OPTIONS, epochs=2, start=start) for start in (whole.best, fresh)))


def aligned(array) -> np.ndarray:
    """Copy to the start of a page, which JAX could use as it is, without a copy of its own."""
    copy = np.frombuffer(mmap.mmap(-1, array.nbytes), array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


def test_the_caller_s_arrays_stay_and_may_change_afterwards(data, whole):
    own, ends = [Batch(*map(aligned, batch)) for batch in data], []

    def spoil(end):
        if not ends:
            same(own, list(data))
        ends.append(end)
        for array in jax.tree.leaves(own):
            array[:] = 0

    equal(fit(*own, **OPTIONS, epochs=10, callbacks=[spoil]), whole)
    same(ends[2].fetch_state(), fit(*data, **OPTIONS, epochs=3).state)


@pytest.mark.parametrize(("answer", "epochs"), [(True, 3), (np.True_, 3), (np.False_, 5), (17, 5)])
def test_callbacks_are_called_in_order_until_one_returns_true(data, whole, answer, epochs):
    calls = []
    callbacks = [
        lambda end: calls.append(("first", end)) or (end.epoch == 3 and answer),
        lambda end: calls.append(("second", end)),
    ]
    run = fit(*data, **OPTIONS, epochs=5, callbacks=iter(callbacks))
    expected = [(name, epoch, 5) for epoch in range(1, epochs + 1) for name in ("first", "second")]
    assert [(name, end.epoch, end.epochs) for name, end in calls] == expected
    same(run.history, jax.tree.map(lambda leaf: leaf[:epochs], whole.history))
    end, numbers = calls[-1][1], {"dropout_rate": 0.2, "learning_rate": 0.02}
    assert (end.axes, end.hyperparameters) == ({}, numbers)
    same((end.history, end.fetch_state()), (run.history, run.state))
    curves = {name: curve[-1] for name, curve in run.history.curves().items()}
    assert end.rows() == [{**numbers, "epoch": epochs, **curves}]


def test_other_parameters_may_be_evaluated(data):
    """An average of the parameters."""
    average_of = optax.contrib.schedule_free_eval_params
    config = TrainConfig(model=LINEAR.model, optimizer=optax.contrib.schedule_free_sgd, eval_params=average_of)
    run = fit(*data, key=KEY, config=config, learning_rate=0.5, epochs=3)
    average = average_of(run.state.opt_state, run.state.params)
    assert abs(run.state.params["fc1"]["kernel"] - average["fc1"]["kernel"]).max() > 1e-2
    close(run.best.params, average, rtol=1e-5, atol=1e-8)
    for batch, metrics in zip(data, (run.history.train, run.history.validation), strict=True):
        close([curve[-1] for curve in metrics], list(evaluate(average, batch, config=config)), rtol=1e-3)


def test_a_run_that_diverges_raises(data):
    with pytest.raises(FloatingPointError, match=r"^training diverged in epoch 1; a lower learning_rate may help$"):
        fit(*data, **OPTIONS | {"learning_rate": 1e30}, epochs=2)
    huge = fit(*data, **OPTIONS | {"learning_rate": 1e5}, epochs=1)
    assert 1e6 < huge.history.running_loss[0] < np.inf


@pytest.mark.parametrize("switch", [jax.enable_checks, jax.enable_x64])
def test_healthy_runs_pass_the_checks_of_jax(data, tmp_path, switch):
    config = TrainConfig(model=LINEAR.model, batch_size=50)
    switches = switch(True), jax.debug_nans(True), jax.debug_infs(True), jax.numpy_dtype_promotion("strict")
    with contextlib.ExitStack() as stack:
        for each in switches:
            stack.enter_context(each)
        expected = {np.dtype(jnp.result_type(float))}
        for epochs in (1, 2):
            run = fit(*data, key=KEY, config=config, epochs=epochs, checkpoint=tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves((run.history, run.state.params))} == expected
