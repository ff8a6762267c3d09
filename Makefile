# make demo | make test | make check | make docs: each creates the environment if there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
SOURCES := planner models distributed reports cli

.PHONY: demo test check format docs clean

demo: $(VENV)/.demo
	PATH="$(abspath $(BIN)):$$PATH" sh examples/demo.sh

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PATH="$(abspath $(BIN)):$$PATH" sh scripts/check_types.sh

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.dev
	$(BIN)/python scripts/api_reference.py

$(VENV)/.demo: pyproject.toml constraints.txt scripts/check_system.sh
	sh scripts/check_system.sh $(PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable '.[train,report]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP_INSTALL) --editable '.[train,report,dev]'
	touch $@

clean:
	rm -rf $(VENV) build demo *.egg-info
