"""How many images a second does `predict` classify, one, a hundred and ten thousand at a time? Beside PyTorch."""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import torch
import tyro

from benchmarks import harness
from benchmarks.reference import TutorialMLP, set_params, standardise
from fashion_jax import load
from fashion_jax.predict import predict, predict_mc
from fashion_jax.train import init_state

# Both sides compute in float32; what is timed has to be the same thing.
AGREEMENT = 1e-5
SAMPLES, RATE = 100, 0.2
TORCH_CHUNK = 1_000


@dataclasses.dataclass(frozen=True)
class Flags:
    device: Literal["cpu", "gpu"] = "cpu"
    """Where both sides run."""
    sizes: tuple[int, ...] = (1, 100, 10_000)
    """Images at a time."""
    seconds: float = 0.05
    """Length of a timed run: it classifies the images again and again for about so many seconds."""
    repetitions: int = 10
    """Timed runs of each program, in turns."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory with the data set."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the record; by default benchmarks/records/<date>-<device>."""


def main(flags: Flags) -> None:
    device = harness.use_device(flags.device)
    images = load(flags.data_dir).test.images
    if not flags.sizes or not 1 <= min(flags.sizes) <= max(flags.sizes) <= len(images):
        raise ValueError(f"--sizes must lie between 1 and {len(images):,}, got {flags.sizes}")
    if not 0 < flags.seconds < math.inf:
        raise ValueError(f"--seconds must be positive and finite, got {flags.seconds}")
    params = init_state(jax.random.key(0)).params
    model = TutorialMLP(RATE)
    set_params(model, params)
    model.to(device).eval()

    @torch.inference_mode()
    def by_torch(batch: np.ndarray, chunk: int = 60_000) -> np.ndarray:
        parts = torch.from_numpy(batch).to(device).split(chunk)
        return torch.cat([model(standardise(part)).exp() for part in parts]).cpu().numpy()

    def by_jax(batch: np.ndarray) -> np.ndarray:
        return predict(params, batch)

    def sampled(batch: np.ndarray) -> np.ndarray:
        key = jax.random.key(1)
        return predict_mc(params, batch, key=key, samples=SAMPLES, dropout_rate=RATE).probabilities

    makers: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "predict": by_jax,
        "PyTorch, all at once": by_torch,
        f"predict_mc, {SAMPLES} samples": sampled,
    }
    rows: list[harness.Row] = []
    for size in flags.sizes:
        batch = np.array(images[:size])
        difference = np.abs(by_jax(batch) - by_torch(batch)).max()
        if difference > AGREEMENT:
            raise ValueError(f"predict and PyTorch differ by {difference:.1e} on {size} images")
        programs, calls = {}, {}
        chunk = f"PyTorch, chunks of {TORCH_CHUNK:,}"
        candidates = makers | ({chunk: lambda batch: by_torch(batch, TORCH_CHUNK)} if size > TORCH_CHUNK else {})
        for name, classify in candidates.items():
            classify(batch)
            _, once = harness.timed(lambda classify=classify, batch=batch: classify(batch))
            calls[name] = max(1, round(flags.seconds / once))

            def program(classify=classify, batch=batch, n=calls[name]):
                for _ in range(n):
                    classify(batch)

            programs[name] = program
        seconds = harness.alternate(programs, flags.repetitions)
        for name in candidates:
            timing = harness.spread([run / calls[name] for run in seconds[name]])
            rows.append({"images": size, "program": name, "images/s": size / timing["median (s)"], **timing})
    drawn = [
        {"name": f"{row['program']}, {row['images']:,}"}
        | {time: 1000 * row[time] / row["images"] for time in ("median (s)", "min (s)", "max (s)")}
        for row in rows
    ]
    figure = harness.bars(
        drawn, label="name", value="median (s)", low="min (s)", high="max (s)", unit="milliseconds an image"
    )
    harness.write("predict", rows, flags=flags, output=flags.output, figure=figure)


if __name__ == "__main__":
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    harness.start(main, Flags, __doc__)
