# make setup && make quickstart. Needs Python 3.11, a C++ compiler and a package index.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
EXTRAS := dev,video,server,diffusion,cuda,deepspeed,track,ray,smolvlm,math

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-gpu bench bench-gpu check format clean

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed  ## Install everything into .venv, in the versions of constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[$(EXTRAS)]' -c constraints.txt
	touch $@

quickstart: setup  ## Train, align and evaluate a small model here, from nothing
	$(BIN)/mmalign quickstart

test: setup  ## Run the tests that need no GPU
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not gpu" -n 2 --dist loadfile

test-gpu: setup  ## Run the tests that need CUDA
	$(BIN)/pytest -m gpu

bench: setup  ## Measure speed on the CPU: the tables of docs/benchmarks.md
	$(BIN)/python scripts/bench/pairs.py --work short --rounds 3
	$(BIN)/python scripts/bench/pairs.py --work long --rounds 2 --steps 4
	$(BIN)/python scripts/bench/pairs.py --work rdpo --rounds 3
	$(BIN)/python scripts/bench/pairs.py --work lora --rounds 3
	$(BIN)/python scripts/bench/pairs.py --work ranking --rounds 3 --batch 2
	$(BIN)/python scripts/bench/steps.py layouts --rounds 3
	$(BIN)/python scripts/bench/steps.py many --rounds 5
	$(BIN)/python scripts/bench/steps.py floor --rounds 5
	$(BIN)/python scripts/bench/rollouts.py update --rounds 3
	$(BIN)/python scripts/bench/rollouts.py whole --rounds 3
	$(BIN)/python scripts/bench/builders.py --rounds 3
	$(BIN)/python scripts/bench/evaluation.py --rounds 3
	$(BIN)/python scripts/bench/evaluation.py --rounds 3 --new-tokens 2
	$(BIN)/python scripts/bench/images.py costs
	$(BIN)/python scripts/bench/images.py cached --train lora --precision bf16 --checkpointing
	$(BIN)/python scripts/bench/images.py cached --train lora --precision bf16
	$(BIN)/python scripts/bench/images.py cached --train full --precision bf16
	$(BIN)/python scripts/bench/images.py cached --train full
	$(BIN)/python scripts/bench/images.py losses --train full
	$(BIN)/python scripts/bench/images.py losses --train lora

bench-gpu: setup  ## Measure speed on CUDA
	$(BIN)/python scripts/bench/gpu.py
	$(BIN)/python scripts/bench/gpu_images.py

check: setup  ## Check format, lint, types and the import law
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: setup  ## Format the code and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Delete caches and the virtual environment; runs/ and data/ stay
	rm -rf $(VENV) *.egg-info build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
