# Two commands are all that a fresh machine with Python and make needs:
#   make demo    sets everything up in .venv and runs the main job
#   make test    sets everything up in .venv and runs the whole test suite
# Every target makes the environment it needs; nothing outside .venv and, for the
# compilers of devices that are not here, .venv-devices is touched.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
COV := --cov=jaxlab

# Stamps say which extras the environment holds, for this pyproject and these pins.
SETUP := $(VENV)/.stamp-setup
BENCH := $(VENV)/.stamp-benchmarks
DOCS := $(VENV)/.stamp-docs

# What compiles for accelerators, in an environment of its own: with libtpu installed,
# JAX looks for a TPU.
DEVICES_VENV := .venv-devices
DEVICES := $(DEVICES_VENV)/.stamp-setup
DEVICES_INSTALL := $(DEVICES_VENV)/bin/python -m pip --disable-pip-version-check \
  install --quiet --constraint constraints.txt --constraint constraints-devices.txt

.PHONY: setup demo test test-typed test-untyped soak lint wheel bench devices notebooks \
  docs clean

setup: $(SETUP)

$(SETUP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (about 1.3 GB; one to four minutes) ..."
	$(INSTALL) --editable ".[all,test]"
	touch $@

# The peers that only the comparisons need: torch, matfree, traceax.
$(BENCH): $(SETUP)
	$(INSTALL) --editable ".[benchmarks]"
	touch $@

$(DOCS): $(SETUP)
	$(INSTALL) --editable ".[docs]"
	touch $@

demo: $(SETUP)
	$(BIN)/python -m benchmarks demo

test: test-typed test-untyped

# Annotations are checked in the first call. In the second they are not, so that
# wrong input reaches the messages of our own.
test-typed: $(SETUP)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not untyped and not soak" \
	  --jaxtyping-packages=jaxlab,beartype.beartype $(COV) --cov-report= --durations=30

test-untyped: $(SETUP)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "untyped and not soak" \
	  tests $(COV) --cov-append --cov-report=term:skip-covered

soak: $(SETUP)
	$(BIN)/python -m pytest -q -m soak tests

lint: $(SETUP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check

# The wheel alone, in an empty environment: floors 0 and 1 need neither flax nor tests.
wheel: $(SETUP)
	rm -rf out/wheel && mkdir -p out/wheel
	$(PIP) wheel --quiet --no-deps --wheel-dir out/wheel .
	$(PYTHON) -m venv out/wheel/venv
	out/wheel/venv/bin/python -m pip --disable-pip-version-check install --quiet \
	  --constraint constraints.txt out/wheel/*.whl
	cd out/wheel && venv/bin/python -W error ../../.ci/wheel_check.py

bench: $(BENCH)
	$(BIN)/python -m benchmarks speed monarch --preset full
	$(BIN)/python -m benchmarks speed fit_loop --preset full
	$(BIN)/python -m benchmarks speed curvature --preset full
	$(BIN)/python -m benchmarks speed sharpness --preset full
	$(BIN)/python -m benchmarks speed fishleg --preset full
	$(BIN)/python -m benchmarks claim monarch --preset full
	$(BIN)/python -m benchmarks claim monarch_language_model --preset full
	$(BIN)/python -m benchmarks claim monarch_to_dense --preset full
	$(BIN)/python -m benchmarks claim dense_to_monarch --preset full
	$(BIN)/python -m benchmarks claim hessian_spectra --preset full
	$(BIN)/python -m benchmarks claim sloppy_spectra --preset full
	$(BIN)/python -m benchmarks claim gradient_norm_penalty --preset full
	$(BIN)/python -m benchmarks claim composition --preset full
	$(BIN)/python -m benchmarks claim composition_matrix --preset full
	$(BIN)/python -m benchmarks claim fishleg --preset full
	$(BIN)/python -m benchmarks claim fishleg_curves --preset full
	$(BIN)/python -m benchmarks claim fishleg_layers --preset full
	$(BIN)/python -m benchmarks claim saf --preset full
	$(BIN)/python -m benchmarks claim pof --preset full
	$(BIN)/python -m benchmarks claim subspaces --preset full
	$(BIN)/python -m benchmarks report

# Compiles for one TPU and one GPU that need not be here; nothing is run on them. A GPU
# is compiled for without the CUDA libraries that its plugin depends on.
devices: $(DEVICES)
	$(DEVICES_VENV)/bin/python -m pytest -q -m devices tests/devices
	$(DEVICES_VENV)/bin/python -m benchmarks estimate monarch

$(DEVICES): pyproject.toml constraints.txt constraints-devices.txt
	test -x $(DEVICES_VENV)/bin/python || $(PYTHON) -m venv $(DEVICES_VENV)
	@echo "Installing into $(DEVICES_VENV) (about 1.5 GB; one to four minutes) ..."
	$(DEVICES_INSTALL) --editable ".[devices]"
	$(DEVICES_INSTALL) --no-deps jax-cuda13-plugin jax-cuda13-pjrt
	touch $@

notebooks: $(SETUP)
	$(BIN)/jupytext --quiet --to ipynb --set-kernel python3 notebooks/*.py
	$(BIN)/jupyter-execute --inplace notebooks/*.ipynb

docs: $(DOCS)
	$(BIN)/python -m sphinx -E -W --keep-going -b html docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

clean:
	rm -rf $(VENV) $(DEVICES_VENV) out .cache .pytest_cache .ruff_cache .coverage docs/_build
