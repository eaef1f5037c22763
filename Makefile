# The few verbs. Each sets up whatever it needs: a machine with Python 3.11 or newer and make is enough.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.9
INSTALLED := $(VENV)/.installed
# Of the tests, each with services of its own. They wait more than they compute.
TEST_PROCESSES ?= 2

.PHONY: help demo up down bench test chaos chaos-long chaos-mutants check format clean

help: ## Show the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(INSTALLED): pyproject.toml uv.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv==$(UV_VERSION)"
	@VIRTUAL_ENV=$(VENV) $(BIN)/uv sync --quiet --frozen --all-extras --python $(BIN)/python
	@touch $@

demo: $(INSTALLED) ## Start everything, run the main job with five tenants, check the outcome
	@$(BIN)/settler demo

up: $(INSTALLED) ## Start everything and keep it running until Ctrl-C
	@$(BIN)/settler up

down: $(INSTALLED) ## Stop what `make up` has started
	@$(BIN)/settler down

bench: $(INSTALLED) ## Measure the data path: a table, and the figures in bench.json
	@$(BIN)/settler bench bench.json

test: $(INSTALLED) ## Run the tests on real Kafka, PostgreSQL and Valkey
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

chaos: $(INSTALLED) ## Disturb a whole system for some minutes and check what is left; SEED=n repeats a round
	@$(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) $(CHAOS_ARGS)

chaos-long: $(INSTALLED) ## The same for half an hour: harder, and a million made statements
	@$(BIN)/python -m tests.chaos long $(if $(SEED),--seed $(SEED)) $(CHAOS_ARGS)

chaos-mutants: $(INSTALLED) ## Shorter rounds with a bug in the workers, which the check has to find
	@$(BIN)/python -m tests.chaos mutants $(if $(SEED),--seed $(SEED)) $(CHAOS_ARGS)

check: $(INSTALLED) ## Format, lint, strict types, import direction: seconds
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo --no-cache > /dev/null || $(BIN)/lint-imports --no-cache

format: $(INSTALLED) ## Format, and repair what the linter can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean: ## Remove the environment and the caches
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
