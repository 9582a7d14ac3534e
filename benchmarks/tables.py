"""Fill the tables of README and documentation from the records, so that no figure in them is typed by hand.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; `TABLES` says which record it comes from.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from scipy import stats

from benchmarks import harness
from fashion_jax import evidence, files, report, statistics
from fashion_jax.types import History, Metrics

ROOT, RECORDS = harness.ROOT, harness.RECORDS
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# How the folders of a machine's records end.
FOLDERS = {"AMD": "amd-epyc-2-cores", "Intel": "intel-xeon-2-cores", "H200": "nvidia-h200"}
FOLDERS |= {"two cores": FOLDERS["Intel"], "one core": "intel-xeon-1-core"}
BLOCK = re.compile(r"(<!-- table: ([\w' ]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
CURVES = ROOT / "tests" / "reference" / "pytorch_curves.csv"
# Its figures are constants, and those of `tests/test_evidence.py`.
EXPLAINED = ROOT / "docs" / "evidence.md"
DRAWS = 300  # Of a few seeds.
SIZES, AUGMENTED = (1_000, 10_000, 50_000), {"": "", ", augmented": "_augmented"}.items()
AMD, H200, BOTH = ("AMD",), ("H200",), ("AMD", "Intel")


def newest(path: str, machine: str = "") -> str:
    """Read a file of the newest record that has it, of one machine if that is named."""
    if (record := max(RECORDS.glob(f"*{FOLDERS.get(machine, '')}/{path}"), default=None)) is None:
        of_machine = f" of {FOLDERS[machine]}" if machine else ""
        raise FileNotFoundError(f"no record{of_machine} in {RECORDS} has {path}; run the benchmark that writes it")
    return record.read_text()


def table_of(path: str, number: int) -> str:
    """Return a table of a report, counted from 0."""
    return re.findall(r"(?:^\|.*\n)+", newest(path), re.MULTILINE)[number].strip()


def rows_of(name: str, machine: str = "AMD") -> list[harness.Row]:
    """Return the rows of a machine's newest record of a benchmark."""
    return json.loads(newest(f"{name}.json", machine))["rows"]


def table(name, machines, columns, cells, *, where=lambda row: True, label="program", key="program") -> str:
    """Return a benchmark's rows as a table, machines side by side; rows with the same entry `key` become one.

    A cell is a function of the row, or the name of an entry and its format; an entry that is missing stays empty.
    """
    found: dict[str, list[list[str]]] = {}
    for i, machine in enumerate(machines):
        for row in filter(where, rows_of(name, machine)):
            found.setdefault(row[key], [[] for _ in machines])[i] += [_cell(row, cell) for cell in cells]
    head = [f"{machine}: {column}" if machines[1:] else column for machine in machines for column in columns]
    rows = []
    for row, parts in found.items():
        padded = [cell for part in parts for cell in part + ["-"] * (len(columns) - len(part))]
        rows.append([f"{row:,}" if isinstance(row, int) else row, *padded])
    return report.markdown([[label, *head], *rows])


def _cell(row: harness.Row, cell: Callable[[harness.Row], str] | tuple[str, str]) -> str:
    return cell(row) if callable(cell) else format(row[cell[0]], cell[1]) if cell[0] in row else ""


def seconds(digits: int) -> Callable[[harness.Row], str]:
    """Format median, and smallest and largest."""
    return f"{{median (s):.{digits}f}} ({{min (s):.{digits}f}}-{{max (s):.{digits}f}})".format_map


def milliseconds(row: harness.Row) -> str:
    """Format median, and smallest and largest, with three digits or more."""
    times = [1000 * row[f"{which} (s)"] for which in ("median", "min", "max")]
    median, low, high = (f"{time:,.0f}" if time >= 100 else f"{time:.3g}" for time in times)
    return f"{median} ({low}-{high})"


def faster(rival: str, form: str) -> Callable[[harness.Row], str]:
    """Format how many times as fast as a rival, of which a record may not have heard."""
    return lambda row: format(1 / row[f"/ {rival}"], form) if f"/ {rival}" in row else "-"


def reproduced() -> str:
    """Means of the last five epochs, ours and PyTorch's, and the range of PyTorch runs that others made."""
    ours = json.loads(newest("seeds32/history.json"))["arms"]
    # [ours and theirs, arms, seeds, figures]
    theirs = np.array(json.loads(newest("distribution.json"))["measured"])[1]
    others = report.read_curves(CURVES)
    seeds = (f"ours, {len(ours['no dropout']['running_loss'])} seeds", f"PyTorch, {theirs.shape[1]} seeds")
    columns = (*seeds, "p (Welch)", "three PyTorch runs of others")
    rows: list[tuple[str, ...]] = [("arm", "figure", *columns)]
    for i, (arm, rate) in enumerate({"no dropout": 0.0, "dropout 0.2": 0.2}.items()):
        validation = ours[arm]["validation"]
        curves = {
            "running training loss": (ours[arm]["running_loss"], others[rate].running_loss),
            "test loss": (validation["loss"], others[rate].validation.loss),
            "test accuracy": (validation["accuracy"], others[rate].validation.accuracy),
        }
        for j, (figure, of_both) in enumerate(curves.items()):
            here, elsewhere = (np.array(curve)[:, -5:].mean(axis=1) for curve in of_both)
            there = theirs[i, :, j]
            welch: Any = stats.ttest_ind(here, there, equal_var=False)
            means = (f"{here.mean():.4f}", f"{there.mean():.4f}", f"{welch.pvalue:.2f}")
            rows.append((arm, figure, *means, f"{elsewhere.min():.3f}-{elsewhere.max():.3f}"))
    return report.markdown(rows)


def parity() -> str:
    """Differences of single steps."""
    label, *columns = rows_of("parity", "")[0]

    def form(value: float) -> str:
        return f"{value:.1e}" if isinstance(value, float) and value else f"{value:g}"

    rows = [[row[label], *(form(row[column]) for column in columns)] for row in rows_of("parity", "")]
    return report.markdown([[label, *columns], *rows])


def images_a_second(machine: str) -> str:
    """Images per second that each program classifies."""
    programs = dict.fromkeys(row["program"] for row in rows_of("predict", machine))
    return table("predict", [machine], programs, [("images/s", ",.0f")], label="images at a time", key="images")


def recorded_arms(record: str) -> list[History]:
    """Return both arms of the text of a history.json."""

    def metrics(arm: Any, part: str) -> Metrics:
        return Metrics(np.array(arm[part]["loss"]), np.array(arm[part]["accuracy"]))

    arms = json.loads(record)["arms"].values()
    return [History(np.array(arm["running_loss"]), metrics(arm, "train"), metrics(arm, "validation")) for arm in arms]


def power() -> str:
    """Return how often 4 or 8 of the 32 recorded seeds decide each claim, and how often not as all of them do."""
    arms, rng, columns = recorded_arms(newest("seeds32/history.json")), np.random.default_rng(0), {}
    claims, truth = zip(*((verdict.claim, verdict.answer) for verdict in evidence.judge(*arms)), strict=True)

    def answers(seeds: np.ndarray) -> list[str]:
        few: Any = [jax.tree.map(lambda leaf: leaf[seeds], arm) for arm in arms]
        return [verdict.answer for verdict in evidence.judge(*few)]

    for seeds in (4, 8):
        found = np.array([answers(rng.choice(32, seeds, replace=False)) for _ in range(DRAWS)])
        decided = found != "undecided"
        columns[f"{seeds} seeds decide"] = decided.mean(axis=0)
        columns[f"{seeds} seeds decide otherwise"] = (decided & (found != truth)).mean(axis=0)
    cells = [[f"{share:.0%}" for share in shares] for shares in zip(*columns.values(), strict=True)]
    rows = [[claim, answer, *row] for claim, answer, row in zip(claims, truth, cells, strict=True)]
    return report.markdown([["claim", "32 seeds", *columns], *rows])


def situations() -> dict[str, Any]:
    """Return the scores of each rival in each situation that is recorded."""
    names = [(f"{size:,} images{note}", f"rivals_{size}{folder}") for note, folder in AUGMENTED for size in SIZES]
    found = {title: folder for title, folder in names if list(RECORDS.glob(f"*/{folder}/report.json"))}
    tests = {title: json.loads(newest(f"{folder}/report.json"))["test"] for title, folder in found.items()}
    return {
        title: {rival: {of: np.array(values) for of, values in scores.items()} for rival, scores in test.items()}
        for title, test in tests.items()
    }


def rivals(measure: str) -> str:
    """Return the results of each rival in each situation, on the test set."""
    columns = {
        title: {rival: statistics.interval(of[measure]) for rival, of in scores.items()}
        for title, scores in situations().items()
    }
    return report.intervals(columns)


def earlier_rivals(measure: str) -> str:
    """Return the results of each rival at 50,000 images in the newest record of the first version."""
    found = json.loads(newest("when_dropout_helps/report.json"))["test"]
    columns = {
        title: {rival: statistics.interval(np.array(of[measure])) for rival, of in found[title].items()}
        for title in ("50,000 images", "50,000 images, augmented")
    }
    return report.intervals(columns)


def earlier_differences() -> str:
    """Return dropout minus nothing at 50,000 images: in each of the two records, and in all their seeds."""
    records = sorted(RECORDS.glob("*/when_dropout_helps/report.json"))
    tests = [json.loads(record.read_text())["test"]["50,000 images"] for record in records]
    rows = [["measure", *(record.parts[-3][:10] for record in records), "both"]]
    for measure in ("accuracy", "loss"):
        differences = [np.subtract(test["dropout"][measure], test["nothing"][measure]) for test in tests]
        rows.append([measure, *map(str, map(statistics.interval, [*differences, np.concatenate(differences)]))])
    return report.markdown(rows)


def paired_rivals(word: str) -> str:
    """Return the differences of pairs of rivals; a star marks those that survive Holm's correction for all of them."""
    pairs = re.findall(r"^\| (.+): more accurate than (.+?) +\|", newest("rivals_10000/report.md"), re.MULTILINE)
    found = {title: evidence.compare_rivals(scores, pairs) for title, scores in situations().items()}
    p_values = statistics.holm([verdict for verdicts in found.values() for verdict in verdicts]).reshape(len(found), -1)
    rows: dict[str, list[str]] = {}
    for verdicts, of_verdicts in zip(found.values(), p_values, strict=True):
        for verdict, p in zip(verdicts, of_verdicts, strict=True):
            star = "*" * bool(p < 1 - statistics.LEVEL)
            rows.setdefault(verdict.claim, []).append(f"{verdict.interval}{star} {verdict.answer}")
    return report.markdown([["claim", *found], *([claim, *row] for claim, row in rows.items() if word in claim)])


def race_on_a_gpu() -> str:
    """Milliseconds of a training epoch at each batch size."""
    sizes = dict.fromkeys(row["batch size"] for row in rows_of("throughput", "H200"))
    columns = [f"batch {size:,}: {what}" for size in sizes for what in ("ms per epoch", "times PyTorch at its best")]
    cells = [milliseconds, ("x PyTorch at its best", ".2g")]
    return table("throughput", H200, columns, cells, where=lambda row: row["what"] == "training")


def memory(row: harness.Row) -> str:
    """Format the memory that JAX took, in MiB."""
    return "-" if row["program"].startswith("PyTorch") else f"{row[MEMORY]:,.0f}"


def paper() -> str:
    """Estimate the cost of many networks on one GPU and on eight, from the record of one."""
    lanes, epochs = 10_000, 30
    row = rows_of("lanes", "H200")[-1]
    together = int(row["program"].split()[1])
    # Parameters, two moments and the best parameters, in float32.
    state = 4 * 4 * 242_762 * lanes / 1e9
    lines: list[tuple[str, ...]] = [("", "1 GPU", "8 GPUs")]
    for label, form, value in (
        ("networks per GPU", ",.0f", lambda gpus: lanes / gpus),
        (f"training, {epochs} epochs, minutes", ".1f", lambda gpus: epochs * lanes * row["median (s)"] / gpus / 60),
        ("memory per GPU, all networks at once, GiB", ".0f", lambda gpus: row[MEMORY] / 1024 * lanes / together / gpus),
        ("states on the host, and each checkpoint, GB", ".0f", lambda gpus: state),
        ("history on the host, MB", ".0f", lambda gpus: 5 * 4 * epochs * lanes / 1e6),
    ):
        lines.append((label, *(format(value(gpus), form) for gpus in (1, 8))))
    return report.markdown(lines)


def quartiles(row: harness.Row) -> str:
    """Format the ratio of an ablation."""
    low, high = row["ratio, quartiles"]
    return f"{row['ratio']:.3f} ({low:.3f}-{high:.3f})"


def teraflops(row: harness.Row) -> str:
    return f"{row['GFLOP/s'] / 1000:.3g}" if "GFLOP/s" in row else ""


MANY = ("s per model and epoch", "times eager", "times compiled, on each core", "times by hand, on each core")
RIVALS = (
    "PyTorch, in memory, fused Adam",
    "PyTorch, one compiled function a step, a process on each core",
    "PyTorch, gradients by hand, a process on each core",
)
MANY_CELLS = (seconds(3), *(faster(rival, ".2f") for rival in RIVALS))
MEMORY = "JAX's peak on the device so far (MiB)"
LAUNCHES = ("kernels a step", "launched by the host a step", "us a step and model")

TABLES: dict[str, Callable[[], str]] = {
    "verdicts": partial(table_of, "seeds32/report.md", 1),
    "arms": partial(table_of, "seeds32/report.md", 0),
    "power": power,
    "early stopping": partial(table_of, "holdout32/report.md", 2),
    "early stopping paired": partial(table_of, "holdout32/report.md", 3),
    "reproduced": reproduced,
    "parity": parity,
    "study losses": partial(table_of, "dropout_sweep/report.md", 0),
    "study tested": partial(table_of, "dropout_sweep/report.md", 1),
    "paired rivals in accuracy": partial(paired_rivals, "more accurate"),
    "paired rivals in loss": partial(paired_rivals, "lower loss"),
    "mnist": partial(table_of, "mnist/report.md", 1),
    "digits": lambda: harness.table(rows_of("digits", "")),
    "earlier rivals' accuracy": partial(earlier_rivals, "accuracy"),
    "earlier rivals' loss": partial(earlier_rivals, "loss"),
    "earlier differences": earlier_differences,
    "rivals' accuracy": partial(rivals, "accuracy"),
    "rivals' loss": partial(rivals, "loss"),
    "rivals' calibration": partial(rivals, "calibration_error"),
    "best tried": partial(table_of, "best_perceptron/report.md", 0),
    "best": partial(table_of, "best_perceptron/report.md", 1),
    "types": lambda: table(
        "dtype",
        AMD,
        ("s per training epoch: median (min-max)", "speed-up"),
        (seconds(2), ("x float32", ".2f")),
        label="network, matrix products in",
    ),
    "differences of types": lambda: report.markdown(
        [("hold-out", "mean and 95% interval"), *json.loads(newest("dtype.json"))["differences"].items()]
    ),
    "calibration": partial(table_of, "calibration/report.md", 0),
    "calibration differences": partial(table_of, "calibration/report.md", 1),
    "entropies": partial(table_of, "calibration/report.md", 2),
    "detection": partial(table_of, "calibration/report.md", 3),
    "routes": partial(table_of, "export/report.md", 0),
    "images a second": partial(images_a_second, "Intel"),
    "images a second on a GPU": partial(images_a_second, "H200"),
    "race": lambda: table(
        "throughput",
        ("Intel",),
        ("s per epoch", "times PyTorch at its best", "times gradients by hand", "times the tutorial's loop"),
        (
            seconds(2),
            *((f"x {rival}", ".2f") for rival in ("PyTorch at its best", "gradients by hand", "the tutorial's loop")),
        ),
        where=lambda row: (row["batch size"], row["what"]) == (64, "training"),
    ),
    "lanes": lambda: table("lanes", ("Intel",), MANY, MANY_CELLS),
    "grid": lambda: table("grid", [""], MANY[:1] + MANY[2:], MANY_CELLS[:1] + MANY_CELLS[2:]),
    "roofline": lambda: table(
        "roofline",
        BOTH,
        ("s", "share of the GEMM rate", "share of the epoch that it takes"),
        (seconds(3), ("share of GEMM rate", ".0%"), ("share of the epoch that it takes", ".0%")),
        # In older records the batch is a constant of the program, which XLA multiplies in another, slower way.
        where=lambda row: row["program"] != "the matrix products alone",
    ),
    "startup": lambda: table(
        "startup",
        (*BOTH, *H200),
        ("cold, s", "with the compilation cache, s"),
        [("median (s)", ".2f")],
        label="phase",
        key="phase",
    ),
    "saving": lambda: table(
        "saving", ("Intel",), ("s: median (min-max)", "added"), (seconds(2), ("share added (median)", "+.1%"))
    ),
    "race on a GPU": race_on_a_gpu,
    "lanes on a GPU": lambda: table(
        "lanes",
        H200,
        ("ms per model and epoch", "times PyTorch's CUDA graph", "JAX's memory on the GPU, MiB"),
        (milliseconds, faster("PyTorch, the same, as a CUDA graph", ".3g"), memory),
    ),
    "paper": paper,
    "scaling": lambda: table(
        "scaling",
        [""],
        ("networks", "ms per epoch: median (min-max)", "us per network"),
        (("lanes", ",d"), milliseconds, ("us a lane", ".0f")),
    ),
    "kernels": lambda: table("kernels", H200, LAUNCHES, [(column, ".3g") for column in LAUNCHES]),
    "roofline on a GPU": lambda: table("roofline", H200, ("ms", "TFLOP/s"), (milliseconds, teraflops)),
    "convolutions": lambda: table(
        "convolutions",
        [""],
        ("s: median (min-max)", "times as long", "n"),
        (seconds(2), ("times as long", ".2f"), ("repetitions", "d")),
    ),
    "ablation": lambda: table(
        "ablation",
        ["two cores", "one core"],
        ("s: median (min-max)", "times as long (quartiles)", "s to compile"),
        (seconds(2), quartiles, ("compilation, median (s)", ".1f")),
    ),
}


def fill(text: str) -> str:
    """Replace every table by that of its record."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{TABLES[block[2]]()}\n\n{block[4]}", text)


def strays(text: str) -> list[str]:
    """Return the figures in sentences that no table of the page has: of its answer, or those of 3 digits and more."""
    answer = text.partition("## The answer\n")[2].partition("\n## ")[0]
    page, digits = (answer, 1) if answer else (text, 3)
    page = re.sub(r"```.*?```|`[^`\n]*`|\]\([^)]*\)", "", page, flags=re.DOTALL)
    tables = "".join(re.findall(r"^\|.*$", page, re.MULTILINE))
    recorded = [abs(float(number)) for number in re.findall(r"\d+\.\d+", tables)]
    figures = re.findall(
        rf"(?<![\w.])\d+\.\d{{{digits},}}(?![\w.]*\d)", re.sub(r"^\|.*$", "", page, flags=re.MULTILINE)
    )
    places = {figure: len(figure.partition(".")[2]) for figure in figures}
    return [figure for figure in figures if float(figure) not in {round(n, places[figure]) for n in recorded}]


@dataclasses.dataclass(frozen=True)
class Flags:
    check: bool = False  # Only compare; exit with 1 where a table or a figure of the answer is not recorded.


def main(flags: Flags) -> int:
    status = 0
    for document in DOCUMENTS:
        text = document.read_text()
        if not (tables := BLOCK.findall(text)):
            continue
        filled, unknown = fill(text), strays(text) if document != EXPLAINED else []
        if not flags.check:
            files.write(document, filled)
        elif filled != text or unknown:
            print(f"{document} differs from the records: {unknown or 'a table'}", file=sys.stderr)
            status = 1
            continue
        print(f"{len(tables)} tables of {document} are as the records say", file=sys.stderr)
    return status


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
