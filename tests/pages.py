"""Run the Python blocks of Markdown pages in one process; what trains does so on few images."""

import doctest
import functools
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

from fashion_jax import Batch, data, train, use_all_cores

IMAGES, EPOCHS, SEEDS = 640, 4, 2
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run(*arguments: str | Path, cwd: Path, python: str | Path = sys.executable, **variables: str) -> str:
    """Run Python in a process of its own, and return what it prints."""
    options = {"capture_output": True, "text": True, "check": False}
    done = subprocess.run([python, *arguments], cwd=cwd, env=os.environ | variables, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def on_few(function):
    """Let a function train on few images, few epochs and few seeds, whatever the page asks for."""
    has_epochs = "epochs" in inspect.signature(function).parameters

    @functools.wraps(function)
    def wrapped(*arguments, **options):
        few = (Batch(*(leaf[:IMAGES] for leaf in part)) if isinstance(part, Batch) else part for part in arguments)
        options |= {"epochs": min(options.get("epochs", EPOCHS), EPOCHS)} if has_epochs else {}
        options |= {"seeds": options["seeds"][:SEEDS]} if "seeds" in options else {}
        return function(*few, **options)

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
    for name in ("fit", "sweep", "train_epoch"):
        setattr(train, name, on_few(getattr(train, name)))
    data.load = functools.cache(data.load)
    use_all_cores()
    for name in sys.argv[1:]:
        execute(Path(name))
