"""The package: its imports, its wheel and its types. `make wheels` installs the wheel into empty environments."""

import ast
import json
import os
import re
import shutil
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from pages import run

import fashion_jax

ROOT = Path(__file__).parents[1]
PACKAGE = Path(fashion_jax.__file__).parent
# Each module imports only what stands before it; what reads results stands before what makes them.
PLACES = """
types _checks _threefry _convolution files augment images calibration statistics evidence report plot page callbacks
loggers model networks nnx _model_checks config hyperparameters steps catalog sources data devices checkpoint train
inference interop script
"""
ORDER = PLACES.split()
# Slow to import, or not in every installation.
INSIDE_FUNCTIONS = {"PIL", "matplotlib", "onnx", "safetensors", "sklearn", "torch", "tqdm", "xarray"}
INSIDE_FUNCTIONS |= {"mlflow", "pandas", "tensorboardX", "tensorflow_datasets", "wandb"}


def imported(module: str):
    """Yield name and column of each import; `from fashion_jax import files` is one of `fashion_jax.files`."""
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module != "fashion_jax":
            yield node.module, node.col_offset
        elif isinstance(node, ast.Import | ast.ImportFrom):
            prefix = "fashion_jax." if isinstance(node, ast.ImportFrom) else ""
            yield from ((prefix + alias.name, node.col_offset) for alias in node.names)


@pytest.mark.parametrize("module", sorted({path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}))
def test_imports_run_one_way_and_heavy_packages_wait(module):
    before = ORDER[: ORDER.index(module)]
    for name, column in imported(module):
        package, _, sibling = name.partition(".")
        if package == "fashion_jax" and sibling != "__version__":
            assert sibling in before
        assert column or package not in INSIDE_FUNCTIONS
        assert package not in {"pickle", "tensorflow"}
        assert package != "tyro" or module == "script"


def test_importing_every_public_name_loads_little_and_starts_nothing():
    code = f"""
import sys
import fashion_jax
assert not {{"jax", "flax", "numpy"}} & sys.modules.keys()
from fashion_jax import *
assert {{*fashion_jax.__all__}} <= {{*dir(fashion_jax)}}
assert not hasattr(fashion_jax, "fot")
assert not {INSIDE_FUNCTIONS | {"tensorflow", "tyro"}} & sys.modules.keys()
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    run("-W", "error", "-c", code, cwd=ROOT)


def test_the_core_modules_can_be_read_in_an_evening():
    lines = {path.stem: len(path.read_text("utf-8").splitlines()) for path in PACKAGE.glob("*.py")}
    assert sum(lines[name] for name in ("types", "config", "model", "steps", "train")) <= 1_000
    assert max(lines.values()) <= 350


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel of a tree in which a user has been at work, and the Python of an environment that holds it."""
    tree, place = tmp_path_factory.mktemp("tree") / "tree", tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "runs", ".*cache*", "__pycache__"))
    for name in ("runs/saved/state", "runs/log.jsonl", ".venv/file", "fashion_jax/__pycache__/log.pyc", "notes.txt"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("a user's")
    run("-m", "build", "--outdir", place, tree, cwd=place)
    (wheel,) = place.glob("*.whl")
    venv.create(place / "venv", symlinks=True)
    python = place / "venv" / "bin" / "python"
    run("-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=place)
    # The dependencies are borrowed.
    (lib,) = place.glob("venv/lib/python*/site-packages")
    (lib / "borrowed.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return wheel, python


def test_the_wheel_holds_the_package_and_no_more(shipped):
    about = f"fashion_jax-{fashion_jax.__version__}.dist-info"
    with zipfile.ZipFile(shipped[0]) as archive:
        names = {*archive.namelist()}
    modules = {f"fashion_jax/{path.name}" for path in (ROOT / "fashion_jax").glob("*.py")}
    others = {f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    assert names == modules | others | {"fashion_jax/py.typed"}
    assert f"\nversion: {fashion_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_wheel_trains_without_the_repository(shipped, tmp_path):
    code = """
import json, jax, fashion_jax
from fashion_jax import FashionMLP, TrainConfig, fit, load, report, subset
(train, test), key, config = load(), jax.random.key(0), TrainConfig(FashionMLP((16,)))
run = fit(subset(train, 5_000, key=key), test, key=key, config=config, epochs=1, checkpoint="saved")
version = report.environment()["versions"]["fashion_jax"]
print(json.dumps([fashion_jax.__file__, version, run.history.validation.accuracy.item()]))
"""
    place, version, accuracy = json.loads(run("-I", "-c", code, cwd=tmp_path, python=shipped[1]))
    assert Path(place).is_relative_to(shipped[1].parents[1])
    assert (version, accuracy > 0.6) == (fashion_jax.__version__, True)


def test_the_public_interface_is_typed_throughout(shipped, tmp_path):
    pytest.importorskip("pyright", reason="pyright comes with `make lint`")
    # It looks for the package where an activated environment has it.
    place = shipped[1].parent
    activated = {"VIRTUAL_ENV": str(place.parent), "PATH": f"{place}:{os.environ['PATH']}"}
    told = run("-m", "pyright", "--verifytypes", "fashion_jax", "--ignoreexternal", cwd=tmp_path, **activated)
    assert "Type completeness score: 100%" in told
    assert int(re.search(r'Symbols exported by "fashion_jax": (\d+)', told)[1]) > 300
