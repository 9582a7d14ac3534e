"""Shared by all benchmarks: flags, the start, programs that take turns, and the record of a run."""

import contextlib
import dataclasses
import datetime
import functools
import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar
from unittest import mock

import jax
import numpy as np
import tyro

from fashion_jax import data, files, plot, report
from fashion_jax.script import run_script
from fashion_jax.train import Data

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "records"
Directory = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]
Row = dict[str, Any]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Flags:
    data_dir: Directory = None  # Directory with the data set.
    output: Directory = None  # Folder for the record; by default benchmarks/records/<date>-<device>.


@dataclasses.dataclass(frozen=True)
class TimedFlags(Flags):
    repetitions: int = 5  # Timed runs of each program, in turns, after one that is not timed.


def start(main: Callable[[Any], int | None], flags: type, description: str | None) -> NoReturn:
    """Read the flags and run."""

    def prepared(given: Any) -> int | None:
        commit()  # Before the code can change.
        if getattr(given, "data_dir", None):
            os.environ["FASHION_JAX_DATA"] = str(given.data_dir)  # Where `load` looks, in every process.
        # At Ctrl-C `fit` would return the run so far, and the benchmark would record it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        return main(given)

    # Run by a path, a benchmark would not find its siblings.
    program = f"python -m benchmarks.{Path(sys.argv[0]).stem}".removesuffix(".__main__")
    run_script(prepared, flags, description, prog=program)


def load_data() -> Data:
    """Return the data that `fit` sees by default, on the host."""
    train, test = data.load()
    return Data(train, data.subset(train, 10_000, key=jax.random.key(0)), test)


def cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def use_threads(count: int) -> None:
    """Let PyTorch run on so many threads, and take denormal numbers for zero."""
    import torch

    torch.set_num_threads(count)
    # As XLA does: moments of units that have died fade to numbers with which a processor is slow.
    torch.set_flush_denormal(True)


def use_device(device: str) -> str:
    """Set where JAX runs, "cpu" or "gpu", before its backend starts; return PyTorch's name of the device."""
    import torch

    use_threads(len(cores()))
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
        return "cpu"
    sees = {"JAX": jax.default_backend() == "gpu", "PyTorch": torch.cuda.is_available()}
    if blind := [name for name, gpu in sees.items() if not gpu]:
        raise ValueError(
            f"--device gpu: no GPU for {' and '.join(blind)}; install builds for CUDA, or use --device cpu"
        )
    return "cuda"


@contextlib.contextmanager
def replaced(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    """Trace programs with other functions, each given as (module, name, function)."""
    jax.clear_caches()
    with contextlib.ExitStack() as stack:
        for replacement in replacements:
            stack.enter_context(mock.patch.object(*replacement))
        yield
    jax.clear_caches()


def take_turns(programs: Mapping[str, Callable[[], T]], repetitions: int) -> dict[str, list[T]]:
    """Run programs in turns, A B C A B C ..., so that a drift of the machine's speed meets all of them."""
    results: dict[str, list[T]] = {name: [] for name in programs}
    for _ in range(repetitions):
        for name, program in programs.items():
            gc.collect()
            results[name].append(program())
    return results


def alternate(programs: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Run each program once, then time them in turns; return the seconds of each run."""
    for program in programs.values():
        program()
    runs = take_turns({name: functools.partial(timed, program) for name, program in programs.items()}, repetitions)
    return {name: [seconds for _, seconds in pairs] for name, pairs in runs.items()}


def timed(program: Callable[[], T]) -> tuple[T, float]:
    """Run once; return the result and the seconds."""
    start = time.perf_counter()
    result = program()
    return result, time.perf_counter() - start


def second_epoch(run: Callable[..., object]) -> float:
    """Return the seconds of the second epoch of `fit` or `sweep`; the first may compile."""
    clock: list[float] = []
    run(epochs=2, callbacks=[lambda end: clock.append(time.perf_counter())])
    return clock[1] - clock[0]


def spread(seconds: Sequence[float]) -> Row:
    """Summarize timings, and keep each of them."""
    summary = {"median (s)": np.median(seconds).item(), "min (s)": min(seconds), "max (s)": max(seconds)}
    return summary | {"quartiles (s)": quartiles(seconds), "repetitions": len(seconds), "seconds": list(seconds)}


def quartiles(values: Any) -> list[float]:
    return np.quantile(values, (0.25, 0.75)).tolist()


def ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the median of the ratios pair by pair, in which a drift of the machine's speed cancels."""
    return np.median(np.divide(first, second)).item()


@functools.cache
def commit() -> Row:
    """Return the commit of the code, and whether the tree is clean, records apart; None outside of a repository."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        clean = not git("status", "--porcelain", "--", ".", ":!benchmarks/records")
        return {"commit": git("rev-parse", "HEAD"), "clean": clean}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "clean": None}


def environment() -> Row:
    """Return commit, device, processor and versions; those of PyTorch too, if the benchmark has used it."""
    about = commit() | report.environment()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^(?:flags|Features)\s*: (.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    about["processor_flags"] = found[1] if found else None
    if torch := sys.modules.get("torch"):
        about["versions"] |= {"torch": torch.__version__}
        about["torch threads"] = torch.get_num_threads()
        about["torch device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return about


def default_output() -> Path:
    """Return the folder of a record made now, named by date and device."""
    about = report.environment()
    cpu = f"{about['processor']} {about['threads']} {'cores' if about['threads'] > 1 else 'core'}"
    # Vendors write "Intel(R) Xeon(R) Processor".
    device = (cpu if about["platform"] == "cpu" else about["devices"][0]).lower()
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|\b(processor|cpu)\b", " ", device)).strip("-")
    return RECORDS / f"{datetime.date.today():%Y-%m-%d}-{slug}"


def write(name: str, rows: Sequence[Row], *, flags: Flags, figure: Any = None, **more: Any) -> None:
    """Print a table of the rows, and write NAME.json, with further entries, and NAME.png if there is a figure."""
    output = default_output() if flags.output is None else flags.output
    print(table(rows), flush=True)
    about = {"benchmark": name, "date": f"{datetime.date.today():%Y-%m-%d}", "environment": environment()}
    files.write(output / f"{name}.json", report.as_json({**about, "flags": flags, **more, "rows": rows}))
    if figure is not None:
        plot.save(figure, output / f"{name}.png")
    print(f"{jax.default_backend()}: wrote {output / name}.json", file=sys.stderr)


def table(rows: Sequence[Row]) -> str:
    """Return the rows, without the lists of seconds, as a Markdown table; numbers have four significant digits."""
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if not name.startswith("seconds")]
    return report.markdown([columns, *([_cell(row.get(name, "")) for name in columns] for row in rows)])


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return "-".join(map(_cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
