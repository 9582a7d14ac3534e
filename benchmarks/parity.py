"""How far are single steps from PyTorch's? Same weights, batches and dropout masks, in float64 and in float32."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks import harness

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Flags:
    steps: int = 300
    """Steps before the short last batch."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the record; by default benchmarks/records/<date>-<device>."""


def measure(rates: Sequence[float], steps: int, *, x64: bool) -> list[harness.Row]:
    """Run the comparison that the tests run, in a process of its own; a row for each dropout rate."""
    command = [sys.executable, "tests/parity.py", str(steps), *map(str, rates)]
    environment = os.environ | {"JAX_ENABLE_X64": str(int(x64)), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


def main(flags: Flags) -> None:
    rates = (0.0, 0.2)
    found = {
        f"{'float64' if x64 else 'float32'}, dropout {rate:g}": row
        for x64 in (True, False)
        for rate, row in zip(rates, measure(rates, flags.steps, x64=x64), strict=True)
    }
    measures = next(iter(found.values()))
    rows = [{"largest difference": name} | {kind: of[name] for kind, of in found.items()} for name in measures]
    harness.write("parity", rows, flags=flags, output=flags.output, figure=None)


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
