"""Show a record against an earlier one: the ratio of the medians, row by row.

Notes on standard error what else differs: the processor, and flags.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks import harness
from fashion_jax import report

MEDIAN = "median (s)"
TEXT = ("batch size", "what", "images", "program", "start", "phase")
Folder = tyro.conf.Positional[Path]


@dataclasses.dataclass(frozen=True)
class Flags:
    old: Annotated[Folder, tyro.conf.arg(metavar="OLD")]  # Folder of the earlier record.
    new: Annotated[Folder, tyro.conf.arg(metavar="NEW")]  # Folder of the later one.


def read(path: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Read the medians of one record file, and the processor and flags that they depend on."""
    try:
        record = json.loads(path.read_text())
        timed = [row for row in record["rows"] if MEDIAN in row]
        medians = {", ".join(str(row[name]) for name in TEXT if name in row): float(row[MEDIAN]) for row in timed}
        # Older records have the places among their flags.
        flags = {f"--{name}": value for name, value in record["flags"].items() if name not in report.PLACES}
        return medians, {"processor": record["environment"]["processor"], **flags}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no benchmark's record ({error!r})") from error


def main(flags: Flags) -> None:
    rows: list[harness.Row] = []
    for path in [path for path in sorted(flags.new.glob("*.json")) if (flags.old / path.name).exists()]:
        (old, then), (new, now) = read(flags.old / path.name), read(path)
        for name in [name for name in {**then, **now} if then.get(name) != now.get(name)]:
            print(f"{path.name}: {name} was {then.get(name)} and is {now.get(name)}", file=sys.stderr)
        for row in [row for row in new if row in old]:
            times = {"old (s)": old[row], "new (s)": new[row], "old / new": old[row] / new[row]}
            rows.append({"benchmark": path.stem, "row": row, **times})
    if not rows:
        raise ValueError(f"{flags.old} and {flags.new} have no timing in common")
    print(harness.table(rows))


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
