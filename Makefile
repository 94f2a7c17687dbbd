# `make help` lists the targets. Everything happens in .venv (test-newest: .venv-newest); nothing else on the machine changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
CASES ?= 1000000
SEED ?= 0
MINUTES ?= 60
CONSTRAINTS := constraints.txt
# What most changes touch, in seconds: imports, tokens, alignment, W, losses against the official values, data, config.
CORE := tests/test_architecture.py tests/test_dependencies.py tests/run/test_experiment.py tests/tokens tests/alignment/test_alignment.py \
  tests/alignment/test_prompts.py tests/projection/test_build.py tests/losses/test_golden.py \
  tests/data/test_records.py tests/data/test_sources.py
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help quickstart tokenizers test test-newest test-parity fuzz check lint format docs docs-serve tour bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "xtoken-jax needs Python 3.11 or newer; name one: make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras; a change of the dependencies installs again.
$(VENV)/installed-%: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "installing xtoken-jax [$*] into $(VENV), a minute or two ..."
	$(PIP) --editable ".[$*]"
	@touch $@

$(VENV)/installed: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "installing xtoken-jax into $(VENV), a minute or two ..."
	$(PIP) --editable .
	@touch $@

quickstart: $(VENV)/installed ## distil a small student across tokenizers, about 3 minutes on 2 cores
	$(BIN)/xtoken distill experiment=quickstart

tokenizers: $(VENV)/installed ## fetch ten real tokenizers into the user's cache, 250 MB of downloads, once
	$(BIN)/python experiments/tokenizers/fetch.py

test: $(VENV)/installed-test ## the tests, on 8 virtual CPU devices, in WORKERS=2 processes; on real tokenizers if they are there
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

test-newest: ## the tests with the newest jax: make test-newest PYTHON=python3.13
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' \
	  || { echo "the newest jax needs Python 3.12 or newer; name one: make test-newest PYTHON=python3.13"; exit 2; }
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=constraints-newest.txt

test-parity: $(VENV)/installed-parity ## the checks against transformers on torch
	$(BIN)/python -m pytest -m parity

lint: $(VENV)/installed-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(VENV)/installed-test ## spoiled files to every reader, for MINUTES=60 or CASES of each; SEED=0
	$(BIN)/python tests/fuzz/run.py --cases $(CASES) --seed $(SEED) --minutes $(MINUTES)

check: lint ## lint and a core of the tests, within 90 seconds on 2 cores
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(CORE)

format: $(VENV)/installed-dev ## rewrite the code in ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed-docs ## the documentation as a site in build/site; fails on a broken link
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(VENV)/installed-docs ## the documentation at http://127.0.0.1:8000, rebuilt when a page changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

tour: $(VENV)/installed-docs ## run the notebook docs/tour.ipynb, about a minute on 2 cores
	JAX_PLATFORMS=cpu $(BIN)/jupyter execute docs/tour.ipynb

bench: $(VENV)/installed ## compiled memory and relative speed: losses, and on fetched tokenizers alignment and W
	$(BIN)/python experiments/benchmarks/losses.py
	$(BIN)/python experiments/benchmarks/alignment.py
	$(BIN)/python experiments/benchmarks/projection.py

clean: ## delete .venv and caches, keep runs
	rm -rf $(VENV) .venv-newest .pytest_cache .ruff_cache .mypy_cache
