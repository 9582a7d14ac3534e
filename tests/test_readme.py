"""README and documentation name commands that exist; the README's figures are those of the records."""

import re
import runpy
import shlex
from itertools import chain

import pytest
import tyro

import fashion_jax
from benchmarks import harness, tables

ROOT = tables.ROOT
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in tables.DOCUMENTS)
PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
SPANS = chain(re.findall(r"^    (\S.*)$", PROSE, re.MULTILINE), re.findall(r"`([^`\n]+)`", PROSE))
COMMANDS = sorted({span for span in SPANS if re.match(r"(ARGS='[^']*' )?(make|python|sh) [\w.-]", span)})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command):
    words = shlex.split(command, comments=True)
    assignments = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    program, *words = (word for word in words if not re.match(r"[A-Z_]+=", word))
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert re.search(rf"^{words[0]}:", makefile, re.MULTILINE)
        script = re.search(rf"^{words[0]}:.*\n\t\S+ (examples/\S+) \$\(ARGS\)", makefile, re.MULTILINE)
        words = [script[1], *shlex.split(assignments["ARGS"])] if script and assignments else []
    if words and words[0].startswith("examples/"):
        flags = runpy.run_path(str(ROOT / words[0]), run_name="not main")["Flags"]
        tyro.cli(flags, args=words[1:])
    elif words and program == "python":
        assert words[0] == "-m"
        assert (ROOT / f"{words[1].replace('.', '/')}.py").exists() or (ROOT / words[1] / "__main__.py").exists()


def test_the_answer_is_that_of_the_table():
    sentences = re.findall(r"^- .+$", README.partition("## The answer")[2].partition("<!--")[0], re.MULTILINE)
    numbers = [re.findall(r"\d\.\d+", sentence) for sentence in sentences]
    rows = README.partition("<!-- table: verdicts -->")[2].partition("<!-- end")[0].splitlines()[4:]
    means = [f"{abs(float(re.findall(r'([+-][0-9.]+) ', row)[0])):.3f}" for row in rows if row]
    rise, _, narrowed, _, final, stopped, accuracy = means
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


def test_the_citation_has_the_version():
    assert f"\nversion: {fashion_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
