"""Metrics beyond the five curves, how often an epoch is evaluated, and which optimizers train."""

import contextlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweep_worker import equal

from fashion_jax import FashionMLP, JsonLines, TrainConfig, fit, judge, predict, sweep
from fashion_jax.callbacks import EarlyStopping, Progress, read_json_lines
from fashion_jax.evidence import summarize
from fashion_jax.plot import losses
from fashion_jax.report import table
from fashion_jax.train import init_state, train_step
from fashion_jax.types import Batch

KEY = jax.random.key(4)
MODEL = FashionMLP(hidden=())
OPTIONS = {"key": KEY, "learning_rate": 0.01}


METRICS = {
    "confidence": lambda log_probs, labels: jnp.exp(log_probs.max(axis=1)).mean(),
    "grad_norm": lambda grads, updates: optax.tree.norm(grads),
}
MEASURED = TrainConfig(model=MODEL, metrics=METRICS, eval_batch_size=70)
SELDOM = TrainConfig(model=MODEL, evaluate_every=3)


def test_metrics_of_one_s_own_arrive_in_the_history_with_its_axes(data, tmp_path):
    how, log = {"config": MEASURED, "epochs": 2}, JsonLines(tmp_path / "log")
    result = sweep(*data, seeds=(4, 5), learning_rate=(0.01, 0.02), callbacks=[log], **how)
    curves = result.history.curves()
    assert list(curves)[5:] == ["train_confidence", "validation_confidence", "grad_norm"]
    run = fit(*data, **how, **OPTIONS)
    equal(result.at(learning_rate=0.01, seed=4), run)
    # Of all examples at once, whatever the chunks.
    sure = predict(run.state.params, data[1].images, config=MEASURED).max(axis=1).mean()
    np.testing.assert_allclose(run.history.validation.others["confidence"][-1], sure, rtol=1e-5)
    assert read_json_lines(tmp_path / "log")[-1]["grad_norm"] == curves["grad_norm"][1, 1, 1]
    # Plain gradient descent changes the parameters by the gradient times the learning rate.
    config = TrainConfig(model=MODEL, optimizer=optax.sgd, metrics=METRICS)
    before = init_state(KEY, config=config)
    after, step = train_step(before, jax.tree.map(jnp.array, data[0]), KEY, config=config, learning_rate=0.01)
    moved = jax.tree.map(jnp.subtract, after.params, before.params)
    np.testing.assert_allclose(step.others["grad_norm"], optax.tree.norm(moved) / 0.01, rtol=1e-3)


def test_an_evaluation_left_out_changes_nothing_but_the_history(data, tmp_path, capfd):
    often = fit(*data, config=TrainConfig(model=MODEL), epochs=7, **OPTIONS)
    options = OPTIONS | {"config": SELDOM, "checkpoint": tmp_path}
    fit(*data, epochs=4, **options)
    seldom = fit(*data, epochs=7, callbacks=[Progress()], **options)
    equal(often._replace(history=0, best=0), seldom._replace(history=0, best=0))
    # The first call ended with the fourth epoch.
    left_out = np.isin(range(1, 8), [1, 2, 5])
    for name, curve in seldom.history.curves().items():
        hidden = left_out & (name != "running_loss")
        np.testing.assert_array_equal(curve, np.where(hidden, np.nan, often.history.curves()[name]))
    best = 1 + np.nanargmin(seldom.history.validation.loss)
    assert summarize(seldom.history).best_epoch == seldom.best.epoch == best
    assert "epoch 5/7: training loss (running) " in capfd.readouterr().err
    # Evidence, tables and pictures take the epochs that there are.
    arm, found = jax.tree.map(lambda leaf: leaf[None], seldom.history), seldom.history.validation.loss[~left_out]
    assert f"| last: 7    | {often.history.running_loss[-1]:.4f} " in table({"arm": arm})
    assert judge(arm, arm)[0].interval.mean == pytest.approx(found.mean() - found.min())
    assert losses({"arm": arm}).axes[0].lines[1].get_xdata().tolist() == [3, 4, 6, 7]


def test_early_stopping_waits_for_evaluations(data):
    """With learning rate 0, the first evaluation stays the best."""
    stop, options = EarlyStopping(patience=2), OPTIONS | {"config": SELDOM, "learning_rate": 0.0}
    with pytest.warns(match="the losses have not changed since epoch 3: has a schedule ended") as told:
        run = fit(*data, epochs=20, callbacks=[stop], **options)
    assert (len(told), run.history.running_loss.shape) == (1, (9,))


def test_a_schedule_that_has_ended_is_told(data):
    schedule = TrainConfig(model=MODEL, optimizer=lambda rate: optax.sgd(optax.cosine_decay_schedule(rate, 12)))
    with pytest.warns(UserWarning, match="have not changed since epoch 1") as told:
        sweep(*data, seeds=[0], config=schedule, epochs=3, rate=(0.01, 0.0))
    assert len(told) == 1
    with pytest.warns(UserWarning, match="the losses have not changed since epoch 3: has a schedule ended") as told:
        fit(*data, key=KEY, config=schedule, epochs=5, rate=0.01)
    assert len(told) == 1


PARTS = {
    "sam": lambda learning_rate: optax.contrib.sam(optax.adam(learning_rate), optax.sgd(0.05)),
    "clip": lambda learning_rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate)),
    "plateau": lambda learning_rate: optax.chain(optax.adam(learning_rate), optax.contrib.reduce_on_plateau()),
    "apply_if_finite": lambda learning_rate: optax.apply_if_finite(optax.adam(learning_rate), 3),
    "partition": lambda learning_rate: optax.partition(
        {"slow": optax.sgd(learning_rate), "fast": optax.adam(learning_rate)},
        lambda params: {"fc1": {"kernel": "fast", "bias": "slow"}},
    ),
}
# Every function of optax that makes an optimizer of a learning rate.
FACTORIES = {
    name: value
    for name, value in (vars(optax) | vars(optax.contrib)).items()
    if name[0] != "_" and inspect.isfunction(value) and "learning_rate" in inspect.signature(value).parameters
}
REFUSED = {"schedule_free": "needs base_optimizer", "dpsgd": "needs l2_norm_clip, noise_multiplier, seed"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FACTORIES | PARTS)
def test_every_optimizer_of_optax_trains_or_says_why_not(splits, name):
    small = jax.tree.map(jnp.array, Batch(splits.train.images[:32, 8:20:3, 8:20:3], splits.train.labels[:32]))
    config, losses = TrainConfig(model=MODEL, optimizer=(FACTORIES | PARTS)[name]), []
    refused = pytest.raises(TypeError, match=REFUSED[name]) if name in REFUSED else contextlib.nullcontext()
    with refused, jax.disable_jit():  # To compile it would take longer.
        state = init_state(KEY, config=config, image_shape=(4, 4))
    for _ in range(0 if name in REFUSED else 6):
        state, metrics = train_step(state, small, KEY, config=config, learning_rate=0.01)
        losses.append(float(metrics.loss))
    # One finds its learning rate first, the other is the part of an optimizer that does not turn the sign.
    improves = name not in {"dog", "scale_by_rprop", *REFUSED}
    assert losses[-1] < losses[0] if improves else np.isfinite(losses).all()
