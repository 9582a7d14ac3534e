"""What README and documentation say is what the records say; what they point at is there, and commands run."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tyro
from PIL import Image

from benchmarks import tables
from fashion_jax import CLASS_NAMES, data, report

ROOT = tables.ROOT
TEXTS = {document: document.read_text() for document in tables.DOCUMENTS}
TEXT = TEXTS[ROOT / "README.md"]
each_document = pytest.mark.parametrize("document", TEXTS, ids=lambda document: document.name)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_every_table_is_somewhere():
    assert {name for text in TEXTS.values() for _, name, _, _ in tables.BLOCK.findall(text)} == tables.TABLES.keys()


@each_document
def test_tables_are_those_of_the_records(document):
    assert tables.fill(TEXTS[document]) == TEXTS[document]


def test_a_missing_record_is_named():
    assert json.loads(tables.newest("kernels.json", "H200"))["environment"]["devices"] == ["NVIDIA H200"]
    with pytest.raises(FileNotFoundError, match=r"no record of nvidia-h200 in .*records has nothing\.json; run the"):
        tables.newest("nothing.json", "H200")
    with pytest.raises(FileNotFoundError, match=r"no record in .*records has nothing\.json; run the"):
        tables.newest("nothing.json")


INTERVAL = re.compile(r"[+-]?\d\.\d+ \[[+-]?\d\.\d+, [+-]?\d\.\d+\]")


@each_document
def test_intervals_in_the_text_are_in_a_report(document):
    """Such as +0.0510 [+0.0425, +0.0595]."""
    prose = re.sub(r"^ *```.*?^ *```$", "", tables.BLOCK.sub("", TEXTS[document]), flags=re.MULTILINE | re.DOTALL)
    reports = "".join(path.read_text() for path in tables.RECORDS.rglob("report.md"))
    for interval in INTERVAL.findall(prose):
        assert interval in reports


def test_the_list_of_faults_names_tests():
    """`::test` is of the file named before it in the row."""
    for row in (ROOT / "tests" / "README.md").read_text().splitlines():
        before = "no file"
        for file, same, name in re.findall(r"`(test_\w+\.py)?(::)?(test_\w+)`", row):
            before = file or before
            of = ROOT / "tests" / (before if file or same else "test_faults.py")
            assert f"def {name}(" in of.read_text(), row


def test_records_hold_no_places():
    for path in tables.RECORDS.rglob("*.json"):
        assert not set(report.PLACES) & json.loads(path.read_text())["flags"].keys(), path


def test_there_are_intervals_in_the_text():
    assert len(INTERVAL.findall(tables.BLOCK.sub("", TEXT))) > 5


@each_document
def test_files_that_it_names_are_there(document):
    # Those to the reference are Sphinx's.
    links = re.findall(r"\]\((?!fashion_jax\.)([^):#]+)(?:#[\w-]*)?\)", TEXTS[document])
    named = re.findall(r"`((?:benchmarks|docs|examples|tests|scripts|fashion_jax)/[\w./-]+)`", TEXTS[document])
    for place in [*(document.parent / link for link in links), *(ROOT / name for name in named)]:
        assert place.exists(), place


def test_it_names_files():
    assert len(re.findall(r"\]\((?:docs|benchmarks)/", TEXT)) > 5


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
    Block(
        "use_all_cores()",
        {"range(8)": "range(2)", "(0.0, 0.2))": "(0.0, 0.2), epochs=1)"},
        """
assert verdict.interval.n == 2
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


# Commands: those that stand alone, indented by four spaces, and those in the text.


def commands(kind: str | None = None) -> list[str]:
    prose = FENCED.sub("", "\n".join(TEXTS.values()))
    alone = [line.strip() for line in prose.splitlines() if line.startswith("    ")]
    found = [*alone, *(span for span in re.findall(r"`([^`\n]+)`", prose) if kind_of(span))]
    return [command for command in dict.fromkeys(found) if kind in (None, kind_of(command))]


def kind_of(text: str) -> str | None:
    """The program that a text would start, if it is a command; of Python, whether it runs a script or which module."""
    try:
        words = [word for word in shlex.split(text, comments=True) if not re.match(r"[A-Z_]+=", word)]
    except ValueError:
        return None
    if len(words) < 2 or not (words[0].startswith(".venv/bin/") or words[0] in {"make", "python", "pip", "sh"}):
        return None
    name = Path(words[0]).name
    if name == "python":
        return words[2] if words[1] == "-m" else "script"
    return name


def test_every_command_is_known():
    """Each kind has a test below."""
    for command in commands():
        assert kind_of(command) in {"make", "script", "fashion_jax.data", "pip", "jupyter"} or DIGEST.fullmatch(
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
    words = iter(shlex.split(command.partition("install")[2]))
    for word in words:
        name, _, extra = word.rstrip("]").partition("[")
        if word == "--constraint":
            assert (ROOT / next(words)).exists()
        elif name in {".", project["project"]["name"]}:
            assert not extra or extra in project["project"]["optional-dependencies"]
        # JupyterLab is for the reader alone: nothing here imports it.
        elif name not in {"--editable", "jupyterlab"}:
            assert any(entry.startswith(name) for entry in project["dependency-groups"]["test"])


@pytest.mark.parametrize("command", commands("jupyter"))
def test_jupyter_finds_a_notebook(command):
    _, lab, folder = shlex.split(command)
    assert lab == "lab"
    assert list((ROOT / folder).glob("*.ipynb"))


DIGEST = re.compile(r"([0-9a-f]{64})  ([\w-]+)")


def test_digests_are_those_that_are_checked():
    assert {name: digest for digest, name in DIGEST.findall(TEXT)} == data.DIGESTS
