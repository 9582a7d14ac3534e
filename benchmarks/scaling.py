"""Does anything but arithmetic grow with the number of devices? Sweeps of a network so small that little else is left.

One process has 1, 2, 4 and 8 CPU devices, whatever the number of cores, and trains the same number of lanes on each.
Shards, histories, callbacks and checkpoints are those of any sweep.
"""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial

import numpy as np

from benchmarks import harness

# Prints the seconds of each epoch after the first, which compiles.
CHILD = """
import json, sys, tempfile, time
import jax
devices, lanes, epochs, saves = json.loads(sys.argv[1])
jax.config.update("jax_num_cpu_devices", devices)
import numpy as np
from fashion_jax import Batch, FashionMLP, TrainConfig, sweep
data = Batch(np.zeros((64, 2, 2), np.uint8), np.arange(64, dtype=np.int32) % 10)
clock = []
with tempfile.TemporaryDirectory() as directory:
    sweep(data, data, seeds=range(devices * lanes), config=TrainConfig(model=FashionMLP(hidden=(1,))),
          epochs=epochs + 1, callbacks=[lambda end: clock.append(time.perf_counter())], progress=False,
          checkpoint=directory if saves else None)
print(json.dumps([b - a for a, b in zip(clock, clock[1:])]))
"""


@dataclasses.dataclass(frozen=True)
class Flags(harness.TimedFlags):
    devices: tuple[int, ...] = (1, 2, 4, 8)  # CPU devices of a process.
    lanes: int = 128  # Lanes of each device.
    epochs: int = 20  # Epochs that are timed; a run counts with their median.


def run(devices: int, saves: bool, flags: Flags) -> float:
    """Return the median seconds of an epoch."""
    given = json.dumps([devices, flags.lanes, flags.epochs, saves])
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CHILD, given]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(np.median(json.loads(result.stdout)))


def main(flags: Flags) -> None:
    programs = {
        f"{devices} devices, {kind} checkpoints": partial(run, devices, kind == "with", flags)
        for devices in flags.devices
        for kind in ("without", "with")
    }
    rows: list[harness.Row] = []
    for name, seconds in harness.take_turns(programs, flags.repetitions).items():
        lanes = int(name.split()[0]) * flags.lanes
        row = {"program": name, "lanes": lanes, **harness.spread(seconds)}
        rows.append(row | {"us a lane": 1e6 * row["median (s)"] / lanes})
    harness.write("scaling", rows, flags=flags)


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
