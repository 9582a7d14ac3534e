"""Does a run that is killed again and again end with the same bytes as one that is not?

Kills short checkpointed runs at random moments, their saving included, starts each again until it ends, and compares
its result with that of an undisturbed run.
"""

import dataclasses
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from benchmarks import harness
from fashion_jax import TrainConfig, files, fit, load, subset, sweep

EPOCHS, IMAGES = 12, 1_000


@dataclasses.dataclass(frozen=True)
class Flags(harness.Flags):
    kills: int = 100  # How many times runs of each program are killed.
    seed: int = 0  # Seed of the random moments.
    programs: tuple[Literal["fit", "sweep"], ...] = ("fit", "sweep")  # What to kill; the sweep has 2 rates and 2 seeds.
    worker: harness.Directory = None  # Used by the script itself: be the run that saves here.


def train(flags: Flags, folder: Path) -> None:
    """Run to the end, and save the result."""
    parts = [subset(part, IMAGES, key=jax.random.key(7)) for part in load()]
    print("ready", flush=True)
    shared = {"config": TrainConfig(train_eval_size=IMAGES // 2), "epochs": EPOCHS, "checkpoint": folder / "saved"}
    if flags.programs == ("fit",):
        run = fit(*parts, key=jax.random.key(0), dropout_rate=0.2, **shared)
    else:
        run = sweep(*parts, seeds=(0, 1), dropout_rate=(0.0, 0.2), **shared)
    leaves = jax.tree_util.tree_leaves_with_path((run.state, run.history, run.best))
    result = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    files.save_tensors(folder / "result", result, {})


def start(program: str, folder: Path) -> subprocess.Popen:
    """Start a run, and return when it is about to train."""
    command = [sys.executable, "-m", "benchmarks.kill_resume", "--programs", program, "--worker", str(folder)]
    cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder.parent}/cache", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3"}  # XLA takes a cached program for another machine's.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=harness.ROOT, env=os.environ | cache | quiet)
    if process.stdout is None or process.stdout.readline() != b"ready\n":
        raise ChildProcessError("a run ended before its training; see above")
    return process


def result(folder: Path) -> np.ndarray:
    return np.frombuffer((folder / "result").read_bytes(), np.uint8)


def kill_and_resume(program: str, folder: Path, *, kills: int, seed: int) -> harness.Row:
    """Kill runs at random moments, start each again until it ends, and compare their ends; files go into `folder`."""
    moments, duration = random.Random(seed), 0.0
    for name in ("warm-up", "undisturbed"):
        process, began = start(program, folder / name), time.monotonic()
        process.communicate()
        duration = time.monotonic() - began
    expected = result(folder / "undisturbed")
    killed = saving = ended = differing = 0
    while killed < kills:
        place, ended = folder / f"run-{ended}", ended + 1
        while not (place / "result").exists():
            # Until the run saves, what an earlier kill left behind stays.
            left = set(place.glob("saved/.*.partial"))
            process = start(program, place)
            try:
                process.communicate(timeout=moments.uniform(0, 1.1) * duration if killed < kills else None)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            killed += 1
            saving += bool(set(place.glob("saved/.*.partial")) - left)
            print(f"{program}: kill {killed} of {kills}", file=sys.stderr, flush=True)
        found = result(place)
        differing += int((found != expected).sum()) if len(found) == len(expected) else len(expected)
    counts = {
        "kills": killed,
        "of these while saving": saving,
        "runs that ended": ended,
        "bytes that differ": differing,
    }
    return {"program": program, "epochs": EPOCHS} | counts


def main(flags: Flags) -> int:
    if flags.worker:
        train(flags, flags.worker)
        return 0
    rows: list[harness.Row] = []
    for program in flags.programs:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(kill_and_resume(program, Path(folder), kills=flags.kills, seed=flags.seed))
    harness.write("kill_resume", rows, flags=flags)
    return int(any(row["bytes that differ"] for row in rows))


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
