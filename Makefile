# make run    a virtual environment, an installation, and the quickstart (no data, no download at run time)
# make test   the same environment, and the tests
# make check  ruff and mypy
# make docs   the documentation, in build/site; every warning is an error (Python 3.11 or newer)

VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: run test check docs clean

run: $(VENV)/.installed
	$(BIN)/python -m fedsim run

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fedsim algorithms envs

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python setup.py constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
