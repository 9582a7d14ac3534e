"""How long do two float32 trainings that differ by rounding alone stay together? PyTorch against itself.

Both sides see the same batches from the same weights; one of them sees the rows of each batch in another order, which
changes nothing but the order of sums.
"""

import dataclasses

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks import harness
from benchmarks.reference import TutorialMLP, normalize
from fashion_jax import load


@dataclasses.dataclass(frozen=True)
class Flags(harness.Flags):
    seeds: int = 10  # Pairs of runs.
    steps: int = 300  # Steps of a run, at batch 64, without dropout.


def main(flags: Flags) -> None:
    if flags.steps > 937:
        raise ValueError(f"--steps must be at most 937, the whole batches of an epoch; got {flags.steps}")
    images, labels = load().train
    rows: list[harness.Row] = []
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for seed in range(flags.seeds):
        torch.manual_seed(seed)
        generator = np.random.default_rng(seed)
        models = [TutorialMLP(0.0) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        optimizers = [torch.optim.Adam(model.parameters(), lr=0.003) for model in models]
        order = generator.permutation(60_000)
        differences = []
        for step in range(flags.steps):
            batch = order[step * 64 : (step + 1) * 64]
            losses = []
            for model, optimizer, chosen in zip(models, optimizers, (batch, generator.permutation(batch)), strict=True):
                x = normalize(torch.tensor(images[chosen]))
                loss = torch.nn.functional.nll_loss(model(x), torch.tensor(labels[chosen], dtype=torch.int64))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            differences.append(abs(losses[0] / losses[1] - 1))
        apart = next((step for step, difference in enumerate(differences) if difference > 1e-4), None)
        first = "none" if apart is None else apart
        rows.append({"seed": seed, "first step over 1e-4": first, "largest": max(differences)})
        axes.semilogy(np.maximum.accumulate(np.maximum(differences, 1e-9)), color="#123a6d", alpha=0.6)
    axes.set_xlabel("step")
    axes.set_ylabel("largest relative difference\nof the losses so far")
    axes.grid(alpha=0.3)
    harness.write("rounding", rows, flags=flags, figure=figure)


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
