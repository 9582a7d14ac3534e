"""Run both programs side by side: the same weights, batches and dropout masks, step by step.

`test_parity.py` calls it; as a script, `JAX_ENABLE_X64=1 python tests/parity.py STEPS RATE...`, it runs in double
precision and prints what it measured, a line of JSON for each dropout rate.
"""

import contextlib
import json
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.reference import TutorialMLP, set_params, standardise
from fashion_jax import Batch, TrainConfig, load
from fashion_jax.model import Dropout
from fashion_jax.train import TrainState, evaluate, init_state, train_step

BATCH_SIZE = 64
HIDDEN = ("fc1", "fc2", "fc3")
SHORT = 32  # 60,000 images leave 32 for the last of 938 batches.


class GivenMasks(torch.nn.Module):
    """Dropout whose masks were drawn elsewhere."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate, self.masks = rate, []

    def forward(self, x):
        if not self.training:
            return x
        return x * self.masks.pop(0)[: len(x)] / (1 - self.rate)


@contextlib.contextmanager
def capturing(masks: list, signs: list):
    """Hand over what the compiled step really draws and decides: each dropout mask, and each hidden unit's sign."""

    def intercept(method, args, kwargs, context):
        result = method(*args, **kwargs)
        if isinstance(context.module, Dropout) and context.method_name == "keep_mask":
            jax.debug.callback(lambda mask: masks.append(torch.tensor(np.array(mask))), result, ordered=True)
        if context.module.name in HIDDEN and context.method_name == "__call__":
            jax.debug.callback(lambda on: signs.append(np.array(on)), result > 0, ordered=True)
        return result

    # The interceptor works while the step is traced, so the step is traced anew, and forgotten afterwards.
    jax.clear_caches()
    try:
        with nn.intercept_methods(intercept):
            yield
    finally:
        jax.clear_caches()


def largest(first, second) -> float:
    """Largest absolute difference between two trees of arrays."""
    differences = jax.tree.map(
        lambda a, b: np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max(), first, second
    )
    return float(max(jax.tree.leaves(differences)))


def as_params(named) -> dict[str, Any]:
    """Lay PyTorch's tensors out as Flax does."""
    layers: dict[str, Any] = {}
    for name, tensor in named:
        layer, kind = name.split(".")
        array = tensor.detach().numpy()
        layers.setdefault(layer, {})["kernel" if kind == "weight" else "bias"] = array.T
    return layers


def set_state(model: TutorialMLP, optimiser: torch.optim.Adam, state: TrainState) -> None:
    """Put the PyTorch side where the JAX side stands."""
    set_params(model, state.params)
    for moment, name in ((state.opt_state[0].mu, "exp_avg"), (state.opt_state[0].nu, "exp_avg_sq")):
        for layer, leaves in moment.items():
            linear = model.get_submodule(layer)
            optimiser.state[linear.weight][name].copy_(torch.tensor(np.asarray(leaves["kernel"]).T))
            optimiser.state[linear.bias][name].copy_(torch.tensor(np.asarray(leaves["bias"])))


def compare(rate: float, steps: int) -> dict[str, float]:
    """Train `steps` full batches and one short one on both sides; return the largest differences seen.

    A unit whose input is 0 within rounding is on for one program and off for the other, and both are right; Adam turns
    that into another network within tens of steps, in PyTorch against itself as well (see `benchmarks/README.md`). So
    after a step in which a sign differed, both sides go on from the same state; how often is counted.
    """
    dtype = torch.float64 if jax.config.jax_enable_x64 else torch.float32
    splits = load()
    # The evaluation's last chunk is a short one as well: 10,000 = 6 * 1,500 + 1,000.
    config = TrainConfig(batch_size=BATCH_SIZE, eval_batch_size=1_500)
    key = jax.random.key(0)
    state = init_state(key, config=config)
    order = np.random.default_rng(0).permutation(60_000)

    model = TutorialMLP(rate).to(dtype)
    model.dropout = given = GivenMasks(rate)
    torch_signs: list[np.ndarray] = []
    for name in HIDDEN:
        model.get_submodule(name).register_forward_hook(lambda *seen: torch_signs.append((seen[-1] > 0).numpy()))
    set_params(model, state.params)
    optimiser = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    model.train()

    worst = dict.fromkeys(("loss (relative)", "parameters", "Adam's first moment", "Adam's second moment"), 0.0)
    masks_seen, steps_with_a_sign, signs = 0, 0, []
    with capturing(given.masks, signs):
        for step in range(steps + 1):
            rows = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            n = SHORT if step == steps else BATCH_SIZE
            batch = Batch(jnp.array(splits.train.images[rows]), jnp.array(splits.train.labels[rows]))
            weights = (jnp.arange(BATCH_SIZE) < n).astype(float)
            state, metrics = train_step(
                state, batch, jax.random.fold_in(key, step), config=config, dropout_rate=rate, weights=weights
            )
            jax.effects_barrier()
            masks_seen += len(given.masks)

            images = standardise(torch.tensor(splits.train.images[rows[:n]]), dtype)
            labels = torch.tensor(splits.train.labels[rows[:n]], dtype=torch.int64)
            loss = torch.nn.functional.nll_loss(model(images), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

            worst["loss (relative)"] = max(worst["loss (relative)"], abs(float(metrics.loss) / loss.item() - 1))
            if any((ours[:n] != theirs).any() for ours, theirs in zip(signs, torch_signs, strict=True)):
                steps_with_a_sign += 1
                set_state(model, optimiser, state)
            else:
                adam = state.opt_state[0]
                moments = [[optimiser.state[p][kind] for p in model.parameters()] for kind in ("exp_avg", "exp_avg_sq")]
                names = [name for name, _ in model.named_parameters()]
                for measure, ours, theirs in (
                    ("parameters", state.params, list(model.parameters())),
                    ("Adam's first moment", adam.mu, moments[0]),
                    ("Adam's second moment", adam.nu, moments[1]),
                ):
                    difference = largest(ours, as_params(zip(names, theirs, strict=True)))
                    worst[measure] = max(worst[measure], difference)
            signs.clear()
            torch_signs.clear()
    assert masks_seen == 3 * (steps + 1)
    assert not given.masks

    count = int(optimiser.state[model.fc1.weight]["step"])
    measured = evaluate(state.params, jax.tree.map(jnp.array, splits.test), config=config)
    set_params(model, state.params)
    model.eval()
    with torch.no_grad():
        log_probs = model(standardise(torch.tensor(splits.test.images), dtype))
    labels = torch.tensor(splits.test.labels, dtype=torch.int64)
    loss = torch.nn.functional.nll_loss(log_probs, labels).item()
    accuracy = (log_probs.argmax(dim=1) == labels).to(torch.float64).mean().item()
    return worst | {
        "Adam's step count": abs(int(state.opt_state[0].count) - count),
        "evaluation loss (relative)": abs(float(measured.loss) / loss - 1),
        "evaluation accuracy": abs(float(measured.accuracy) - accuracy),
        "steps with a sign that differed": steps_with_a_sign,
    }


if __name__ == "__main__":
    for rate in sys.argv[2:]:
        print(json.dumps(compare(float(rate), int(sys.argv[1]))))
