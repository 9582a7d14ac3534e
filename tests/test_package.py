"""What is shipped: the contents of wheel and sdist, their types, and what they depend on.

`make wheels` is the long form: it installs the wheel into empty environments.
"""

import email
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

import fashion_jax
from fashion_jax import Batch, FashionMLP, TrainConfig, fit, report

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Bytes, as packed. The records are in the sdist, because the tests of the README read them.
LARGEST_FILE, LARGEST_SDIST = 1_000_000, 3_000_000


class Built(NamedTuple):
    wheel: Path
    sdist: Path


def run(*command, **options) -> subprocess.CompletedProcess:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """Wheel and sdist of a working tree in which a user has been at work; the wheel is built from the sdist."""
    tree, out = tmp_path_factory.mktemp("tree") / "tree", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "runs", ".*cache*", "__pycache__"))
    (tree / "fashion_jax" / "__pycache__").mkdir()
    for name in ("runs/saved/state", "runs/log.jsonl", ".venv/file", "fashion_jax/__pycache__/log.pyc", "notes.txt"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("a user's")
    run(sys.executable, "-m", "build", "--outdir", out, tree)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return Built(wheel, sdist)


def test_the_wheel_holds_the_package_and_no_more(built):
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
        metadata = email.message_from_bytes(archive.read(f"fashion_jax-{fashion_jax.__version__}.dist-info/METADATA"))
    modules = {f"fashion_jax/{path.name}" for path in (ROOT / "fashion_jax").glob("*.py")}
    about = f"fashion_jax-{fashion_jax.__version__}.dist-info"
    assert names == modules | {"fashion_jax/py.typed"} | {
        f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")
    }
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_payload(decode=True).decode() == (ROOT / "README.md").read_text()


def test_the_sdist_holds_what_its_tests_need_and_nothing_large(built):
    with tarfile.open(built.sdist) as archive:
        sizes = {member.name.split("/", 1)[1]: member.size for member in archive.getmembers() if member.isfile()}
    assert built.sdist.stat().st_size < LARGEST_SDIST
    assert max(sizes.values()) < LARGEST_FILE
    tracked = run("git", "ls-files", cwd=ROOT).stdout.splitlines() if (ROOT / ".git").exists() else []
    expected = {name for name in tracked if not name.startswith(".ci/")}
    assert not expected - sizes.keys()
    assert not any(re.search(r"^runs/|__pycache__|\.venv|notes\.txt", name) for name in sizes)


def test_the_version_is_said_in_one_place(built):
    assert "version" not in PROJECT["project"]
    assert built.wheel.name == f"fashion_jax-{fashion_jax.__version__}-py3-none-any.whl"
    said = [
        path.name
        for path in ROOT.glob("fashion_jax/*.py")
        if re.search(rf"""["']{re.escape(fashion_jax.__version__)}["']""", path.read_text())
    ]
    assert said == ["__init__.py"]


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """Python of an environment that holds the wheel, and borrows what it depends on."""
    place = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built.wheel)
    paths = {name: sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (lib,) = place.glob("lib/python*/site-packages")
    (lib / "borrowed.pth").write_text("\n".join(dict.fromkeys(paths.values())) + "\n")
    return python


def test_the_wheel_trains_without_the_repository(installed, tmp_path):
    code = """
import importlib.metadata, json, pathlib, sys
import jax
import fashion_jax
from fashion_jax import data, fit, load
from fashion_jax.report import environment
train, test = load()
run = fit(data.subset(train, 5_000, key=jax.random.key(0)), test, key=jax.random.key(0), epochs=1, checkpoint="saved")
print(json.dumps({
    "file": fashion_jax.__file__,
    "version": environment()["versions"]["fashion_jax"],
    "accuracy": run.history.validation.accuracy.item(),
}))
"""
    told = json.loads(run(installed, "-I", "-c", code, cwd=tmp_path).stdout)
    assert Path(told["file"]).is_relative_to(installed.parents[1])
    assert told["version"] == fashion_jax.__version__
    assert told["accuracy"] > 0.6


RIGHT = """# pyright: strict
import jax
from fashion_jax import Run, TrainConfig, fit, load
from fashion_jax.callbacks import JsonLines

train, test = load()
log = JsonLines("log.jsonl", seed=0)
config = TrainConfig(batch_size=128)
run: Run = fit(train, test, key=jax.random.key(0), config=config, epochs=1, callbacks=[log], dropout_rate=0.2)
loss = float(run.history.validation.loss[-1])
"""


MISTAKES = {
    'fit(train, test, key=jax.random.key(0), epochs="1")': "reportArgumentType",
    "fit(train, test)": "reportCallIssue",
    "run.history.validation.losses": "reportAttributeAccessIssue",
    "config: TrainConfig = run": "reportAssignmentType",
    'fit(train, test, key=jax.random.key(0), dropout_rate="0.2")': "reportArgumentType",
}


def test_a_type_checker_knows_the_installed_package(installed, tmp_path):
    pytest.importorskip("pyright", reason="pyright comes with `make lint`")
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(RIGHT + "\n".join(MISTAKES) + "\n")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", str(installed), "right.py", "wrong.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = [
        (Path(diagnostic["file"]).name, diagnostic["range"]["start"]["line"], diagnostic["rule"])
        for diagnostic in json.loads(result.stdout)["generalDiagnostics"]
    ]
    first = RIGHT.count("\n")
    expected = [("wrong.py", first + i, rule) for i, rule in enumerate(MISTAKES.values())]
    assert set(expected) <= set(found)
    assert all(name == "wrong.py" and line >= first for name, line, _ in found), found


def test_the_public_interface_is_typed_throughout(installed, tmp_path):
    pytest.importorskip("pyright", reason="pyright comes with `make lint`")
    # It looks for the package where an activated environment has it.
    activated = {"VIRTUAL_ENV": str(installed.parents[1]), "PATH": f"{installed.parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "pyright", "--verifytypes", "fashion_jax", "--ignoreexternal"]
    result = run(*command, cwd=tmp_path, env=os.environ | activated)
    assert "Type completeness score: 100%" in result.stdout
    assert int(re.search(r'Symbols exported by "fashion_jax": (\d+)', result.stdout)[1]) > 300


def names_of(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}


def test_every_dependency_has_its_reason():
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Dependencies")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*`) \| (.+) \|$", section, re.MULTILINE)
    reasons = {name: reason for names, reason in rows for name in re.findall(r"`([^`]+)`", names)}
    declared = names_of(PROJECT["project"]["dependencies"])
    for more in (PROJECT["project"]["optional-dependencies"], PROJECT["dependency-groups"]):
        declared |= set().union(*map(names_of, more.values()))
    assert reasons.keys() == declared
    assert all(len(reason.split()) >= 3 for reason in reasons.values())


def test_no_dependency_is_unused_or_missing():
    pytest.importorskip("deptry", reason="deptry comes with `make lint`")
    run(sys.executable, "-m", "deptry", ".", cwd=ROOT)


def test_a_checkout_works_that_is_not_installed(small, tmp_path, monkeypatch):
    """As on a machine with an accelerator and no package index."""
    version = importlib.metadata.version

    def of_others(name):
        if name.startswith("fashion"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", of_others)
    assert report.environment()["versions"]["fashion_jax"] == fashion_jax.__version__
    few = Batch(*(leaf[:64] for leaf in small))
    config = TrainConfig(model=FashionMLP(hidden=(8,)))
    fit(few, few, key=jax.random.key(0), config=config, epochs=1, checkpoint=tmp_path)
