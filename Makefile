# Everything a newcomer needs. `make` alone lists the targets.
SHELL := /bin/bash
PYTHON_IN_VENV := .venv/bin/python
SETUP := scripts/setup.sh

# The user whose model `make demo` builds, and any further flags of cdcda-export.
USER_ID ?= 42
DEMO_ARGS ?=
# What `make install` installs: train, onnx, hf, data, fleet, privacy, phone, dev or all, comma-separated.
EXTRAS ?= train
# Further words for pytest, for example TEST_ARGS='-k gguf -x'.
TEST_ARGS ?=
# How many tests run at once; each has cores of its own (tests/conftest.py).
TEST_PROCESSES ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test install lint format constraints wheel clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## set up .venv and build the phone model of sample user 42 (USER_ID=7 DEMO_ARGS="--quant q8_0" change that)
	@$(SETUP) --extras train
	@.venv/bin/cdcda-export --user "$(USER_ID)" --format gguf $(DEMO_ARGS)

test: ## set up what the tests need, then lint, type-check and run every test with coverage
	@$(SETUP) --extras all --tests
	@$(MAKE) --no-print-directory lint
	PYTHONPATH=tests $(PYTHON_IN_VENV) -m pytest -p strict_skips -rs --durations=15 --cov --cov-report=term \
		-n $(TEST_PROCESSES) --dist loadscope $(TEST_ARGS)

install: ## set up .venv and stop there (EXTRAS=all for everything)
	@$(SETUP) --extras "$(EXTRAS)"

lint: ## ruff and mypy, in a .venv that is there
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: ## let ruff put the code in order
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

constraints: ## resolve constraints.txt anew from pyproject.toml (UPGRADE=1 takes newer versions)
	@$(SETUP) --extras dev
	UV_CUSTOM_COMPILE_COMMAND="make constraints" .venv/bin/uv pip compile --universal --python-version 3.11 --all-extras \
		--strip-extras --no-annotate --no-emit-index-url --quiet $(if $(UPGRADE),--upgrade) --output-file constraints.txt pyproject.toml

wheel: ## build dist/*.whl, installable with pip
	@$(SETUP) --extras dev
	$(PYTHON_IN_VENV) -m build --wheel --outdir dist

clean: ## remove what was built here; .venv, runs/ and the user's cache stay
	rm -rf build dist ./*.egg-info .coverage .coverage.* htmlcov .pytest_cache .mypy_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
