# `make demo`, `make test`, `make docs` and `make bench-quick` each make the virtual environment that they need when there
# is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
# pip compiles on one core, and all that the packages hold. What is left out here is compiled if it is imported; some
# packages hold templates that are no valid Python.
COMPILE := $(BIN)/python -W ignore -m compileall -qq -j 0 -x '/(tests|models)/' $(VENV)/lib || true

.PHONY: demo test bench-quick docs lint typecheck clean

demo: $(VENV)/.bench
	$(BIN)/python -m benchmarks demo

test: $(VENV)/.test lint typecheck
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2

bench-quick: $(VENV)/.bench
	for suite in vision language segmentation; do $(BIN)/python -m benchmarks $$suite --quick || exit 1; done

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/.test
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone: a resolver that meets it as somebody's dependency may pick a build of several gigabytes.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) torch
	touch $@

$(VENV)/.bench: pyproject.toml $(VENV)/.torch
	$(PIP) --editable '.[bench]'
	$(COMPILE)
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.torch
	$(PIP) --editable '.[test]'
	$(COMPILE)
	touch $@

clean:
	rm -rf $(VENV) results site build dist *.egg-info
