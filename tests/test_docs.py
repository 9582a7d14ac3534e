"""README and documentation: blocks run, links lead somewhere, names exist, figures are those of the records."""

import importlib
import re
from pathlib import Path

import pages
import pytest

import fashion_jax
from benchmarks import tables

ROOT = tables.ROOT
PAGES = (ROOT / "README.md", ROOT / "tests" / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
MODULES = [f"fashion_jax.{path.stem}" for path in Path(fashion_jax.__file__).parent.glob("[!_]*.py")]
PROSE = {page: re.sub(r"```.*?```", "", text, flags=re.DOTALL) for page, text in TEXTS.items()}
each_page = pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.relative_to(ROOT).as_posix())


def test_python_blocks_run(tmp_path):
    """In a process of their own, which pages set up; the package's warnings are part of them."""
    documents = [page for page in PAGES if pages.BLOCK.search(TEXTS[page])]
    options = {"cwd": tmp_path, "PYTHONPATH": str(ROOT)}
    pages.run("-W", "error", "-W", "default::UserWarning", pages.__file__, *documents, **options)


def test_the_documentation_builds_and_has_every_name(tmp_path):
    """In a process of its own, because Sphinx changes how annotations are made."""
    html = tmp_path / "html"
    pages.run("-m", "sphinx", "--fail-on-warning", "--quiet", "-d", tmp_path / "trees", "docs", html, cwd=ROOT)
    reference = "".join(page.read_text() for page in (html / "api").glob("*.html"))
    anchors = re.findall(r'id="((?:module-)?fashion_jax[\w.]*)"', reference)
    assert len(set(anchors)) == len(anchors), "nothing is described twice"
    exported = {f"fashion_jax.{room}.{name}" for room, names in fashion_jax._MODULES.items() for name in names}
    # train.py exports the functions of steps.py, which are described there.
    exported = {name.replace("train.evaluate", "steps.evaluate") for name in exported}
    assert {f"module-{name}" for name in MODULES} | exported <= set(anchors)
    index = TEXTS[ROOT / "docs" / "api" / "index.md"]
    assert set(fashion_jax.__all__) <= set(re.findall(r"`(\w+)`", index))


@each_page
def test_links_names_and_figures_are_right(page):
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#]*)(?:#([\w-]+))?\)", PROSE[page]):
        place = (page.parent / target).resolve() if target else page
        assert place.exists(), target
        # The anchors that a code host and Sphinx make of headings.
        headings = re.findall(r"^#+ (.+)$", TEXTS.get(place, ""), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, f"{target}#{anchor}"
    for name in re.findall(r"`((?:benchmarks|docs|examples|tests)/[\w./-]+)`", PROSE[page]):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(fashion_jax(?:\.\w+)+)", PROSE[page]):
        module, _, member = name.rpartition(".")
        assert name in MODULES or hasattr(importlib.import_module(module), member), name
    for block, name, content, _ in tables.BLOCK.findall(TEXTS[page]):
        assert content.strip() == tables.TABLES[name]().strip(), block
    records = "".join(path.read_text() for path in tables.RECORDS.rglob("report.md"))
    for interval in re.findall(r"[+-]?\d\.\d+ \[[+-]?\d\.\d+, [+-]?\d\.\d+\]", tables.BLOCK.sub("", PROSE[page])):
        assert interval in records
    if page in tables.DOCUMENTS and page != tables.EXPLAINED and "<!-- table" in TEXTS[page]:
        assert tables.strays(TEXTS[page]) == []


def test_quoted_messages_are_those_that_tests_expect():
    page = TEXTS[ROOT / "docs" / "troubleshooting.md"]
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py")).replace("\\", "")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 10
    for message in messages:
        assert all(part.strip() in tests for part in message.split("...")), message
