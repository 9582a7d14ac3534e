"""The package's shape: who may import whom, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fashion_jax

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
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_the_core_modules_can_be_read_in_an_evening():
    lines = {path.stem: len(path.read_text("utf-8").splitlines()) for path in PACKAGE.glob("*.py")}
    assert sum(lines[name] for name in ("types", "config", "model", "steps", "train")) <= 1_000
    assert max(lines.values()) <= 350
