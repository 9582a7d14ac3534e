"""Show a record against an earlier one: the ratio of the medians, row by row."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks import harness

MEDIAN = "median (s)"
TEXT = ("batch size", "what", "program", "start", "phase")


@dataclasses.dataclass(frozen=True)
class Flags:
    old: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OLD")]
    """Folder of the earlier record."""
    new: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="NEW")]
    """Folder of the later one."""


def timings(path: Path) -> dict[tuple, float]:
    """Read the medians of one record file."""
    try:
        rows = json.loads(path.read_text())["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a benchmark's record ({error!r})") from error
    return {tuple(row[name] for name in TEXT if name in row): row[MEDIAN] for row in rows if MEDIAN in row}


def main(flags: Flags) -> int:
    for folder in (flags.old, flags.new):
        if not folder.is_dir():
            print(f"error: {folder} is not a folder with a record", file=sys.stderr)
            return 1
    rows: list[harness.Row] = []
    for path in sorted(flags.new.glob("*.json")):
        if not (flags.old / path.name).exists():
            continue
        old, new = timings(flags.old / path.name), timings(path)
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
