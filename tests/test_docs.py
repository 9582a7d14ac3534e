"""The documentation builds without a warning, says everything that is public, and its examples run."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from events import scalars
from flax import linen as nn

import fashion_jax

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
MODULES = [f"fashion_jax.{path.stem}" for path in Path(fashion_jax.__file__).parent.glob("[!_]*.py")]
FENCE = re.compile(r"^ *```.*$", re.MULTILINE)


def run(*arguments, cwd) -> None:
    """Run Python in a process of its own: examples set up devices, and conf.py changes how annotations are made."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def members() -> dict[str, Any]:
    """Every public class and function."""
    return {
        f"{name}.{member}": thing
        for name in MODULES
        for member, thing in vars(importlib.import_module(name)).items()
        if not member.startswith("_") and callable(thing) and getattr(thing, "__module__", None) == name
    }


def methods(name: str, thing) -> dict[str, Any]:
    if not inspect.isclass(thing):
        return {}
    return {
        f"{name}.{member}": method
        for member, method in inspect.getmembers(thing, inspect.isfunction)
        if not member.startswith("_") and method.__module__ == thing.__module__
    }


def own_arguments(thing) -> list[str]:
    """Without those of Flax's modules and Python's exceptions."""
    if not inspect.isclass(thing):
        return [name for name in inspect.signature(thing).parameters if name != "self"]
    if issubclass(thing, Exception):
        return list(inspect.get_annotations(thing))
    inherited = ("parent", "name") if issubclass(thing, nn.Module) else ()
    return [name for name in inspect.signature(thing).parameters if name not in inherited]


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    pages = tmp_path_factory.mktemp("docs")
    run("-m", "sphinx", "--fail-on-warning", "--quiet", "--doctree-dir", pages / "trees", DOCS, pages, cwd=ROOT)
    return pages


def test_examples_run(tmp_path):
    texts = {"-".join(page.relative_to(DOCS).parts): page.read_text() for page in PAGES}
    pages = {name: text for name, text in texts.items() if ">>>" in text}
    for name, text in pages.items():
        # doctest would take the end of a fence for a part of what is printed.
        (tmp_path / name).write_text(FENCE.sub("", text))
    # One process for all, because imports and compilations take longer than the examples; the devices come first.
    names = sorted(pages, key=lambda name: "use_all_cores()" not in pages[name])
    # What the package itself warns of is a part of the pages.
    run("-W", "error", "-W", "default::UserWarning", "-m", "doctest", "-o", "ELLIPSIS", *names, cwd=tmp_path)
    # The page on logs writes one run's figures in two ways.
    lines = [json.loads(line) for line in (tmp_path / "runs" / "log.jsonl").read_text().splitlines()]
    names = {"loss/training": "train_loss", "loss/validation": "validation_loss", "accuracy": "validation_accuracy"}
    assert scalars(tmp_path / "runs" / "tensorboard") == {
        tag: [(line["epoch"], line[name]) for line in lines] for tag, name in names.items()
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_no_python_is_left_out(page):
    blocks = re.findall(r"^ *```python\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL)
    assert all(block.lstrip().startswith(">>> ") for block in blocks)


def test_the_reference_has_every_public_name(built):
    reference = "".join(page.read_text() for page in (built / "api").glob("*.html"))
    anchors = re.findall(r'id="(fashion_jax[\w.]*|module-fashion_jax[\w.]*)"', reference)
    assert len(set(anchors)) == len(anchors), "nothing is described twice"
    public = [*(f"module-{name}" for name in MODULES), *members()]
    exported = [f"fashion_jax.{room}.{name}" for room, names in fashion_jax._ROOMS.items() for name in names]
    assert {*public, *exported} <= set(anchors), sorted({*public, *exported} - set(anchors))
    index = (built / "api" / "index.html").read_text()
    assert not [name for name in exported if f'#{name}"' not in index]
    assert "Alias for field number" not in reference


def test_a_docstring_names_every_argument():
    """In the signature's order; one or two may be in the summary instead."""
    differ = {}
    for name, top in members().items():
        for place, thing in {name: top, **methods(name, top)}.items():
            arguments = own_arguments(thing)
            text = f"{inspect.getdoc(thing)}\n"
            section = re.search(r"^(?:Args|Attributes):\n((?: {4}.*\n)*)", text, re.MULTILINE)
            named = re.findall(r"^ {4}\**(\w+): ", section[1], re.MULTILINE) if section else []
            if named != arguments and (section or len(arguments) > 2):
                differ[place] = (named, arguments)
    assert not differ


def test_every_link_between_pages_resolves(built):
    """Those in pictures and raw HTML too, which Sphinx does not look at."""
    pages = {page: page.read_text() for page in built.rglob("*.html")}
    for page, text in pages.items():
        for target in re.findall(r'<(?:a|img|link)\b[^>]*?\b(?:href|src)="([^"]*)"', text):
            path, _, anchor = target.partition("#")
            if re.match(r"\w+:", path):
                continue
            file = (page.parent / path.partition("?")[0]).resolve() if path else page
            assert file.exists(), f"{page.name} links to {target}"
            assert not anchor or f'id="{anchor}"' in pages[file], f"{page.name} links to {target}"
