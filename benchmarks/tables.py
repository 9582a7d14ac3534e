"""Fill the tables of README and documentation from the records, so that no figure in them is typed by hand.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; `TABLES` tells which record it comes from.
"""

import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks import harness
from fashion_jax import evidence, files, report

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# Machines that stand side by side in the tables.
MACHINES = ("AMD", "Intel")
# How the folders of their records, end.
FOLDERS = {"AMD": "amd-epyc-2-cores", "Intel": "intel-xeon-2-cores", "H200": "nvidia-h200"}
RECORDS = ROOT / "benchmarks" / "records"
BLOCK = re.compile(r"(<!-- table: ([\w' ]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
CURVES = ROOT / "tests" / "reference" / "pytorch_curves.csv"


def newest(path: str, machine: str = "") -> str:
    """Read a file of the newest record that has it, of one machine if that is named.

    Raises:
        FileNotFoundError: No record has it.
    """
    found = RECORDS.glob(f"*{FOLDERS.get(machine, '')}/{path}")
    if (record := max(found, default=None)) is None:
        of_machine = f" of {FOLDERS[machine]}" if machine else ""
        raise FileNotFoundError(f"no record{of_machine} in {RECORDS} has {path}; run the benchmark that writes it")
    return record.read_text()


def table_of(path: str, number: int) -> str:
    """Take a table of a report, counted from 0."""
    tables = re.findall(r"(?:^\|.*\n)+", newest(path), re.MULTILINE)
    return tables[number].strip()


def rows_of(name: str, machine: str = "AMD") -> list[dict[str, Any]]:
    """Take the rows of a machine's newest record of a benchmark."""
    return json.loads(newest(f"{name}.json", machine))["rows"]


def side_by_side(
    label: str,
    columns: tuple[str, ...],
    cells: Callable[[str], dict[str, tuple[str, ...]]],
    machines: tuple[str, ...] = MACHINES,
) -> str:
    """Put the columns of the machines side by side.

    Args:
        label: Heading of the rows' names.
        columns: Headings of what each machine has.
        cells: Gives, for a machine, the cells of each row.
        machines: Their names.
    """
    found = {machine: cells(machine) for machine in machines}
    names = dict.fromkeys(name for of_machine in found.values() for name in of_machine)
    nothing = ("-",) * len(columns)
    rows = [(label, *(f"{machine}: {column}" for machine in machines for column in columns))]
    for name in names:
        rows.append((name, *(cell for of_machine in found.values() for cell in of_machine.get(name, nothing))))
    return report.markdown(rows)


def spread(row: dict[str, Any], digits: int) -> str:
    """Median, and smallest and largest."""
    return f"{row['median (s)']:.{digits}f} ({row['min (s)']:.{digits}f}-{row['max (s)']:.{digits}f})"


def reproduced() -> str:
    """Means of the last five epochs, ours and PyTorch's, and the range of PyTorch runs that others made."""
    ours = json.loads(newest("seeds32/history.json"))["arms"]
    # [ours and theirs, arms, seeds, figures]
    theirs = np.array(json.loads(newest("distribution.json"))["measured"])[1]
    others = report.read_curves(CURVES)
    columns = ("ours, 32 seeds", "PyTorch, 8 seeds", "p (Welch)", "three PyTorch runs of others")
    rows: list[tuple[str, ...]] = [("arm", "figure", *columns)]
    for i, (arm, rate) in enumerate({"no dropout": 0.0, "dropout 0.2": 0.2}.items()):
        curves = {
            "running training loss": (ours[arm]["running_loss"], others[rate].running_loss),
            "test loss": (ours[arm]["validation"]["loss"], others[rate].validation.loss),
            "test accuracy": (ours[arm]["validation"]["accuracy"], others[rate].validation.accuracy),
        }
        for j, (figure, of_both) in enumerate(curves.items()):
            here, elsewhere = (np.array(curve)[:, -5:].mean(axis=1) for curve in of_both)
            there = theirs[i, :, j]
            welch: Any = stats.ttest_ind(here, there, equal_var=False)
            means = (f"{here.mean():.4f}", f"{there.mean():.4f}", f"{welch.pvalue:.2f}")
            rows.append((arm, figure, *means, f"{elsewhere.min():.3f}-{elsewhere.max():.3f}"))
    return report.markdown(rows)


def parity() -> str:
    """Largest differences of single steps."""
    found = rows_of("parity")
    rows: list[tuple[str, ...]] = [tuple(found[0])]
    for row in found:
        name, *differences = row.values()
        rows.append(
            (name, *(f"{value:.1e}" if isinstance(value, float) and value else f"{value:g}" for value in differences))
        )
    return report.markdown(rows)


def race() -> str:
    """Seconds of a training epoch at batch 64."""

    def cells(machine: str) -> dict[str, tuple[str, ...]]:
        return {
            row["program"]: (
                spread(row, 2),
                *(f"{row[f'x {other}']:.2f}" for other in ("PyTorch at its best", "the tutorial's loop")),
            )
            for row in rows_of("throughput", machine)
            if (row["batch size"], row["what"]) == (64, "training")
        }

    return side_by_side("program", ("s per epoch", "times PyTorch at its best", "times the tutorial's loop"), cells)


def lanes() -> str:
    """Seconds per model and epoch, both evaluations included."""

    rivals = ("PyTorch, in memory, fused Adam", "PyTorch, the same, a process on each core")

    def cells(machine: str) -> dict[str, tuple[str, ...]]:
        return {
            row["program"]: (
                spread(row, 3),
                *(f"{1 / row[f'/ {rival}']:.2f}" if f"/ {rival}" in row else "-" for rival in rivals),
            )
            for row in rows_of("lanes", machine)
        }

    columns = ("s per model and epoch", "times PyTorch, one after the other", "times PyTorch, one on each core")
    return side_by_side("program", columns, cells)


def where_time_goes() -> str:
    """The roofline's rows, and which share of the epoch each part takes."""

    def cells(machine: str) -> dict[str, tuple[str, ...]]:
        shares = ("share of GEMM rate", "share of the epoch that it takes")
        return {
            row["program"]: (spread(row, 3), *(f"{row[share]:.0%}" if share in row else "" for share in shares))
            for row in rows_of("roofline", machine)
            # In older records the batch is a constant of the program, which XLA multiplies in another, slower way.
            if row["program"] != "the matrix products alone"
        }

    return side_by_side("program", ("s", "share of the GEMM rate", "share of the epoch that it takes"), cells)


def startup() -> str:
    """Seconds from the start of a process to the first evaluated epoch."""

    starts = tuple(dict.fromkeys(row["start"] for row in rows_of("startup")))

    def cells(machine: str) -> dict[str, tuple[str, ...]]:
        found = rows_of("startup", machine)
        medians = {(row["phase"], row["start"]): f"{row['median (s)']:.2f}" for row in found}
        return {row["phase"]: tuple(medians[row["phase"], start] for start in starts) for row in found}

    return side_by_side("phase", tuple(f"{start}, s" for start in starts), cells, (*MACHINES, "H200"))


def images_a_second(machine: str) -> str:
    """How many images each program classifies."""
    found = rows_of("predict", machine)
    programs = list(dict.fromkeys(row["program"] for row in found))
    rows: list[tuple[str, ...]] = [("images at a time", *programs)]
    for size in dict.fromkeys(row["images"] for row in found):
        of_size = {row["program"]: f"{row['images/s']:,.0f}" for row in found if row["images"] == size}
        rows.append((f"{size:,}", *(of_size.get(program, "-") for program in programs)))
    return report.markdown(rows)


def rivals(measure: str) -> str:
    """What each rival reaches in each situation, on the test set."""
    found = json.loads(newest("when_dropout_helps/report.json"))["test"]
    rows: list[tuple[str, ...]] = [("rival", *found)]
    for rival in next(iter(found.values())):
        cells = (str(evidence.interval(np.array(of[rival][measure]))).replace("+", "") for of in found.values())
        rows.append((rival, *cells))
    return report.markdown(rows)


def types() -> str:
    """Seconds of a training epoch in each type."""
    rows: list[tuple[str, ...]] = [
        ("network, matrix products in", "s per training epoch: median (min-max)", "speed-up")
    ]
    for row in rows_of("dtype"):
        ratio = row.get("x float32")
        rows.append((row["program"], spread(row, 2), "" if ratio is None else f"{ratio:.2f}"))
    return report.markdown(rows)


def differences_of_types() -> str:
    """What bfloat16 changes on the hold-out."""
    found = json.loads(newest("dtype.json"))["differences"]
    return report.markdown([("hold-out", "mean and 95% interval"), *found.items()])


def saving() -> str:
    """What checkpoints add to a run."""
    rows: list[tuple[str, ...]] = [("program", "s: median (min-max)", "added")]
    for row in rows_of("saving"):
        share = row.get("share added (median)")
        rows.append((row["program"], spread(row, 2), "" if share is None else f"{share:+.1%}"))
    return report.markdown(rows)


def milliseconds(row: dict[str, Any]) -> str:
    """Median, and smallest and largest, in milliseconds with three digits or more."""
    times = [1000 * row[f"{which} (s)"] for which in ("median", "min", "max")]
    median, low, high = (f"{time:,.0f}" if time >= 100 else f"{time:.3g}" for time in times)
    return f"{median} ({low}-{high})"


def race_on_a_gpu() -> str:
    """Milliseconds of a training epoch at each batch size."""
    found = [row for row in rows_of("throughput", "H200") if row["what"] == "training"]
    sizes = list(dict.fromkeys(row["batch size"] for row in found))
    columns = (("ms per epoch", "times PyTorch at its best"),) * len(sizes)
    head = (f"batch {size:,}: {column}" for size, of_size in zip(sizes, columns, strict=True) for column in of_size)
    rows: list[tuple[str, ...]] = [("program", *head)]
    for program in dict.fromkeys(row["program"] for row in found):
        of_program = [row for row in found if row["program"] == program]
        cells = ((milliseconds(row), f"{row['x PyTorch at its best']:.2g}") for row in of_program)
        rows.append((program, *(cell for pair in cells for cell in pair)))
    return report.markdown(rows)


def lanes_on_a_gpu() -> str:
    """Milliseconds per model and epoch, both evaluations included, and the memory that JAX took."""
    graph = "PyTorch, the same, as a CUDA graph"
    rows: list[tuple[str, ...]] = [
        ("program", "ms per model and epoch", "times PyTorch's CUDA graph", "JAX's memory on the GPU, MiB")
    ]
    for row in rows_of("lanes", "H200"):
        memory = row["JAX's peak on the device so far (MiB)"]
        ours = not row["program"].startswith("PyTorch")
        rows.append(
            (row["program"], milliseconds(row), f"{1 / row[f'/ {graph}']:.3g}", f"{memory:,.0f}" if ours else "-")
        )
    return report.markdown(rows)


def kernels() -> str:
    """What a GPU launches for a step, and how long the step takes."""
    columns = ("kernels a step", "launched by the host a step", "us a step and model")
    rows: list[tuple[str, ...]] = [("program", *columns)]
    for row in rows_of("kernels", "H200"):
        rows.append((row["program"], *(f"{row[column]:.3g}" for column in columns)))
    return report.markdown(rows)


def roofline_on_a_gpu() -> str:
    """The roofline's rows, in milliseconds."""
    rows: list[tuple[str, ...]] = [("program", "ms", "TFLOP/s")]
    for row in rows_of("roofline", "H200"):
        rate = row.get("GFLOP/s")
        rows.append((row["program"], milliseconds(row), "" if rate is None else f"{rate / 1000:.3g}"))
    return report.markdown(rows)


TABLES: dict[str, Callable[[], str]] = {
    "verdicts": lambda: table_of("seeds32/report.md", 1),
    "arms": lambda: table_of("seeds32/report.md", 0),
    "reproduced": reproduced,
    "parity": parity,
    "study losses": lambda: table_of("dropout_sweep/report.md", 0),
    "study tested": lambda: table_of("dropout_sweep/report.md", 1),
    "rivals' accuracy": lambda: rivals("accuracy"),
    "rivals' loss": lambda: rivals("loss"),
    "rivals' calibration": lambda: rivals("calibration_error"),
    "best tried": lambda: table_of("best_perceptron/report.md", 0),
    "best": lambda: table_of("best_perceptron/report.md", 1),
    "types": types,
    "differences of types": differences_of_types,
    "calibration": lambda: table_of("calibration/report.md", 0),
    "calibration differences": lambda: table_of("calibration/report.md", 1),
    "entropies": lambda: table_of("calibration/report.md", 2),
    "detection": lambda: table_of("calibration/report.md", 3),
    "routes": lambda: table_of("export/report.md", 0),
    "images a second": functools.partial(images_a_second, "Intel"),
    "race": race,
    "lanes": lanes,
    "roofline": where_time_goes,
    "startup": startup,
    "saving": saving,
    "race on a GPU": race_on_a_gpu,
    "lanes on a GPU": lanes_on_a_gpu,
    "kernels": kernels,
    "roofline on a GPU": roofline_on_a_gpu,
    "images a second on a GPU": functools.partial(images_a_second, "H200"),
}


def fill(text: str) -> str:
    """Replace every table by what its record says."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{TABLES[block[2]]()}\n\n{block[4]}", text)


@dataclasses.dataclass(frozen=True)
class Flags:
    pass


def main(flags: Flags) -> int:
    for document in DOCUMENTS:
        text = document.read_text()
        if tables := BLOCK.findall(text):
            files.write_atomically(document, fill(text))
            print(f"{len(tables)} tables of {document} are as the records say", file=sys.stderr)
    return 0


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
