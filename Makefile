# Each target makes or reuses .venv by itself; it installs again only when pyproject.toml or constraints.txt changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCS := .venv-docs
DOCS_INSTALLED := $(DOCS)/.installed
# One thread per test process: two of them on two cores are faster than one with two.
TEST_ENV := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test slow lint types docs bench clean

help: ## what can be made
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## (.*)/\1\t\2/' | expand -t 10

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "backpass needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(DOCS_INSTALLED): pyproject.toml
	@test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet 'mkdocs-material>=9.5' 'mkdocstrings[python]>=0.27' 'latex2mathml>=3.77'
	@touch $@

demo: $(INSTALLED) ## train and attack with another backward pass, on real data; writes runs/demo
	$(BIN)/backpass demo

test: $(INSTALLED) ## the test suite
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 -m "not slow and not cuda"

slow: $(INSTALLED) ## the longer tests
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 -m "slow and not cuda"

lint: $(INSTALLED) ## style of the code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## static types
	$(BIN)/mypy

docs: $(DOCS_INSTALLED) ## the documentation as a site in site/
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict

bench: $(INSTALLED) ## side-by-side timings, as ratios; writes docs/benchmarks
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run.py --out docs/benchmarks

clean: ## remove what was made
	rm -rf $(VENV) $(DOCS) site runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
