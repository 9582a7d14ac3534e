"""How many images per second does `predict` classify, 1, 32 and 10,000 at a time? Beside PyTorch."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
import torch

from benchmarks import harness
from benchmarks.reference import TutorialMLP, normalize, set_params
from fashion_jax import load, predict, predict_mc
from fashion_jax.train import init_state

# Both sides compute in float32; what is timed has to be the same thing.
AGREEMENT = 1e-5
RATE = 0.2
TORCH_CHUNK = 1_000


@dataclasses.dataclass(frozen=True)
class Flags(harness.TimedFlags):
    device: Literal["cpu", "gpu"] = "cpu"  # Where both sides run.
    sizes: tuple[int, ...] = (1, 32, 10_000)  # Images at a time.
    seconds: float = 0.05  # Length of a timed run, which classifies the images again and again.


def main(flags: Flags) -> None:
    device = harness.use_device(flags.device)
    images = load().test.images
    if max(flags.sizes) > len(images):
        raise ValueError(f"--sizes must be at most {len(images):,}, got {flags.sizes}")
    params = init_state(jax.random.key(0)).params
    model = TutorialMLP(RATE)
    set_params(model, params)
    model.to(device).eval()

    @torch.inference_mode()
    def by_torch(batch: np.ndarray, chunk: int = 60_000) -> np.ndarray:
        parts = torch.from_numpy(batch).to(device).split(chunk)
        return torch.cat([model(normalize(part)).exp() for part in parts]).cpu().numpy()

    programs: dict[str, Callable[[np.ndarray], Any]] = {
        "predict": partial(predict, params),
        "PyTorch, all at once": by_torch,
        "predict_mc, 100 samples": partial(predict_mc, params, key=jax.random.key(1), samples=100, dropout_rate=RATE),
    }
    rows: list[harness.Row] = []
    for size in flags.sizes:
        batch = np.array(images[:size])
        difference = np.abs(programs["predict"](batch) - by_torch(batch)).max()
        if difference > AGREEMENT:
            raise ValueError(f"predict and PyTorch differ by {difference:.1e} on {size} images")
        if size > TORCH_CHUNK:
            programs[f"PyTorch, chunks of {TORCH_CHUNK:,}"] = partial(by_torch, chunk=TORCH_CHUNK)
        once = harness.alternate({name: partial(program, batch) for name, program in programs.items()}, 1)
        calls = {name: max(1, round(flags.seconds / seconds)) for name, (seconds,) in once.items()}
        repeated = {name: partial(_repeat, program, batch, calls[name]) for name, program in programs.items()}
        for name, runs in harness.alternate(repeated, flags.repetitions).items():
            timing = harness.spread([run / calls[name] for run in runs])
            rows.append({"images": size, "program": name, "images/s": size / timing["median (s)"], **timing})
    harness.write("predict", rows, flags=flags)


def _repeat(program: Callable[[np.ndarray], Any], batch: np.ndarray, times: int) -> None:
    for _ in range(times):
        program(batch)


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
