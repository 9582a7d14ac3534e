"""Rerun everything that the tables of README and documentation rest on, except the timings, which `make bench` repeats.

Each step writes into a folder of its own. The same command resumes where it stopped, even in the middle of a step.
Steps that fail, such as one whose data set cannot be had, are named at the end.
"""

import dataclasses
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import harness
from fashion_jax import files, report
from fashion_jax.script import INTERRUPTED

COMPARE, RIVALS = "examples/compare_overfit.py", "examples/when_dropout_helps.py"
STEPS: dict[str, tuple[str, ...]] = {
    "seeds32": (COMPARE, "--seeds", "32"),
    "holdout32": (COMPARE, "--seeds", "32", "--holdout", "0.2"),
    "mnist": (COMPARE, "--seeds", "8", "--data", "mnist"),
    "kmnist": (COMPARE, "--seeds", "8", "--data", "kmnist"),
    "digits": ("-m", "benchmarks.digits"),
    "rivals_1000": (RIVALS, "--images", "1000", "--epochs", "100"),
    "rivals_10000": (RIVALS, "--images", "10000", "--epochs", "40"),
    "rivals_50000": (RIVALS, "--images", "50000", "--epochs", "20"),
    "rivals_1000_augmented": (RIVALS, "--images", "1000", "--epochs", "100", "--augment"),
    "rivals_10000_augmented": (RIVALS, "--images", "10000", "--epochs", "40", "--augment"),
    "rivals_50000_augmented": (RIVALS, "--images", "50000", "--epochs", "20", "--augment"),
    "dropout_sweep": ("examples/dropout_sweep.py",),
    "best_perceptron": ("examples/best_perceptron.py",),
    "calibration": ("examples/calibration.py",),
    "parity": ("-m", "benchmarks.parity"),
    "distribution": ("-m", "benchmarks.distribution"),
    "dtype": ("-m", "benchmarks.dtype"),
}


@dataclasses.dataclass(frozen=True)
class Flags:
    only: tuple[str, ...] = tuple(STEPS)  # Steps to run.
    data_dir: harness.Directory = None  # Directory with the data set.
    output: Path = Path("runs/reproduce")  # Directory to write to, one folder per step.


def recorded_minutes() -> dict[str, float]:
    """Return how long each step took in the newest record of this kind of device."""
    kind = "*-cores" if report.environment()["platform"] == "cpu" else "*-nvidia-*"
    records = sorted(harness.RECORDS.glob(f"{kind}/reproduce.json"))
    steps = {name: step for record in records for name, step in json.loads(record.read_text())["steps"].items()}
    return {name: step["seconds"] / 60 for name, step in steps.items() if step["finished"]}


def main(flags: Flags) -> int:
    if unknown := set(flags.only) - set(STEPS):
        raise ValueError(f"--only: no step {', '.join(sorted(unknown))}; the steps are {', '.join(STEPS)}")
    # Unlike a benchmark it has to stop the process that it has started.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    record = flags.output / "reproduce.json"
    steps = json.loads(record.read_text())["steps"] if record.exists() else {}
    left, minutes = [name for name in flags.only if not steps.get(name, {}).get("finished")], recorded_minutes()
    for name in left:
        took = f"{minutes[name]:.0f} minutes" if name in minutes else "no recorded time"
        print(f"{name}: {took} on such a device", file=sys.stderr)
    print(f"together: at least {sum(minutes.get(name, 0) for name in left) / 60:.1f} hours", file=sys.stderr)
    failed = []
    for name in left:
        place = flags.output.resolve() / name
        command = [sys.executable, *STEPS[name], "--output", str(place)]
        if STEPS[name][0].startswith("examples"):
            command += ["--checkpoint", str(place / "checkpoint")]
        if flags.data_dir:
            command += ["--data-dir", str(flags.data_dir)]
        print(f"{name}: {shlex.join(command)}", file=sys.stderr, flush=True)
        start = time.monotonic()
        try:
            status = subprocess.run(command, cwd=harness.ROOT, check=False).returncode
        except KeyboardInterrupt:
            status = INTERRUPTED
        # A step that resumes has taken the time before, too.
        seconds = steps.get(name, {}).get("seconds", 0.0) + time.monotonic() - start
        steps[name] = {"seconds": seconds, "finished": not status, **harness.commit()}
        files.write(record, report.as_json({"environment": harness.environment(), "steps": steps}))
        if status == INTERRUPTED:
            print(f"{name} was interrupted; the same command resumes it", file=sys.stderr)
            return status
        failed += [name] if status else []
    if failed:
        print(f"failed: {', '.join(failed)}; the same command tries again", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
