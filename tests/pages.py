"""Run the Python blocks of Markdown pages in one process; `fit` and `sweep` train on few images."""

import doctest
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

from fashion_jax import train, use_all_cores
from fashion_jax.types import Batch

IMAGES, EPOCHS, SEEDS = 640, 4, 2
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run(*arguments: str | Path, cwd: Path) -> None:
    """Run Python in a process of its own: pages set up devices, and Sphinx changes how annotations are made."""
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run_blocks(*pages: Path, cwd: Path) -> None:
    """Run the blocks of pages; the package's warnings are part of them."""
    run("-W", "error", "-W", "default::UserWarning", __file__, *pages, cwd=cwd)


def on_few(function):
    """Let `fit` or `sweep` train on few images, few epochs and few seeds, whatever the page asks for."""

    @functools.wraps(function)
    def wrapped(train, validation, *, epochs=EPOCHS, **options):
        few = (Batch(*(leaf[:IMAGES] for leaf in part)) for part in (train, validation))
        options |= {"seeds": options["seeds"][:SEEDS]} if "seeds" in options else {}
        return function(*few, epochs=min(epochs, EPOCHS), **options)

    return wrapped


def execute(page: Path) -> None:
    """Execute the blocks of a page in order, with one namespace; blocks with prompts have their outputs compared."""
    names = {"__name__": "__main__"}
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if block.startswith(">>>"):
            example = doctest.DocTestParser().get_doctest(block, names, page.name, str(page), 0)
            failed = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, clear_globs=False).failed
            assert not failed, f"{page} prints something else"
            names = example.globs
        else:
            exec(compile(block, str(page), "exec"), names)


if __name__ == "__main__":
    train.fit, train.sweep = on_few(train.fit), on_few(train.sweep)
    use_all_cores()
    for name in sys.argv[1:]:
        execute(Path(name))
