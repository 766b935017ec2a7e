# make demo   environment, build, and the main job on the built-in default
# make test   environment, build, and the test suite
PYTHON  ?= python3
VENV    ?= .venv
TORCH   ?= torch==2.13.0
EDITABLE ?= -e
BIN     := $(VENV)/bin

.PHONY: env demo demo-quick test test-all lint format clean

# Installed anew when what it is built from changes.
$(VENV)/installed: pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(EDITABLE) ".[demo,dev]"
	touch $@

env: $(VENV)/installed

demo: env
	$(BIN)/lpaf demo

demo-quick: env
	$(BIN)/lpaf demo --quick --output runs/demo-quick

# One test file per core at a time, one thread each: two threads in each of two processes would only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

test: env
	$(PYTEST)

test-all: env
	$(PYTEST) -m "slow or not slow"

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

clean:
	rm -rf $(VENV) build dist *.egg-info runs lpaf_kernels/*.so
