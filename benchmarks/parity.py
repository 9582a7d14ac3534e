"""How far are training steps from PyTorch's? Same weights, batches and dropout masks, in float64 and in float32.

In float64 both programs run free. In float32 PyTorch starts each step from JAX's state, because rounding alone leads
two runs apart (see rounding.py).
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import optax

from benchmarks import harness
from fashion_jax import load
from fashion_jax.interop import torch_adam
from tests.parity import compare

# Type, optimizer, and whether PyTorch starts each step from JAX's state.
KINDS = {
    "float64": (True, optax.adam, False),
    "float32": (False, optax.adam, True),
    "float32, exact Adam": (False, torch_adam, True),
}
# Where a gradient is all but 0, Adam divides rounding by rounding: hence the median and the quantile.
MEASURES: dict[str, Callable[[dict[str, np.ndarray]], float]] = {
    "loss (relative), largest": lambda apart: apart["loss"].max(),
    "accuracy, largest": lambda apart: apart["accuracy"].max(),
    "update (relative), median of the steps": lambda apart: np.median(apart["update"]).item(),
    "parameters, 90% of the steps": lambda apart: np.quantile(apart["parameters"], 0.9).item(),
    "parameters, largest": lambda apart: apart["parameters"].max(),
    "loss of the test set (relative)": lambda apart: apart["evaluation"][0],
    "accuracy of the test set": lambda apart: apart["evaluation"][1],
}


@dataclasses.dataclass(frozen=True)
class Flags(harness.Flags):
    steps: int = 300  # Steps before the short last batch.


def main(flags: Flags) -> None:
    splits = load()
    found = {}
    for kind, (x64, optimizer, lockstep) in KINDS.items():
        for rate in (0.0, 0.2):
            with jax.enable_x64(x64):
                options = {"steps": flags.steps, "optimizer": optimizer, "lockstep": lockstep}
                found[f"{kind}, dropout {rate:g}"] = compare(splits, rate, **options)
    rows = [
        {"difference": name} | {kind: float(measure(apart)) for kind, apart in found.items()}
        for name, measure in MEASURES.items()
    ]
    harness.write("parity", rows, flags=flags)


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
