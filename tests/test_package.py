"""The package as shipped: the contents of the wheel, and its types.

`make wheels` is the long form: it installs the wheel into empty environments.
"""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import fashion_jax

ROOT = Path(__file__).parents[1]


def run(*command, **options) -> subprocess.CompletedProcess:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a working tree in which a user has been at work; it is built from the sdist."""
    tree, out = tmp_path_factory.mktemp("tree") / "tree", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "runs", ".*cache*", "__pycache__"))
    (tree / "fashion_jax" / "__pycache__").mkdir()
    for name in ("runs/saved/state", "runs/log.jsonl", ".venv/file", "fashion_jax/__pycache__/log.pyc", "notes.txt"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("a user's")
    run(sys.executable, "-m", "build", "--outdir", out, tree)
    (wheel,) = out.glob("*.whl")
    return wheel


def test_the_wheel_holds_the_package_and_no_more(wheel):
    about = f"fashion_jax-{fashion_jax.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = email.message_from_bytes(archive.read(f"{about}/METADATA"))
    modules = {f"fashion_jax/{path.name}" for path in (ROOT / "fashion_jax").glob("*.py")}
    others = {f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    assert names == modules | others | {"fashion_jax/py.typed"}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload(decode=True).decode() == (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Python of an environment that holds the wheel, and borrows its dependencies."""
    place = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
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


def test_the_public_interface_is_typed_throughout(installed, tmp_path):
    pytest.importorskip("pyright", reason="pyright comes with `make lint`")
    # It looks for the package where an activated environment has it.
    activated = {"VIRTUAL_ENV": str(installed.parents[1]), "PATH": f"{installed.parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "pyright", "--verifytypes", "fashion_jax", "--ignoreexternal"]
    result = run(*command, cwd=tmp_path, env=os.environ | activated)
    assert "Type completeness score: 100%" in result.stdout
    assert int(re.search(r'Symbols exported by "fashion_jax": (\d+)', result.stdout)[1]) > 300
