# make demo   environment, build, and the main job on the built-in default
# make test   environment, build, and the test suite
# make bench  environment, build, and the CPU benchmarks (under 10 minutes on 2 cores)
# make gpu-check [DRY=1]      build, test, measure and tune on a GPU; no network, no environment of its own, 9 minutes
# make gpu-pruning            after it: thresholds, updates, pruning steps, factorisation; compute-sanitizer; 9 minutes
# make gpu-bench SLICE=i/n    a slice of the full grid on a GPU; goes on where it stopped
PYTHON  ?= python3
VENV    ?= .venv
TORCH   ?= torch==2.13.0
EDITABLE ?= -e
BIN     := $(VENV)/bin

.PHONY: env demo demo-quick test test-all lint format bench gpu-check gpu-pruning gpu-bench clean

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

# More of pytest's and the benchmarks' options, such as BENCH="--only 768x3072".
BENCH ?=

bench: env
	$(BIN)/python -m pytest benchmarks/bench_linear.py -q --benchmark-quiet --benchmark-disable-gc $(BENCH)

# These run in $(PYTHON) as it is: a machine with a GPU may have no network.
gpu-check:
	$(PYTHON) -m benchmarks gpu-check $(if $(DRY),--dry)

gpu-pruning:
	$(PYTHON) -m benchmarks gpu-pruning

SLICE     ?= 1/1
PROVIDERS ?= default
gpu-bench:
	$(PYTHON) -m benchmarks run --device cuda --cases full --slice $(SLICE) --providers $(PROVIDERS) --resume --budget 500

clean:
	rm -rf $(VENV) build dist *.egg-info runs lpaf_kernels/*.so
