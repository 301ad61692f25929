# make demo          train and evaluate the small experiment; ends with its figures, its report and what to try next
# make test          run the tests
# make test-all      run them all: those of test, those marked slow, those that need SLURM, and all on the cluster's stack
# make test-slurm    run those that need SLURM, on a small cluster brought up here (root on Debian or Ubuntu)
# make test-cluster  run the tests with the versions of requirements/cluster.lock, those of fairseq2 and xformers too
# make test-stack    of these, only those that may differ there: marked stack or cluster, and not once
# make lint          check style and types
# Each installs first, into .venv or .venv-cluster, once: again only when what it installs has changed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CLUSTER_VENV ?= .venv-cluster
CLUSTER_BIN := $(CLUSTER_VENV)/bin
CLUSTER_INSTALLED := $(CLUSTER_VENV)/.installed

# Files without such a test need not be imported.
STACK := -m '(stack or cluster) and not slow and not once' $(shell grep -lE 'mark\.(stack|cluster)' tests/test_*.py)

.PHONY: demo test test-all test-slurm test-cluster test-stack lint

demo: $(INSTALLED)
	$(BIN)/python -m cm3leon.run experiment=demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -m 'not slurm'
	$(BIN)/python -m pytest -m slurm tests/slurm
	$(MAKE) test-cluster TESTS="-m 'not slurm'"

test-slurm: $(INSTALLED)
	$(BIN)/python -m pytest -m slurm tests/slurm

test-cluster: $(CLUSTER_INSTALLED)
	CM3LEON_CLUSTER=1 $(CLUSTER_BIN)/python -m pytest $(TESTS)

test-stack: $(CLUSTER_INSTALLED)
	CM3LEON_CLUSTER=1 $(CLUSTER_BIN)/python -m pytest $(STACK)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[cpu,dev]'
	touch $@

$(CLUSTER_INSTALLED): requirements/cluster.lock setup.py pyproject.toml
	test -x $(CLUSTER_BIN)/python || $(PYTHON) -m venv $(CLUSTER_VENV)
	$(CLUSTER_BIN)/python -m pip install -r requirements/cluster.lock
	$(CLUSTER_BIN)/python -m pip install --no-deps --no-build-isolation -e .
	touch $@
