# make demo   train and evaluate the small experiment, then name its report
# make test   run the tests
# make lint   check style and types
# All three install into .venv first, once: again only when setup.py or pyproject.toml has changed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint

demo: $(INSTALLED)
	$(BIN)/python -m cm3leon.run experiment=digits
	@echo runs/digits/report.html

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[cpu,dev]'
	touch $@
