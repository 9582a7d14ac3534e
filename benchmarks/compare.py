"""Show a record against an earlier one: the ratio of the medians, row by row.

Notes on standard error what else differs: the processor, and flags.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks import harness
from fashion_jax import report

MEDIAN = "median (s)"
TEXT = ("batch size", "what", "images", "program", "start", "phase")


@dataclasses.dataclass(frozen=True)
class Flags:
    old: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OLD")]
    """Folder of the earlier record."""
    new: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="NEW")]
    """Folder of the later one."""


def read(path: Path) -> tuple[dict[tuple, float], dict[str, object]]:
    """Read the medians of one record file, and what they depend on."""
    medians: dict[tuple, float] = {}
    try:
        record = json.loads(path.read_text())
        for row in record["rows"]:
            if MEDIAN in row:
                key = tuple(row[name] for name in TEXT if name in row)
                if key in medians:
                    raise ValueError(f"two rows are called {key}")
                medians[key] = float(row[MEDIAN])
                if not 0 < medians[key] < math.inf:
                    raise ValueError(f"{MEDIAN} of {key} is {row[MEDIAN]}")
        # Older records have the places among their flags.
        flags = {f"--{name}": value for name, value in record["flags"].items() if name not in report.PLACES}
        return medians, {"processor": record["environment"]["processor"], **flags}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a benchmark's record ({error!r})") from error


def main(flags: Flags) -> int:
    for folder in (flags.old, flags.new):
        if not folder.is_dir():
            print(f"error: {folder} is not a folder with a record", file=sys.stderr)
            return 1
    rows: list[harness.Row] = []
    for path in sorted(flags.new.glob("*.json")):
        if not (flags.old / path.name).exists():
            continue
        (old, then), (new, now) = read(flags.old / path.name), read(path)
        for name in sorted({*then, *now}):
            if then.get(name) != now.get(name):
                print(f"{path.name}: {name} was {then.get(name)} and is {now.get(name)}", file=sys.stderr)
        rows.extend(
            {
                "benchmark": path.stem,
                "row": ", ".join(map(str, row)),
                "old (s)": old[row],
                "new (s)": new[row],
                "old / new": old[row] / new[row],
            }
            for row in new
            if row in old
        )
    if not rows:
        print(f"error: {flags.old} and {flags.new} have no timing in common", file=sys.stderr)
        return 1
    print(harness.table(rows))
    return 0


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
