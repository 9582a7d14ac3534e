"""How long from the start of a process to the first evaluated epoch? Cold, and with JAX's compilation cache."""

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial

from benchmarks import harness

# Prints the clock at each milestone. The second epoch shows how much of the first was compilation.
CHILD = """
import json, time
import jax
from fashion_jax import fit, load
marks = {"imports": time.time()}
train, test = load()
marks["data"] = time.time()
epochs = []
mark = lambda end: epochs.append(time.time())
fit(train, test, key=jax.random.key(0), dropout_rate=0.2, epochs=2, callbacks=[mark], progress=False)
marks["first epoch, with compilation"], marks["second epoch"] = epochs
print(json.dumps(marks))
"""


Flags = harness.TimedFlags


def run(variables: dict[str, str]) -> dict[str, float]:
    """Start a process; return the seconds of each phase."""
    last, phases = time.time(), {}
    result = subprocess.run(
        [sys.executable, "-c", CHILD], env=os.environ | variables, stdout=subprocess.PIPE, text=True, check=True
    )
    for name, clock in json.loads(result.stdout).items():
        phases[name], last = clock - last, clock
    return phases | {"start to first epoch": sum(phases.values()) - phases["second epoch"]}


def main(flags: Flags) -> None:
    with tempfile.TemporaryDirectory() as cache:
        warm = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        warm["TF_CPP_MIN_LOG_LEVEL"] = "3"  # XLA takes a cached program for another machine's.
        run(warm)
        kinds = {"cold": partial(run, {}), "with the compilation cache": partial(run, warm)}
        runs = harness.take_turns(kinds, flags.repetitions)
    rows = [
        {"start": kind, "phase": phase, **harness.spread([phases[phase] for phases in of_kind])}
        for kind, of_kind in runs.items()
        for phase in of_kind[0]
    ]
    harness.write("startup", rows, flags=flags)


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
