# Each target makes the environment that it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
.DELETE_ON_ERROR:
.PHONY: demo test check lint types unit golden clean

demo: $(VENV)/.run
	$(BIN)/dcompile demo

test: $(VENV)/.test lint types unit

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/ratchet.py

types: $(VENV)/.test
	$(BIN)/mypy

unit: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

golden: $(VENV)/.test
	DCOMPILE_ACCEPT_GOLDEN=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/whole/test_walkthrough.py tests/whole/test_combinations.py::test_the_document_is_current

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first: with it installed, nothing else asks for another build of it.
$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[compile]'
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
