# Each target sets up .venv by itself: `make serve` and `make test` work on a machine with Python >= 3.11, make and g++.
#   PYTHON=python3.12   choose the interpreter        PIP_FLAGS=--no-index   extra options for pip
VENV := .venv
BIN := $(VENV)/bin
SETUP := bash scripts/setup_venv.sh $(VENV)
MODEL ?= demo
ARGS ?=

.PHONY: help serve test lint format docs clean
help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

serve: $(VENV)/.installed-core ## serve MODEL (default: the demo model) on http://127.0.0.1:8000; ARGS="--port 9000" passes options
	$(BIN)/wager serve $(MODEL) $(ARGS)

test: $(VENV)/.installed-dev ## run the tests; ARGS="-k scheduler" passes options to pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/.installed-dev ## ruff, pyright and the import contracts
	bash scripts/lint.sh $(BIN)

format: $(VENV)/.installed-dev ## rewrite the sources in house format
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

docs: $(VENV)/.installed-docs ## build the documentation into site/
	$(BIN)/python -m scripts.generate_docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## remove the environment and everything built
	rm -rf $(VENV) site build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/.installed-core: pyproject.toml scripts/setup_venv.sh
	@$(SETUP) core
$(VENV)/.installed-dev: pyproject.toml scripts/setup_venv.sh
	@$(SETUP) dev
$(VENV)/.installed-docs: pyproject.toml scripts/setup_venv.sh
	@$(SETUP) docs
