# A fresh machine needs Python 3.11 and make; `make demo` and `make test` do the rest.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Installed once for each state of these files.
STAMP := $(VENV)/.installed

.PHONY: demo test test-fast test-android test-arm lint format clean

demo: $(STAMP)
	$(BIN)/gemma-edge demo

test: $(STAMP)
	$(BIN)/python -m pytest

# Without the tests that export whole models or train, in two processes: two or three minutes.
test-fast: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

# The app in android_demo, without a phone: see android_demo/ci/check.sh.
test-android: $(STAMP)
	PYTHON=$(abspath $(BIN)/python) android_demo/ci/check.sh

# The demo checkpoints on ARM processors, which qemu plays. Names what this machine lacks, and skips it.
test-arm: $(STAMP)
	$(BIN)/python -m scripts.arm.check

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .arm android_demo/ci/target android_demo/ci/*/target build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
