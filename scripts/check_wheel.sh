#!/bin/sh
# Does the wheel work where nothing else is? Builds it, and with each PYTHON makes an empty environment, installs the
# wheel and what it declares, imports every module and trains an epoch on the real data, away from the repository.
# Usage: check_wheel.sh BUILDER [PYTHON...]. BUILDER is a Python with the package `build`; a PYTHON that does not start is
# left out. Needs a package index, the data set, and minutes for each PYTHON.
set -eu
cd "$(dirname "$0")/.."
builder=$1
shift

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM
"$builder" -m build --outdir "$work/dist" . >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }

mkdir "$work/elsewhere"
cat >"$work/check.py" <<'PYTHON'
import importlib, pathlib, pkgutil, platform, sys
import jax
import fashion_jax
from fashion_jax import fit, interop, load, plot

assert pathlib.Path(fashion_jax.__file__).is_relative_to(sys.prefix), fashion_jax.__file__
modules = [module.name for module in pkgutil.iter_modules(fashion_jax.__path__)]
for module in modules:
    importlib.import_module(f"fashion_jax.{module}")
train, test = load()
run = fit(train, test, key=jax.random.key(0), dropout_rate=0.2, epochs=1, checkpoint="saved")
accuracy = run.history.validation.accuracy[-1]
assert accuracy > 0.8, accuracy
interop.save_safetensors("network.safetensors", run.state.params)
plot.save(plot.losses({"dropout 0.2": run.history}), "losses.png")
print(
    f"Python {platform.python_version()}, jax {jax.__version__}: {len(modules)} modules, "
    f"accuracy {accuracy:.4f} after an epoch"
)
PYTHON

checked=0
for python in "$@"; do
    if ! "$python" -c '' 2>/dev/null; then
        echo "$python does not start here; left out" >&2
        continue
    fi
    "$python" -m venv --clear "$work/venv"
    # What the caller's environment adds would not be there for a user.
    unset PYTHONPATH PYTHONHOME
    "$work/venv/bin/python" -m pip --quiet --disable-pip-version-check install "$work"/dist/*.whl
    "$work/venv/bin/python" -m pip --quiet --disable-pip-version-check check
    (cd "$work/elsewhere" && "$work/venv/bin/python" -I "$work/check.py")
    rm -rf "$work"/elsewhere/*
    checked=$((checked + 1))
done
if [ "$checked" = 0 ]; then
    echo "error: none of these starts here: $*; name a Python" >&2
    exit 1
fi
