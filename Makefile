# Everything a newcomer needs. `make` alone lists the targets.
SHELL := /bin/bash
PYTHON_IN_VENV := .venv/bin/python
SETUP := scripts/setup.sh

# The user whose model `make demo` builds, and any further flags of cdcda-export.
USER_ID ?= 42
DEMO_ARGS ?=
# `make apk USER=42` packs user 42's model; in the environment USER is who is logged in, so only the command line counts.
APK_USER := $(if $(filter command line,$(origin USER)),$(USER),$(USER_ID))
# What `make install` installs: train, onnx, hf, data, fleet, privacy, phone, dev or all, comma-separated.
EXTRAS ?= train
# Further words for pytest, for example TEST_ARGS='-k gguf -x'.
TEST_ARGS ?=
# How many tests run at once; each has cores of its own (tests/conftest.py).
TEST_PROCESSES ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo apk test install lint format constraints wheel clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## set up .venv and build the phone model of sample user 42 (USER_ID=7 DEMO_ARGS="--quant q8_0" change that)
	@$(SETUP) --extras train
	@.venv/bin/cdcda-export --user "$(USER_ID)" --format gguf $(DEMO_ARGS)

apk: ## set up .venv and pack the model of a sample user into an Android app (USER=42)
	@$(SETUP) --extras train,phone
	@for tool in mvn javac $$(test -x "$$ANDROID_HOME/build-tools/34.0.0/aapt2" || echo aapt2); do command -v $$tool > /dev/null \
		|| { echo "The app needs $$tool: apt install maven default-jdk-headless aapt"; exit 1; }; done
	@.venv/bin/cdcda-export --user "$(APK_USER)" --format gguf
	@.venv/bin/cdcda apk --user "$(APK_USER)"

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

wheel: ## build dist/*.whl, installable with pip, the app's shell in it where Maven is there
	@$(SETUP) --extras dev
	@rm -f android_demo/pack/cdcda_apk/shell.apk
	@if command -v mvn > /dev/null && command -v javac > /dev/null && command -v aapt2 > /dev/null; then cd android_demo/app && mvn -q -B -Dmaven.test.skip=true package \
		&& cp target/shell.apk ../pack/cdcda_apk/; else echo "without the app: it needs maven and aapt"; fi
	$(PYTHON_IN_VENV) -m build --wheel --outdir dist

clean: ## remove what was built here; .venv, runs/ and the user's cache stay
	rm -rf android_demo/app/target android_demo/pack/cdcda_apk/shell.apk build dist ./*.egg-info .coverage .coverage.* htmlcov .pytest_cache .mypy_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
