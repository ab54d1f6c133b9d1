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
REPORT_OUT ?= report-out
REPORT_FORMATS ?= nf4,gptq:4,awq:4,hqq:4:g64,fp8,ternary

.PHONY: help setup demo report test test-all check format peers kernels nightly fuzz reliability audit clean

help:
	@echo "make setup     create $(VENV) from constraints.txt (quick when nothing changed)"
	@echo "make demo      convert the example to AWQ and GPTQ, evaluate both, print the table"
	@echo "make report    the example in six formats: $(REPORT_OUT)/report, and its picture for the documentation"
	@echo "make test      the tests, without those marked slow"
	@echo "make test-all  all tests"
	@echo "make check     formatting, lint, types, documentation, import rule"
	@echo "make format    apply the formatter and the safe fixes"
	@echo "make kernels   compile the GPU kernels for eight chips into build/kernels (no GPU needed; half an hour)"
	@echo "make nightly   the property tests with over 10,000 cases (a few minutes)"
	@echo "make fuzz      fuzz the four parsers with atheris, FUZZ_SECONDS of CPU each (an hour in all)"
	@echo "make reliability  attacks, properties, kills, full disks, memory; writes docs/reliability.md (half an hour)"
	@echo "make audit     known vulnerabilities of the pinned dependencies (asks a service)"
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

report: setup
	$(BIN)/quantkit sweep $(EXAMPLE) --formats $(REPORT_FORMATS) -o $(REPORT_OUT) --samples 32 --seqlen 512 \
		--dtype float32 --speed --speed-contexts 256
	$(BIN)/python scripts/report_picture.py $(REPORT_OUT)/report/report.html docs/images/report.png

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

KERNEL_TARGETS ?= sm_75 sm_80 sm_89 sm_90 sm_100 gfx90a gfx942 gfx1100
kernels: setup
	$(BIN)/quantkit kernels build $(addprefix -t ,$(KERNEL_TARGETS)) -o build/kernels --overwrite \
	  --dtype float16 --dtype bfloat16 --shape 4096x4096 --rows 1,16,64,4096 --jobs $(JOBS)

peers: setup
	bash scripts/peers/setup.sh

# The fuzzing needs atheris (wheels for Linux, CPython 3.11 to 3.13), the audit a vulnerability service to ask.
FUZZ_SECONDS ?= 900
FUZZ_LOG ?= docs/benchmarks/fuzz.jsonl
fuzz: setup
	$(PIP) install --quiet 'atheris>=3.0'
	for target in reader index quantization_config journal; do \
	  $(BIN)/python tests/fuzz/fuzz.py $$target --cpu-seconds $(FUZZ_SECONDS) --log $(FUZZ_LOG); done

nightly: setup
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -q -o timeout=3000 tests/properties

reliability: setup
	$(PIP) install --quiet 'atheris>=3.0' || echo "no atheris for this Python: nothing will be fuzzed"
	$(BIN)/python scripts/reliability.py

audit: setup
	$(PIP) install --quiet 'pip-audit>=2.7'
	$(BIN)/python scripts/audit.py

clean:
	rm -rf build dist demo-out report-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
