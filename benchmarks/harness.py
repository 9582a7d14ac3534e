"""What every benchmark shares: the start, alternating timed runs, and the record that a run leaves."""

import dataclasses
import datetime
import functools
import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import tyro
from matplotlib.figure import Figure

from fashion_jax import files, plot, report
from fashion_jax.script import run_script
from fashion_jax.signals import noting_signals

RECORDS = Path(__file__).parent / "records"
Row = dict[str, Any]
T = TypeVar("T")


def start(main: Callable[[Any], int | None], flags: type, description: str | None) -> NoReturn:
    """Read the flags, check them, and run; a mistake ends with one line and status 1.

    Args:
        main: Takes the flags and returns the exit status.
        flags: The dataclass of flags.
        description: For --help.
    """

    def checked(given: Any) -> int:
        check(given)
        return main(given) or 0

    # Run by a path, a benchmark would not find its siblings.
    program = f"python -m benchmarks.{Path(sys.argv[0]).stem}".removesuffix(".__main__")
    run_script(checked, lambda: tyro.cli(flags, prog=program, description=description))


def check(flags: Any) -> None:
    """Refuse what no benchmark can use: counts below 1, lists that are empty or name something twice, no directory.

    Raises:
        ValueError: A flag is out of range.
        OSError: The data directory is missing, or the output directory cannot be written.
    """
    for name, value in dataclasses.asdict(flags).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, tuple) and (not value or len(set(value)) < len(value)):
            raise ValueError(f"{flag} must name at least one, and none twice; got {value}")
        least = 0 if name == "seed" else 1
        for count in value if isinstance(value, tuple) else [value]:
            if isinstance(count, int) and not isinstance(count, bool) and count < least:
                raise ValueError(f"{flag} must be at least {least}, got {count}")
        if name == "data_dir" and isinstance(value, Path) and not value.is_dir():
            raise NotADirectoryError(f"{flag} is not a directory: {value}")
        if name == "output" and isinstance(value, Path):
            files.prepare_directory(value)


def use_device(device: str) -> str:
    """Let JAX run where both sides are to run, before its backend starts, and name the device for PyTorch.

    Args:
        device: "cpu" or "gpu".

    Raises:
        ValueError: One of the two sees no GPU.
    """
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
        return "cpu"
    import torch

    sees = {"JAX": jax.default_backend() == "gpu", "PyTorch": torch.cuda.is_available()}
    blind = [name for name, gpu in sees.items() if not gpu]
    if blind:
        raise ValueError(
            f"--device gpu: no GPU for {' and '.join(blind)}; install builds for CUDA, or take --device cpu"
        )
    return "cuda"


def take_turns(programs: Mapping[str, Callable[[], T]], repetitions: int) -> dict[str, list[T]]:
    """Run programs in turns, A B C A B C ..., so that a drift of the machine's speed meets all of them.

    Args:
        programs: Each returns when its work is done.
        repetitions: Runs of each; they should have run once before.

    Returns:
        What each run returned.
    """
    results: dict[str, list[T]] = {name: [] for name in programs}
    for _ in range(repetitions):
        for name, program in programs.items():
            # Python ignores what is raised while it collects, and would lose a Ctrl-C.
            with noting_signals(terminate=False) as noted:
                gc.collect()
            if noted:
                raise KeyboardInterrupt
            results[name].append(program())
    return results


def alternate(programs: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Time programs in turns, as `take_turns` runs them; return the seconds of each run."""
    runs = take_turns({name: functools.partial(timed, program) for name, program in programs.items()}, repetitions)
    return {name: [seconds for _, seconds in pairs] for name, pairs in runs.items()}


def timed(program: Callable[[], Any]) -> tuple[Any, float]:
    """Run once; return what it returned, and the seconds."""
    start = time.perf_counter()
    result = program()
    return result, time.perf_counter() - start


def spread(seconds: list[float]) -> Row:
    """Summarise timings by median, minimum and maximum."""
    return {
        "median (s)": statistics.median(seconds),
        "min (s)": min(seconds),
        "max (s)": max(seconds),
        "repetitions": len(seconds),
    }


def environment() -> Row:
    """Tell device, processor, versions and threads; of PyTorch too, if the benchmark has used it."""
    both = report.environment()
    if "torch" not in sys.modules:
        return both
    torch = sys.modules["torch"]
    both["versions"] |= {"torch": torch.__version__}
    both["torch threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        both["torch device"] = torch.cuda.get_device_name()
    return both


def default_output() -> Path:
    """Name the folder of a record made now: date and device."""
    about = report.environment()
    device = about["devices"][0]
    if about["platform"] == "cpu":
        device = f"{about['processor']} {about['threads']} cores"
    # Vendors write "Intel(R) Xeon(R) Processor".
    device = re.sub(r"\((r|tm)\)|\b(processor|cpu)\b", " ", device.lower())
    slug = re.sub(r"[^a-z0-9]+", "-", device).strip("-")
    return RECORDS / f"{datetime.date.today():%Y-%m-%d}-{slug}"


def write(name: str, rows: list[Row], *, flags: Any, output: Path | None, figure: Figure | None, **more: Any) -> None:
    """Print a table of the rows, write NAME.json and NAME.png, and tell on standard error where they are.

    Args:
        name: The benchmark's name.
        rows: One row a measurement; keys are column headings.
        flags: The dataclass of flags that the benchmark ran with.
        output: Folder to write into; by default `default_output()`.
        figure: The picture.
        **more: Further entries of the JSON file.
    """
    output = default_output() if output is None else output
    print(table(rows), flush=True)
    record = {
        "benchmark": name,
        "date": f"{datetime.date.today():%Y-%m-%d}",
        "environment": environment(),
        "flags": report.recorded_flags(flags),
        **more,
        "rows": rows,
    }
    files.write_atomically(output / f"{name}.json", json.dumps(record, indent=1, default=str) + "\n")
    if figure is not None:
        plot.save(figure, output / f"{name}.png")
    print(f"{jax.default_backend()}: wrote {output / name}.json", file=sys.stderr)


def table(rows: list[Row]) -> str:
    """Lay out rows as a Markdown table, numbers with four significant digits."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return report.markdown([tuple(columns), *(tuple(_cell(row.get(column, "")) for column in columns) for row in rows)])


def bars(rows: list[Row], *, label: str, value: str, low: str, high: str, unit: str) -> Figure:
    """Draw one horizontal bar a row, with a line from its lowest to its highest value.

    Where some are a hundred times as long as others, the scale is logarithmic; it has no 0 for a bar to begin at, so a
    point stands for each.
    """
    figure = Figure(figsize=(8, 0.6 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    values = [row[value] for row in rows]
    around = [[row[value] - row[low] for row in rows], [row[high] - row[value] for row in rows]]
    logarithmic = max(values) > 100 * min(values)
    if logarithmic:
        axes.errorbar(values, range(len(rows)), xerr=around, fmt="o", color="#123a6d", ecolor="black", capsize=3)
        axes.set_xscale("log")
    else:
        axes.barh(
            range(len(rows)), values, xerr=around, color="#9db8d9", edgecolor="#123a6d", ecolor="black", capsize=3
        )
    axes.set_yticks(range(len(rows)), labels=[row[label] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.grid(axis="x", alpha=0.3)
    for i, (number, reach) in enumerate(zip(values, around[1], strict=True)):
        axes.annotate(
            f"{number:.3g}", (number + reach, i), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.margins(x=0.25 if logarithmic else 0.15)
    return figure


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
