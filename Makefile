# make demo          train and evaluate the small experiment; ends with its figures, its report and what to try next
# make test          run the tests
# make test-all      run them all: those of test, those marked slow, those that need SLURM, those of the page, and all on
#                    the cluster's stack
# make test-slurm    run those that need SLURM, on a small cluster brought up here (root on Debian or Ubuntu)
# make test-cluster  run the tests with the versions of requirements/cluster.lock, those of fairseq2 and xformers too
# make test-stack    of these, only those that may differ there: marked stack or cluster, and not once
# make test-page     run those of the page, of Trackio and of lmms-eval, which need older versions of some packages
# make lint          check style and types
# Each installs first, into .venv, .venv-cluster or .venv-page, once: again only when what it installs has changed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CLUSTER_VENV ?= .venv-cluster
CLUSTER_BIN := $(CLUSTER_VENV)/bin
CLUSTER_INSTALLED := $(CLUSTER_VENV)/.installed
PAGE_VENV ?= .venv-page
PAGE_BIN := $(PAGE_VENV)/bin
PAGE_INSTALLED := $(PAGE_VENV)/.installed
PAGE_EXTRAS ?= demo,trackio,lmms
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

# Files without such a test need not be imported.
STACK := -m '(stack or cluster) and not slow and not once' $(shell grep -lE 'mark\.(stack|cluster)' tests/test_*.py)

# The page's tests and those that other files skip without these extras; in a browser if there is a chromium.
PAGE := -k 'test_page or test_lmms or trackio or no_secret' tests/test_page.py tests/test_lmms_eval.py tests/test_loggers.py

.PHONY: demo test test-all test-slurm test-page test-cluster test-stack lint

demo: $(INSTALLED)
	$(BIN)/python -m cm3leon.run experiment=demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -m 'not slurm'
	$(BIN)/python -m pytest -m slurm tests/slurm
	$(MAKE) test-page
	$(MAKE) test-cluster TESTS="-m 'not slurm'"

test-slurm: $(INSTALLED)
	$(BIN)/python -m pytest -m slurm tests/slurm

test-page: $(PAGE_INSTALLED)
	$(PAGE_BIN)/python -m pytest $(PAGE)

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

# The page and Trackio hold Pillow below 13, and lmms-eval other packages; all else is to pass with the newest ones. So
# these have an environment of their own, which finds in the first one what it lacks.
$(PAGE_INSTALLED): $(INSTALLED)
	test -x $(PAGE_BIN)/python || $(BIN)/python -m venv --without-pip $(PAGE_VENV)
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" > "$$($(PAGE_BIN)/python $(PURELIB))/first.pth"
	$(PAGE_BIN)/python -m pip install 'cm3leon[$(PAGE_EXTRAS)]' playwright
	touch $@

$(CLUSTER_INSTALLED): requirements/cluster.lock setup.py pyproject.toml
	test -x $(CLUSTER_BIN)/python || $(PYTHON) -m venv $(CLUSTER_VENV)
	$(CLUSTER_BIN)/python -m pip install -r requirements/cluster.lock
	$(CLUSTER_BIN)/python -m pip install --no-deps --no-build-isolation -e .
	touch $@
