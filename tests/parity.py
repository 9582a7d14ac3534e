"""The tutorial's network twice more: by hand in float64 NumPy, and in PyTorch, trained beside `train_step`."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn.functional import linear, log_softmax, nll_loss, relu

from fashion_jax.config import TrainConfig
from fashion_jax.model import Dropout, FashionMLP
from fashion_jax.steps import evaluate, init_state, train_step
from fashion_jax.types import Batch, Splits

KEY = jax.random.key(0)
SIZE, SHORT = 64, 32  # 60,000 images leave 32 for the last of 938 batches.


def loss_and_gradient(params, batch: Batch) -> tuple[float, np.ndarray, Callable[[], dict[str, Any]]]:
    """Return the mean loss, log-probabilities and gradient (if called) of the network without dropout, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    n, layers = len(batch.labels), list(params.values())
    inputs = [((np.asarray(batch.images, np.float64) / 255 - 0.5) / 0.5).reshape(n, -1)]
    for layer in layers[:-1]:
        inputs.append(np.maximum(inputs[-1] @ layer["kernel"] + layer["bias"], 0))
    logits = inputs[-1] @ layers[-1]["kernel"] + layers[-1]["bias"]
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def gradient():
        delta, found = (np.exp(log_probs) - np.eye(log_probs.shape[1])[np.asarray(batch.labels)]) / n, {}
        for name, x in reversed(list(zip(params, inputs, strict=True))):
            found[name] = {"kernel": x.T @ delta, "bias": delta.sum(axis=0)}
            delta = delta @ params[name]["kernel"].T * (x > 0)
        return found

    return -log_probs[np.arange(n), np.asarray(batch.labels)].mean(), log_probs, gradient


def torch_metrics(params, images, labels, masks, rate: float) -> tuple[torch.Tensor, float]:
    """Return loss and accuracy from PyTorch; the masks of dropout come from outside."""
    dtype = params["fc1"]["bias"].dtype
    x = ((torch.tensor(images).to(dtype) / 255 - 0.5) / 0.5).flatten(1)
    for layer, mask in zip(("fc1", "fc2", "fc3"), masks, strict=True):
        x = relu(linear(x, params[layer]["kernel"].T, params[layer]["bias"])) * torch.tensor(mask) / (1 - rate)
    log_probs = log_softmax(linear(x, params["fc4"]["kernel"].T, params["fc4"]["bias"]), dim=1)
    labels = torch.tensor(labels, dtype=torch.int64)
    return nll_loss(log_probs, labels), (log_probs.argmax(dim=1) == labels).double().mean().item()


def to_torch(tree):
    return jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)), tree)


def put(state, params, adam: torch.optim.Adam) -> None:
    """Bring PyTorch's parameters and moments to where a `TrainState` stands."""
    moments = jax.tree.leaves(state.opt_state, is_leaf=lambda node: hasattr(node, "mu"))[0]
    trees = map(jax.tree.leaves, (params, *map(to_torch, (state.params, moments.mu, moments.nu))))
    for tensor, value, first, second in zip(*trees, strict=True):
        tensor.data = value
        step = torch.tensor(float(moments.count))
        adam.state[tensor] = {"step": step, "exp_avg": first, "exp_avg_sq": second}


@jax.jit
def draw_masks(params, images, key, rate: float) -> list[Any]:
    """Return the masks of a step: dropout's outputs for hidden units that are all 1."""
    ones = jax.tree.map(lambda leaf: jnp.full_like(leaf, leaf.ndim == 1), params)
    _, seen = FashionMLP(dropout_rate=rate).apply(
        {"params": ones},
        images,
        deterministic=False,
        rngs={"dropout": key},
        capture_intermediates=lambda module, _: isinstance(module, Dropout),
        mutable=["intermediates"],
    )
    return [seen["intermediates"][f"dropout{i}"]["__call__"][0] != 0 for i in (1, 2, 3)]


def flat(tree) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def compare(splits: Splits, rate: float, *, steps: int, optimizer, lockstep: bool) -> dict[str, np.ndarray]:
    """Train `steps` full batches and a short one in both programs, and evaluate; return how far they are apart.

    With `lockstep`, PyTorch starts each step from JAX's state, instead of running free.
    """
    config = TrainConfig(optimizer=optimizer, eval_batch_size=1_500)
    numbers, order = {"dropout_rate": rate, "learning_rate": 0.003}, np.random.default_rng(0).permutation(60_000)
    state = init_state(KEY, config=config, **numbers)
    params = jax.tree.map(torch.nn.Parameter, to_torch(state.params))
    adam = torch.optim.Adam(jax.tree.leaves(params), lr=0.003)
    apart = collections.defaultdict(list)
    for step in range(steps + 1):
        rows, n = order[step * SIZE : (step + 1) * SIZE], SHORT if step == steps else SIZE
        batch = Batch(*(jnp.array(leaf[rows]) for leaf in splits.train))
        weights = (jnp.arange(SIZE) < n).astype(float)
        key = jax.random.fold_in(KEY, step)
        masks = [np.array(mask[:n]) for mask in draw_masks(state.params, batch.images, key, rate)]
        if lockstep:
            put(state, params, adam)
        before = flat(state.params)
        state, metrics = train_step(state, batch, key, config=config, weights=weights, **numbers)

        loss, accuracy = torch_metrics(params, *(leaf[rows[:n]] for leaf in splits.train), masks, rate)
        adam.zero_grad()
        loss.backward()
        adam.step()

        ours = flat(state.params)
        gap = ours - flat(jax.tree.map(torch.Tensor.detach, params))
        apart["loss"].append(abs(float(metrics.loss) / loss.item() - 1))
        apart["accuracy"].append(abs(float(metrics.accuracy) - accuracy))
        apart["parameters"].append(abs(gap).max())
        # For a norm of NumPy's, the threads of BLAS would spin.
        apart["update"].append(np.sqrt((gap**2).sum() / ((ours - before) ** 2).sum()))

    measured = evaluate(state.params, Batch(*map(jnp.array, splits.test)), config=config)
    loss, accuracy = torch_metrics(to_torch(state.params), *splits.test, [1, 1, 1], 0.0)
    apart["evaluation"] = [abs(float(measured.loss) / loss.item() - 1), abs(float(measured.accuracy) - accuracy)]
    return {name: np.array(values) for name, values in apart.items()}
