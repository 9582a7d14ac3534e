"""Does a run that is killed again and again end with the same bytes as one that is not?

Kills a short checkpointed run at random moments, its saving included, starts it again each time, and compares state and
History at the end of each chain with those of an undisturbed run.
"""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from benchmarks import harness
from fashion_jax import TrainConfig, data, fit
from fashion_jax.checkpoint import content_digest
from fashion_jax.sweep import sweep

EPOCHS, IMAGES = 12, 1_000


@dataclasses.dataclass(frozen=True)
class Flags:
    kills: int = 100
    """How many times a run is killed."""
    seed: int = 0
    """Seed of the random moments."""
    program: Literal["fit", "sweep"] = "fit"
    """fit, or sweep with 2 rates and 2 seeds."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the record; by default benchmarks/records/<date>-<device>."""
    worker: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Used by the script itself: be the run that saves here, and tell each epoch."""


def train(program: str, checkpoint: str | None) -> str:
    """Run to the end; return the digest of everything."""
    splits = data.load()
    parts = (data.subset(part, IMAGES, key=jax.random.key(7)) for part in splits)

    print("ready", flush=True)

    def tell(end):
        print(f"epoch {end.epoch}", flush=True)

    if program == "sweep":
        run = sweep(*parts, seeds=(0, 1), dropout_rates=(0.0, 0.2), epochs=EPOCHS, on_epoch=tell, checkpoint=checkpoint)
    else:
        config = TrainConfig(train_eval_size=1_000)
        run = fit(
            *parts,
            key=jax.random.key(0),
            dropout_rate=0.2,
            config=config,
            epochs=EPOCHS,
            on_epoch=tell,
            checkpoint=checkpoint,
        )
    return content_digest(jax.tree.map(np.asarray, run))


def start(program: str, checkpoint: Path) -> subprocess.Popen:
    """Start a run, and return when it is about to train."""
    command = [sys.executable, "-m", "benchmarks.kill_resume", "--program", program, "--worker", str(checkpoint)]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(checkpoint.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | cache
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def half_written(checkpoint: Path) -> set[tuple[str, int, int]]:
    """Tell which checkpoints are being written or were cut off, each by what no other has."""
    found = ((path.name, path.stat()) for path in checkpoint.glob("*orbax-checkpoint-tmp*"))
    return {(name, status.st_ino, status.st_ctime_ns) for name, status in found}


def kill_and_resume(program: str, folder: Path, *, kills: int, seed: int) -> harness.Row:
    """Kill runs at random moments, start each again until it ends, and compare their ends.

    Args:
        program: "fit" or "sweep".
        folder: Where the checkpoints go.
        kills: How many times.
        seed: Of the random moments.
    """
    moments = random.Random(seed)
    start(program, folder / "warm-up").communicate()
    undisturbed = start(program, folder / "undisturbed")
    began = time.monotonic()
    expected = undisturbed.communicate()[0].splitlines()[-1]
    duration = time.monotonic() - began
    killed = saving = ended = differences = 0
    while killed < kills:
        ended += 1
        checkpoint = folder / f"run-{ended}"
        while True:
            # What the kill before left stays until the run saves for the first time.
            left = half_written(checkpoint)
            process = start(program, checkpoint)
            wait = moments.uniform(0, 1.1) * duration
            try:
                out, _ = process.communicate(timeout=wait if killed < kills else None)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                killed += 1
                saving += bool(half_written(checkpoint) - left)
                print(
                    f"kill {killed} of {kills}, {wait:.2f} s after the start of training", file=sys.stderr, flush=True
                )
        differences += not expected.startswith("digest ") or out.splitlines()[-1] != expected
    return {
        "program": program,
        "epochs": EPOCHS,
        "kills": killed,
        "of these while saving": saving,
        "runs that ended": ended,
        "runs that differ": differences,
    }


def main(flags: Flags) -> int:
    if flags.worker:
        print(f"digest {train(flags.program, flags.worker)}", flush=True)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        rows = [kill_and_resume(flags.program, Path(folder), kills=flags.kills, seed=flags.seed)]
    harness.write(f"kill_resume_{flags.program}", rows, flags=flags, output=flags.output, figure=None)
    return 1 if rows[0]["runs that differ"] else 0


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
