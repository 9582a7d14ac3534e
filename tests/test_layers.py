"""The package's shape: who may import whom, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fashion_jax

PACKAGE = Path(fashion_jax.__file__).parent
ALLOWED = {
    "__init__": {"config", "data", "evidence", "model", "predict", "sweep", "train"},
    "augment": {"config"},
    "calibration": {"config"},
    "checkpoint": {"files"},
    "config": set(),
    "data": {"files"},
    "evidence": {"train"},
    "files": set(),
    "interop": {"config", "data", "files", "model", "predict"},
    "log": {"config", "files", "train"},
    "model": {"config", "threefry"},
    "optimiser": {"config"},
    "plot": {"calibration", "data", "evidence", "files", "train"},
    "predict": {"config", "data", "model"},
    "report": {"config", "evidence", "train"},
    "script": set(),
    "search": {"checkpoint", "config", "data", "model", "signals", "sweep", "train"},
    "signals": set(),
    "sweep": {"checkpoint", "config", "data", "model", "signals", "threefry", "train"},
    "threefry": set(),
    "train": {"augment", "checkpoint", "config", "data", "model", "optimiser", "signals", "threefry"},
}
# A type lives with the function that makes it; these modules read results and train nothing.
TYPES_ONLY = {"evidence": {"History"}, "log": {"EpochEnd"}, "plot": {"History"}, "report": {"History", "Metrics"}}
ONLY_IN = {
    "flax": "model",
    "matplotlib": "plot",
    "orbax": "checkpoint",
    "onnx": "interop",
    "safetensors": "interop",
    "sklearn": "calibration",
    "tensorflow_datasets": "data",
    "torch": "interop",
    "tqdm": "log",
}
# Imported where they are used: they are slow to import, or not every installation has them.
INSIDE_FUNCTIONS = {"PIL", "onnx", "orbax", "sklearn", "tensorflow_datasets", "torch"}


def imports(module: str):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, set(), node.col_offset) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            yield node.module, {alias.name for alias in node.names}, node.col_offset


def test_every_module_has_its_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} == ALLOWED.keys()


@pytest.mark.parametrize("module", ALLOWED)
def test_imports_go_one_way(module):
    for name, names, _ in imports(module):
        # The version is no room's.
        if name.startswith("fashion_jax") and names != {"__version__"}:
            sibling = name.removeprefix("fashion_jax").lstrip(".")
            assert sibling in ALLOWED[module]
            if sibling == "train" and module in TYPES_ONLY:
                assert names <= TYPES_ONLY[module]


@pytest.mark.parametrize("module", ALLOWED)
def test_heavy_packages_have_one_room(module):
    for name, _, column in imports(module):
        package = name.split(".")[0]
        assert ONLY_IN.get(package, module) == module
        assert package not in {"pickle", "tyro", "tensorflow"}
        if package in INSIDE_FUNCTIONS:
            assert column > 0, f"{package} is imported where it is used"


def test_importing_the_package_loads_little_and_starts_nothing():
    code = """
import sys
import fashion_jax
assert not {"jax", "flax", "numpy"} & sys.modules.keys()
from fashion_jax import fit, load
heavy = {"tensorflow_datasets", "tensorflow", "matplotlib", "PIL", "sklearn", "torch", "tyro"} & sys.modules.keys()
assert not heavy, heavy
from jax.extend import backend
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_every_public_name_is_there():
    assert sorted(fashion_jax.__all__) == sorted(name for names in fashion_jax._ROOMS.values() for name in names)
    for name in fashion_jax.__all__:
        assert getattr(fashion_jax, name) is not None
        assert name in dir(fashion_jax)
    with pytest.raises(AttributeError, match="no attribute 'fot'"):
        fashion_jax.fot  # noqa: B018
