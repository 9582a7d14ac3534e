"""Run a set of benchmarks one after the other: 15 minutes of them on two cores, or those for an accelerator."""

import dataclasses
import os
import signal
import subprocess
import sys
from typing import Literal

from benchmarks import harness

# Of each set, the benchmarks and their flags.
SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {"throughput": (), "lanes": (), "roofline": (), "startup": (), "rounding": (), "predict": ()},
    # The first one stops where there is no GPU, before the others silently measure a CPU. All take some minutes.
    "gpu": {
        "throughput": ("--device", "gpu", "--batch-sizes", "64", "4096", "--repetitions", "1"),
        "lanes": (
            *("--device", "gpu", "--lanes", "2", "64", "1024", "4096"),
            *("--batched", "--no-compile", "--repetitions", "1"),
        ),
        "predict": ("--device", "gpu", "--repetitions", "3"),
        "roofline": ("--repetitions", "3"),
        "kernels": ("--repetitions", "2"),
        "startup": ("--repetitions", "1"),
        "precision": ("--repetitions", "1"),
    },
}


@dataclasses.dataclass(frozen=True)
class Flags(harness.Flags):
    device: Literal["cpu", "gpu"] = "cpu"  # Which set to run, and where.


def main(flags: Flags) -> int:
    # Unlike a benchmark it has to stop the process that it has started.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if flags.device == "cpu" else {})
    places = {"--data-dir": flags.data_dir, "--output": flags.output}
    shared = [word for flag, place in places.items() if place is not None for word in (flag, str(place))]
    names = list(SETS[flags.device])
    for number, name in enumerate(names, start=1):
        print(f"{name}, {number} of {len(names)}", file=sys.stderr, flush=True)
        # Processes of their own: what one leaves in memory must not disturb the next.
        command = [sys.executable, "-m", f"benchmarks.{name}", *SETS[flags.device][name], *shared]
        try:
            status = subprocess.run(command, env=environment, check=False).returncode
        except KeyboardInterrupt:
            status = 130
        if status:
            rest = ", ".join(names[number:]) or "none"
            print(f"{name} failed; not run: {rest} (each by itself: python -m benchmarks.NAME --help)", file=sys.stderr)
            return max(status, 1)
    return 0


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
