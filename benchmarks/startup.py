"""How long from the start of a process to the first evaluated epoch? Cold, and with JAX's compilation cache."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks import harness

# Prints the clock at each milestone. The second epoch tells how much of the first was compilation.
CHILD = """
import json, sys, time
import jax
from fashion_jax import fit, load
fit
marks = {"imports": time.time()}
train, test = load(sys.argv[1] or None)
marks["data"] = time.time()
epochs = []
fit(train, test, key=jax.random.key(0), dropout_rate=0.2, epochs=2, on_epoch=lambda end: epochs.append(time.time()))
marks["first epoch, with compilation"], marks["second epoch"] = epochs
print(json.dumps(marks))
"""


@dataclasses.dataclass(frozen=True)
class Flags:
    repetitions: int = 5
    """Processes of each kind, in turns."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory with the data set."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the record; by default benchmarks/records/<date>-<device>."""


def run(flags: Flags, environment: dict[str, str]) -> dict[str, float]:
    start = time.time()
    command = [sys.executable, "-c", CHILD, str(flags.data_dir or "")]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    phases, last = {}, start
    for name, clock in json.loads(result.stdout).items():
        phases[name], last = clock - last, clock
    phases["start to first epoch"] = sum(phases.values()) - phases["second epoch"]
    return phases


def main(flags: Flags) -> None:
    with tempfile.TemporaryDirectory() as cache:
        warm = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        kinds = {"cold": {}, "with the compilation cache": warm}
        run(flags, warm)
        seconds: dict[tuple[str, str], list[float]] = {}
        for _ in range(flags.repetitions):
            for kind, environment in kinds.items():
                for phase, duration in run(flags, environment).items():
                    seconds.setdefault((kind, phase), []).append(duration)
    rows = [
        {"start": kind, "phase": phase, "name": f"{kind}: {phase}", **harness.spread(runs)}
        for (kind, phase), runs in sorted(seconds.items(), key=lambda item: item[0][0])
    ]
    figure = harness.bars(rows, label="name", value="median (s)", low="min (s)", high="max (s)", unit="seconds")
    for row in rows:
        del row["name"]
    harness.write("startup", rows, flags=flags, output=flags.output, figure=figure)


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
