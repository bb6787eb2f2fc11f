# Everything runs in .venv, made on first use and again when pyproject.toml or constraints.txt change.
# Needs python3 >= 3.11 with pip, git and make. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXTRAS := adapters,gguf,graph,genai,docs,test,dev

.PHONY: help docs demo test lint fmt types quick house wheel clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    compile a real language model and compare it with the dense one"
	@echo "make test    ruff, mypy, then the test suite"
	@echo "make lint    ruff, mypy and rooms only"
	@echo "make fmt     mend what ruff can mend: order of imports and the like"
	@echo "make types   mypy only"
	@echo "make quick   the tests of the core without the slow ones: a minute or two"
	@echo "make house   rooms: who may import whom, and no circle of imports"
	@echo "make docs    the documentation as a site in build/site"
	@echo "make wheel   a wheel in dist/"
	@echo "make clean   remove .venv, builds and caches"

demo: $(STAMP)
	@$(BIN)/python -m spacompiler.cli.demo

test: lint
	@echo "==> pytest"
	@$(BIN)/python -m pytest -n 2 --dist loadgroup -q

lint: $(STAMP)
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@echo "==> mypy"
	@$(BIN)/mypy -p spacompiler
	@echo "==> rooms"
	@$(BIN)/lint-imports --no-logo

fmt: $(STAMP)
	@$(BIN)/ruff check --fix .

types: $(STAMP)
	@$(BIN)/mypy -p spacompiler

# What the axes, the rows, the groups, the plan and the options do: no network is trained or exported.
QUICK := $(addprefix tests/,axes graph rows groups request stages store)

quick: $(STAMP)
	@$(BIN)/python -m pytest -n 2 --dist loadgroup -q -m "not slow" $(QUICK)

house: $(STAMP)
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python -m pytest -q tests/test_house.py

# Not --quiet: mkdocs then counts no warnings, and strict says nothing.
docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

wheel: $(STAMP)
	@$(BIN)/python -m build --wheel

# Some systems ship python3 and pip without ensurepip: there the second line makes the environment.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "spacompiler needs Python >= 3.11, but $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	       "name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "==> installing spacompiler and its dependencies into $(VENV) (once, some minutes: torch is large)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python install -qq --disable-pip-version-check pip; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
