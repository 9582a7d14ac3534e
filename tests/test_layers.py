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
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.col_offset) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = (
                [f"fashion_jax.{alias.name}" for alias in node.names] if node.module == "fashion_jax" else [node.module]
            )
            yield from ((name, node.col_offset) for name in names)


def test_every_module_has_its_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*ORDER, "__init__"}


@pytest.mark.parametrize("module", ORDER)
def test_imports_run_one_way_and_heavy_packages_wait(module):
    for name, column in imported(module):
        package, _, sibling = name.partition(".")
        if package == "fashion_jax" and sibling != "__version__":
            assert sibling in ORDER[: ORDER.index(module)]
        assert column or package not in INSIDE_FUNCTIONS
        assert package not in {"pickle", "tensorflow"}
        assert package != "tyro" or module == "script"


def test_importing_the_package_loads_little_and_starts_nothing():
    code = f"""
import sys
import fashion_jax
assert not {{"jax", "flax", "numpy"}} & sys.modules.keys()
from fashion_jax import fit, load
heavy = {INSIDE_FUNCTIONS | {"tensorflow", "tyro"}} & sys.modules.keys()
assert not heavy, heavy
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_every_public_name_is_there():
    for name in fashion_jax.__all__:
        assert getattr(fashion_jax, name) is not None
        assert name in dir(fashion_jax)
    with pytest.raises(AttributeError, match="no attribute 'fot'"):
        fashion_jax.fot  # noqa: B018


def test_the_core_modules_can_be_read_in_an_evening():
    lines = {path.stem: len(path.read_text("utf-8").splitlines()) for path in PACKAGE.glob("*.py")}
    assert sum(lines[name] for name in ("types", "config", "model", "steps", "train")) <= 1_000
    assert max(lines.values()) <= 350
