# Every target does its own set-up in .venv. `make demo`, `make test` and `make check` are the three to know.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= dev
JOBS ?= 2
STAMP := $(VENV)/.quantkit-setup
PIP := $(BIN)/python -m pip --disable-pip-version-check

EXAMPLE ?= examples/pydoc-llama-7m
DEMO_OUT ?= demo-out
DEMO_FLAGS ?= --samples 32 --seqlen 256 --overwrite

.PHONY: help setup demo test test-all check format peers clean

help:
	@echo "make setup     create $(VENV) from constraints.txt (quick when nothing changed)"
	@echo "make demo      convert the example to AWQ and GPTQ, evaluate both, print the table"
	@echo "make test      the tests, without those marked slow"
	@echo "make test-all  all tests"
	@echo "make check     formatting, lint, types, documentation, import rule"
	@echo "make format    apply the formatter and the safe fixes"
	@echo "make peers     environments for heavy peer libraries (scripts/peers)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch==2.13.0
	$(PIP) install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: setup
	$(BIN)/quantkit convert $(EXAMPLE) --format awq -o $(DEMO_OUT)/awq $(DEMO_FLAGS)
	$(BIN)/quantkit convert $(EXAMPLE) --format gptq -o $(DEMO_OUT)/gptq $(DEMO_FLAGS)
	$(BIN)/quantkit eval $(DEMO_OUT)/awq $(DEMO_OUT)/gptq --reference $(EXAMPLE) --dtype float32 --tokens 8192

test: setup
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow"

test-all: setup
	$(BIN)/python -m pytest -n $(JOBS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py tests/test_docs.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

peers: setup
	bash scripts/peers/setup.sh

clean:
	rm -rf build dist demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
