# `make demo` and `make test` set everything up by themselves, once, in .venv and .cache.
PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python
# two files of tests at a time; what one file shares (models, recordings) is made once
PARALLEL := -n 2 --dist loadfile
# idle OpenMP threads of one process must not spin where another one could compute
export OMP_WAIT_POLICY := passive

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast lint bench fuzz clean

help:            ## show this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

setup: $(VENV)/.ready ## create .venv and build llama.cpp (about 10 minutes, once)

$(VENV)/.ready: pyproject.toml tools/setup.sh tools/llama_cpp.sh
	PYTHON=$(PYTHON) VENV=$(VENV) bash tools/setup.sh
	@touch $@

demo: $(VENV)/.ready ## the main job on a real model: convert, record, verify, print the table
	@$(VENV)/bin/safegene demo

test: $(VENV)/.ready ## the whole suite, the real model included
	@bash tools/test_setup.sh
	@$(PY) -m pytest -q $(PARALLEL)

test-fast: $(VENV)/.ready ## the suite without the real model
	@bash tools/test_setup.sh
	@$(PY) -m pytest -q $(PARALLEL) -m "not slow"

lint: $(VENV)/.ready ## ruff and mypy
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

bench: $(VENV)/.ready ## time ours against upstream's tools, side by side
	@$(PY) benchmarks/convert.py && $(PY) benchmarks/onnx.py && $(PY) benchmarks/verify.py

FUZZ_SECONDS ?= 60
fuzz: $(VENV)/.ready ## feed every reader of files hostile ones, FUZZ_SECONDS each (60)
	@for reader in gguf lora safetensors onnx json peft; do \
	    $(PY) tools/fuzz.py $$reader --seconds $(FUZZ_SECONDS) || failed=1; done; exit $${failed:-0}

clean:           ## remove .venv and .cache
	rm -rf $(VENV) .cache demo
