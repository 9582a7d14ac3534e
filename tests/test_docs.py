"""README and documentation: blocks and commands run, links lead somewhere, names exist, figures are recorded ones."""

import importlib
import re
import runpy
import shlex
from pathlib import Path

import pages
import pytest
import tyro

import fashion_jax
from benchmarks import harness, tables

ROOT = tables.ROOT
PAGES = (ROOT / "README.md", ROOT / "tests" / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
MODULES = [f"fashion_jax.{path.stem}" for path in Path(fashion_jax.__file__).parent.glob("[!_]*.py")]
PROSE = {page: re.sub(r"```.*?```", "", text, flags=re.DOTALL) for page, text in TEXTS.items()}
README = TEXTS[ROOT / "README.md"]
LINES = re.findall(r"^    (\S.*)$|`([^`\n]+)`", "\n".join(PROSE[page] for page in tables.DOCUMENTS), re.MULTILINE)
COMMAND = re.compile(r"(ARGS='[^']*' )?(make|python|sh) [\w.-]")


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


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.relative_to(ROOT).as_posix())
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


@pytest.mark.parametrize("command", sorted(filter(COMMAND.match, {line or span for line, span in LINES})))
def test_commands_exist(command):
    words = shlex.split(command, comments=True)
    flags = [flag for word in words if word.startswith("ARGS=") for flag in shlex.split(word[5:])]
    program, name, *arguments = (word for word in words if not word.startswith("ARGS="))
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert re.search(rf"^{name}:", makefile, re.MULTILINE)
        script = re.search(rf"^{name}:.*\n\t\S+ (examples/\S+) \$\(ARGS\)", makefile, re.MULTILINE)
        name, arguments = script[1] if script else name, flags
    if name.startswith("examples/"):
        tyro.cli(runpy.run_path(str(ROOT / name), run_name="not main")["Flags"], args=arguments)
    elif program == "python":
        module = ROOT / arguments[0].replace(".", "/")
        assert name == "-m"
        assert module.with_suffix(".py").exists() or (module / "__main__.py").exists()


def test_each_benchmark_is_listed():
    listed = re.findall(r"^\| `(\w+\.py)", (ROOT / "benchmarks" / "README.md").read_text("utf-8"), re.MULTILINE)
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py") if "harness.start(" in path.read_text("utf-8")}
    assert {*listed} == scripts - {"__main__.py"}


def test_the_answer_is_that_of_the_table():
    answer = README.partition("## The answer")[2].partition("<!-- end")[0]
    means = re.findall(r"^\|.*: [+-]([\d.]+) \[", answer, re.MULTILINE)
    rise, _, narrowed, _, final, stopped, accuracy = (f"{float(mean):.3f}" for mean in means)
    numbers = [re.findall(r"\d\.\d+", sentence) for sentence in re.findall(r"^- .+$", answer, re.MULTILINE)]
    assert numbers == [[rise], [final], [narrowed], [accuracy], [stopped]]


def test_the_speed_is_that_of_the_records():
    def of(benchmark, machine, **entries):
        rows = tables.rows_of(benchmark, machine)
        return next(row for row in rows if all(row[name] == value for name, value in entries.items()))

    training = {"batch size": 64, "what": "training"}
    one = of("throughput", "Intel", program="JAX, fit", **training)
    eager = of("throughput", "Intel", program="PyTorch, in memory, fused Adam", **training)
    many, gpu = of("lanes", "Intel", program="sweep, 16 lanes"), of("lanes", "H200", program="sweep, 1024 lanes")
    assert re.findall(r"[\d.]+(?= s\b| ms\b| times)", README.partition("## Speed")[2].partition("##")[0]) == [
        f"{one['median (s)']:.2f}",
        f"{one['x PyTorch at its best']:.1f}",
        f"{harness.ratio(eager['seconds'], one['seconds']):.1f}",
        f"{many['median (s)']:.2f}",
        f"{1000 * gpu['median (s)']:.1f}",
        f"{1 / gpu['/ PyTorch, the same, as a CUDA graph']:.0f}",
    ]
    # "Level with that best program in a process on each core."
    assert 0.95 < many["/ PyTorch, one compiled function a step, a process on each core"] < 1.05
