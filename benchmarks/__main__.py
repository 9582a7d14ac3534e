"""Run a set of benchmarks one after the other: ten minutes of them on two cores, or those for an accelerator."""

import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmarks import harness
from fashion_jax.script import INTERRUPTED

# Of each set, the benchmarks and their flags.
SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {"throughput": (), "lanes": (), "roofline": (), "startup": (), "rounding": (), "predict": ()},
    # The first one stops where there is no GPU, before the others measure a CPU without a word.
    "gpu": {
        "throughput": ("--device", "gpu", "--batch-sizes", "64", "512", "4096", "--repetitions", "3"),
        "lanes": ("--device", "gpu", "--lanes", "2", "8", "64", "256", "1024", "--repetitions", "3"),
        "roofline": (),
        "startup": ("--repetitions", "3"),
        "predict": ("--device", "gpu"),
        "kernels": (),
    },
}

WITHOUT_DATA = ("kernels",)


@dataclasses.dataclass(frozen=True)
class Flags:
    device: Literal["cpu", "gpu"] = "cpu"
    """Which set to run, and where."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory with the data set."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the records; by default benchmarks/records/<date>-<device>."""


def main(flags: Flags) -> int:
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if flags.device == "cpu" else {})
    benchmarks = SETS[flags.device]
    for number, (name, own) in enumerate(benchmarks.items(), start=1):
        print(f"{name}, {number} of {len(benchmarks)}", file=sys.stderr, flush=True)
        # Processes of their own: what one leaves in memory must not disturb the next.
        command = [sys.executable, "-m", f"benchmarks.{name}", *own]
        if flags.data_dir is not None and name not in WITHOUT_DATA:
            command += ["--data-dir", str(flags.data_dir)]
        if flags.output is not None:
            command += ["--output", str(flags.output)]
        with subprocess.Popen(command, env=environment) as process:
            try:
                status = process.wait()
            except KeyboardInterrupt:
                # A terminal interrupts it too, but it would finish the compiled program that is under way.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1)
                process.kill()
                status = INTERRUPTED
        if status:
            end = "was stopped" if status == INTERRUPTED else "failed"
            rest = ", ".join(list(benchmarks)[number:]) or "none"
            print(f"{name} {end}; not run: {rest} (each by itself: python -m benchmarks.NAME --help)", file=sys.stderr)
            # One that a signal ended has a negative status.
            return max(status, 1)
    return 0


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
