"""What the README says is what the records say; what it points at is there, and what it tells to run runs."""

import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import nbformat
import numpy as np
import pytest
import tyro
from nbclient import NotebookClient
from PIL import Image

from benchmarks import readme
from fashion_jax import CLASS_NAMES, data

TEXT = readme.README.read_text()
ROOT = readme.ROOT
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_tables_are_those_of_the_records():
    assert {name for _, name, _, _ in readme.BLOCK.findall(TEXT)} == readme.TABLES.keys()
    assert readme.fill(TEXT) == TEXT


def test_intervals_in_the_text_are_in_a_report():
    """Such as +0.0510 [+0.0425, +0.0595]."""
    intervals = re.findall(r"[+-]?\d\.\d+ \[[+-]?\d\.\d+, [+-]?\d\.\d+\]", readme.BLOCK.sub("", TEXT))
    assert len(intervals) > 5
    reports = "".join(path.read_text() for path in readme.RECORDS.rglob("report.md"))
    for interval in intervals:
        assert interval in reports


def test_files_that_it_names_are_there():
    links = re.findall(r"\]\(([^):]+)\)", TEXT)
    named = re.findall(r"`((?:benchmarks|examples|tests|scripts|fashion_jax)/[\w./-]+)`", TEXT)
    assert len(links) > 3
    assert len(named) > 5
    for name in {*links, *named}:
        assert (ROOT / name).exists(), name


class Block(NamedTuple):
    """A Python block: how the test shortens it, and what has to hold afterwards.

    Attributes:
        tells: A part of it that no other block has.
        shorter: What is replaced; each has to be there.
        then: Code that runs after it and sees its names.
        starts: Whether a new process begins here, because JAX must not have run before, or a command comes between.
    """

    tells: str
    shorter: dict[str, str]
    then: str
    starts: bool = False


BLOCKS = (
    Block(
        'savefig("losses.png")',
        {"epochs=30": "epochs=1"},
        """
from pathlib import Path
assert Path("losses.png").read_bytes().startswith(b"\\x89PNG")
assert min(history.validation.accuracy[-1] for history in arms.values()) > 0.75
""",
        starts=True,
    ),
    Block(
        'checkpoint="runs/saved"',
        {"dropout_rate=0.2, ": "dropout_rate=0.2, epochs=1, "},
        """
again = fit(train, test, key=jax.random.key(0), dropout_rate=0.2, epochs=1, checkpoint="runs/saved")
jax.tree.map(lambda first, second: (first == second).all() or 1 / 0, run, again)
""",
    ),
    Block("as progress", {"epochs=30": "epochs=1"}, "assert len(run.history.running_loss) == 1"),
    Block(
        "as log",
        {"epochs=30": "epochs=2"},
        """
import json
lines = [json.loads(line) for line in Path("runs/log.jsonl").read_text().splitlines()]
assert [line["validation_loss"] for line in lines] == run.history.validation.loss.tolist()
""",
    ),
    Block(
        "as board",
        {"epochs=30": "epochs=2"},
        """
from events import scalars
curves = {
    "loss/training": run.history.train.loss,
    "loss/validation": run.history.validation.loss,
    "accuracy": run.history.validation.accuracy,
}
assert scalars(Path("runs/tensorboard")) == {
    name: [(1, float(curve[0])), (2, float(curve[1]))] for name, curve in curves.items()
}
""",
    ),
    Block(
        "use_all_cores()",
        {"range(8)": "range(2)", "(0.0, 0.2))": "(0.0, 0.2), epochs=1)"},
        """
assert run.history.validation.loss.shape == (2, 2, 1)
assert run.history.validation.accuracy.min() > 0.75
""",
        starts=True,
    ),
    Block(
        'read_image("boot.jpg")',
        {},
        """
assert predict(network.params, images).argmax(axis=1)[0] == network.class_names.index("Ankle boot")
assert sure.probabilities.shape == (2, 10)
assert (sure.mutual_information <= sure.entropy).all()
""",
        starts=True,
    ),
)


def python_blocks() -> list[str]:
    blocks = [(language, content) for language, content in FENCED.findall(TEXT)]
    assert {language for language, _ in blocks} == {"python"}, "a block of another language needs a test"
    return [content for _, content in blocks]


def shortened(block: Block, content: str) -> str:
    for long, short in block.shorter.items():
        assert long in content, f"{block.tells} does not have {long} to shorten"
        content = content.replace(long, short)
    return content


def test_every_python_block_is_known():
    contents = python_blocks()
    assert len(contents) == len(BLOCKS), "a new block needs an entry in BLOCKS"
    for block, content in zip(BLOCKS, contents, strict=True):
        assert [block.tells in other for other in contents].count(True) == 1
        assert block.tells in content


@pytest.fixture(scope="module")
def place(tmp_path_factory, splits) -> Path:
    """A directory with the pictures that the README classifies, from the test set."""
    directory = tmp_path_factory.mktemp("readme")
    for name, label in (("boot.jpg", "Ankle boot"), ("shirt.png", "Shirt")):
        image = splits.test.images[np.argmax(splits.test.labels == CLASS_NAMES.index(label))]
        Image.fromarray(image).resize((280, 280), Image.Resampling.BICUBIC).save(directory / name)
    return directory


def run(place: Path, *command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    result = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result


def programs() -> list[str]:
    """The blocks, shortened and followed by what has to hold, one program a process."""
    found: list[str] = []
    for block, content in zip(BLOCKS, python_blocks(), strict=True):
        found[len(found) :] = [""] if block.starts else []
        found[-1] += f"{shortened(block, content)}\n{block.then}\n"
    return found


@pytest.mark.parametrize("number", [0, 1])
def test_python_blocks_run(place, number):
    run(place, sys.executable, "-W", "error", "-c", programs()[number])


def test_pictures_are_classified_by_the_command_and_by_the_block(place):
    command, *more = (command for command in commands() if "examples/classify.py" in command)
    assert not more
    _, script, *flags = shlex.split(command)
    result = run(place, sys.executable, str(ROOT / script), *flags, "--epochs", "1")
    assert [line.split("|")[1].strip() for line in result.stdout.splitlines()[2:]] == ["boot.jpg", "shirt.png"]
    assert (place / "runs" / "classify" / "01-boot.png").exists()
    run(place, sys.executable, "-W", "error", "-c", programs()[2])


def test_progress_is_a_bar_in_a_notebook(small, tmp_path):
    np.savez(tmp_path / "small.npz", *small)
    before = f"""
import jax, numpy as np
from fashion_jax import Batch, TrainConfig, fit
train = test = Batch(*np.load({str(tmp_path / "small.npz")!r}).values())
"""
    (block, content), *_ = (
        pair for pair in zip(BLOCKS, python_blocks(), strict=True) if pair[0].tells == "as progress"
    )
    cells = [nbformat.v4.new_code_cell(source) for source in (before, shortened(block, content))]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    shown = "".join(output.get("text", "") + str(output.get("data", "")) for output in notebook.cells[1].outputs)
    assert "1/1" in shown
    assert "accuracy=" in shown


# Commands: those that stand alone, indented by four spaces, and those in the text.


def commands(kind: str | None = None) -> list[str]:
    prose = FENCED.sub("", TEXT)
    alone = [line.strip() for line in prose.splitlines() if line.startswith("    ")]
    found = [*alone, *(span for span in re.findall(r"`([^`\n]+)`", prose) if kind_of(span))]
    return [command for command in found if kind in (None, kind_of(command))]


def kind_of(text: str) -> str | None:
    """The program that a text would start, if it is a command; of Python, whether it runs a script or which module."""
    try:
        words = [word for word in shlex.split(text, comments=True) if not re.match(r"[A-Z_]+=", word)]
    except ValueError:
        return None
    if len(words) < 2 or not (words[0].startswith(".venv/bin/") or words[0] in {"make", "python", "pip", "sh", "grep"}):
        return None
    name = Path(words[0]).name
    if name == "python":
        return words[2] if words[1] == "-m" else "script"
    return name


def test_every_command_is_known():
    """Each kind has a test below."""
    for command in commands():
        assert kind_of(command) in {"make", "script", "fashion_jax.data", "pip", "grep", "jupyter"} or DIGEST.fullmatch(
            command
        ), f"{command!r} needs a test"
    assert len(commands()) > 10


@pytest.mark.parametrize("command", commands("make"))
def test_make_has_the_target(command):
    words = shlex.split(command, comments=True)
    given = dict(word.split("=", 1) for word in words if "=" in word)
    (target,) = (word for word in words if word != "make" and "=" not in word)
    # Dry: what it would run, with this Python whatever the command asks for.
    options = [f"{name}={value}" for name, value in (given | {"PYTHON": sys.executable}).items()]
    result = run(ROOT, "make", "--dry-run", target, *options)
    if "ARGS" in given:
        script = re.search(r"python (examples/\w+\.py) (.*)", result.stdout)
        read_flags(script[1], shlex.split(script[2]))


@pytest.mark.parametrize("command", commands("script"))
def test_scripts_take_the_flags(command):
    _, script, *flags = shlex.split(command)
    read_flags(script, flags)


def read_flags(script: str, flags: list[str]) -> None:
    given = tyro.cli(runpy.run_path(str(ROOT / script), run_name="looked at")["Flags"], args=flags)
    assert given


@pytest.mark.parametrize("command", commands("fashion_jax.data"))
def test_the_data_set_is_described(command, capsys):
    assert data.main(shlex.split(command)[3:]) == 0
    assert "60,000 images" in capsys.readouterr().out


@pytest.mark.parametrize("command", commands("pip"))
def test_what_pip_is_told_to_install_is_declared(command):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = shlex.split(command.partition("install")[2])
    assert packages
    for package in packages:
        name, _, extra = package.rstrip("]").partition("[")
        if extra:
            assert extra in project["project"]["optional-dependencies"]
        # JupyterLab is for the reader alone: nothing here imports it.
        elif name != "jupyterlab":
            assert any(entry.startswith(name) for entry in project["dependency-groups"]["test"])


@pytest.mark.parametrize("command", commands("jupyter"))
def test_jupyter_finds_a_notebook(command):
    _, lab, folder = shlex.split(command)
    assert lab == "lab"
    assert list((ROOT / folder).glob("*.ipynb"))


@pytest.mark.parametrize("command", commands("grep"))
def test_grep_finds_lines(place, command):
    """In what the Python blocks have written."""
    assert run(place, *shlex.split(command)).stdout


DIGEST = re.compile(r"([0-9a-f]{64})  ([\w-]+)")


def test_digests_are_those_that_are_checked():
    assert {name: digest for digest, name in DIGEST.findall(TEXT)} == data.DIGESTS
