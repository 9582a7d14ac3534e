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
from typing import Annotated

import jax
import numpy as np
import tyro

from benchmarks import harness
from fashion_jax import TrainConfig, data, fit
from fashion_jax.checkpoint import content_digest
from fashion_jax.sweep import sweep

EPOCHS, IMAGES = 12, 2_000


@dataclasses.dataclass(frozen=True)
class Flags:
    kills: int = 100
    """How many times a run is killed."""
    seed: int = 0
    """Seed of the random moments."""
    program: str = "fit"
    """fit, or sweep with 2 rates and 2 seeds."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the record; by default benchmarks/records/<date>-<device>."""
    worker: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Used by the script itself: be the run that saves here, and tell each epoch."""


def train(program: str, checkpoint: str | None) -> str:
    """Run to the end; return the digest of everything."""
    splits = data.load()
    parts = (data.subset(part, IMAGES, key=jax.random.key(7)) for part in splits)

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


def start(program: str, checkpoint: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.kill_resume", "--program", program, "--worker", checkpoint]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def main(flags: Flags) -> int:
    if flags.worker:
        print(f"digest {train(flags.program, flags.worker)}", flush=True)
        return 0
    if flags.program not in ("fit", "sweep"):
        raise ValueError(f"--program must be fit or sweep, got {flags.program!r}")
    moments = random.Random(flags.seed)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = start(flags.program, str(Path(folder) / "undisturbed"))
        began = time.monotonic()
        out, _ = undisturbed.communicate()
        duration = time.monotonic() - began
        expected = out.splitlines()[-1]
        kills = chains = differences = during = 0
        while kills < flags.kills:
            chains += 1
            checkpoint = str(Path(folder) / f"run-{chains}")
            while True:
                process = start(flags.program, checkpoint)
                # Early enough to meet the beginning, late enough to meet the end; the last third finishes undisturbed.
                wait = moments.uniform(0.3, 1.5) * duration
                try:
                    out, _ = process.communicate(timeout=wait if kills < flags.kills else None)
                    break
                except subprocess.TimeoutExpired:
                    os.kill(process.pid, signal.SIGKILL)
                    process.communicate()
                    kills += 1
                    during += bool(list(Path(checkpoint).glob("*orbax-checkpoint-tmp*")))
                    print(f"kill {kills} after {wait:.2f} s", file=sys.stderr, flush=True)
            differences += out.splitlines()[-1] != expected
    rows = [
        {
            "program": flags.program,
            "epochs": EPOCHS,
            "kills": kills,
            "of these while saving": during,
            "runs that ended": chains,
            "runs that differ": differences,
        }
    ]
    harness.write(f"kill_resume_{flags.program}", rows, flags=flags, output=flags.output, figure=None)
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Flags, description=__doc__)))
