# Everything needs Python 3.11 or later and nothing else; PYTHON=python3.13 make test takes another one.
PYTHON ?= python3
# What `make wheels` tries; those that are not on this machine are left out.
PYTHONS ?= python3.11 python3.12 python3.13
VENV := .venv
BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print(".".join(map(str, sys.version_info[:2])))')
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALL := $(PIP) install --constraint constraints.txt
# pip compiles what it has installed on one core. Where that is much, Python itself does it sooner, on all of them; a file
# that does not compile is one for another Python.
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
# Each stamp tells that the environment holds what its name says, for this version of Python.
INSTALLED := $(VENV)/installed-$(VERSION)
TEST := $(VENV)/test-$(VERSION)
LINT := $(VENV)/lint-$(VERSION)

BENCH := $(VENV)/bench-$(VERSION)
DOCS := $(VENV)/docs-$(VERSION)

.PHONY: compare test bench docs check format lint types wheels data notebook constraints clean

compare: $(INSTALLED) data
	$(BIN)/python examples/compare_overfit.py $(ARGS)

data: $(INSTALLED)
	sh scripts/get_data.sh $(BIN)/python >/dev/null

# Threads of PyTorch and NumPy spin while they wait for each other: beside another worker, longer than they work.
test: export OMP_NUM_THREADS := 1
test: $(TEST) data
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

bench: $(BENCH) data
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(DOCS)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs
	@echo build/docs/index.html

# Runs the tutorial's script, which takes a few minutes, and stores what each cell shows.
notebook: $(TEST) data
	$(BIN)/python scripts/make_notebook.py

check: format lint types test

format: $(LINT)
	$(BIN)/ruff format --check .

# deptry asks the installed packages which modules are theirs.
lint: $(LINT) $(TEST)
	$(BIN)/ruff check .
	$(BIN)/deptry .

types: $(LINT) $(TEST)
	$(BIN)/pyright

# The wheel in empty environments: takes minutes and a package index.
wheels: $(TEST) data
	sh scripts/check_wheel.sh $(BIN)/python $(PYTHONS)

# Renews the pins: the newest versions that fit, for every supported Python.
constraints: $(INSTALLED)
	$(PIP) install uv
	$(BIN)/uv pip compile --universal --python-version 3.11 --upgrade --no-annotate --no-header \
		--group test --group lint --group bench --group docs pyproject.toml --output-file constraints.txt

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --upgrade 'pip>=25.1'
	$(INSTALL) --no-compile --editable .
	$(COMPILE)
	touch $@

# The tests build the documentation too.
$(TEST): $(INSTALLED)
	$(INSTALL) --no-compile --group test --group docs
	$(COMPILE)
	touch $@

$(BENCH): $(INSTALLED)
	$(INSTALL) --no-compile --group bench
	$(COMPILE)
	touch $@

$(DOCS): $(INSTALLED)
	$(INSTALL) --group docs
	touch $@

$(LINT): $(INSTALLED)
	$(INSTALL) --group lint
	touch $@
