"""README and documentation name commands that exist; the README's figures are those of the records."""

import re
import runpy
import shlex
from itertools import chain

import pytest
import tyro

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


def test_the_answer_is_that_of_the_table():
    answer = README.partition("## The answer")[2].partition("<!-- end")[0]
    means = re.findall(r"^\|.*: [+-]([\d.]+) \[", answer, re.MULTILINE)
    rise, _, narrowed, _, final, stopped, accuracy = (f"{float(mean):.3f}" for mean in means)
    numbers = re.findall(r"^- .+ (\d\.\d+)\b", answer, re.MULTILINE)
    assert numbers == [rise, final, narrowed, accuracy, stopped]


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
