# make demo   train and evaluate the small experiment, then name its report
# make test   run the tests
# make test-slurm   run those that need SLURM, on a small cluster brought up here (root on Debian or Ubuntu)
# make lint   check style and types
# All of them install into .venv first, once: again only when setup.py or pyproject.toml has changed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slurm lint

demo: $(INSTALLED)
	$(BIN)/python -m cm3leon.run experiment=digits
	@echo runs/digits/report.html

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-slurm: $(INSTALLED)
	$(BIN)/python -m pytest -m slurm

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[cpu,dev]'
	touch $@
