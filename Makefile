# make serve   sets everything up and runs the service with the bundled model; flags by ARGS="--model DIR"
# make test    sets everything up and runs the tests
# make help    the rest

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Passed to every pip install: an index or a folder with the torch build that you want.
PIP_ARGS ?=
ARGS   ?=

.PHONY: help setup serve test emulate lint format proto check-proto lock bench clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# make/make/p' Makefile
	@echo "make lint    ruff, mypy, import layers, stubs against the .proto files"
	@echo "make emulate tests the AVX-512 and AMX linears on a CPU without them (slow; g++)"
	@echo "make proto   writes understudy/v1 from proto/"
	@echo "make lock    writes requirements.lock from pyproject.toml"
	@echo "make bench   measures the engine and the whole service (docs/benchmarks.md)"

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "understudy: installing the dependencies into $(VENV)/ (once; about a minute)"
	@$(PYTHON) -m venv $(VENV) || { echo "error: cannot make $(VENV)/; on Debian install python3-venv" >&2; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(READY)

serve: $(READY)
	@exec $(BIN)/understudy serve $(ARGS)

test: $(READY)
ifeq ($(strip $(ARGS)),)
	@tools/test.sh $(BIN)/python
else
	@$(BIN)/python -m pytest $(ARGS)
endif

emulate: $(READY)
	@CXX=$(CURDIR)/tools/emulate/cxx UNDERSTUDY_CACHE=$(CURDIR)/$(VENV)/emulated $(BIN)/python -m pytest -n 2 \
	  -k "avx512bf16 or amx" tests/contract/test_ops.py tests/contract/test_coded.py tests/contract/test_sieve.py

lint: $(READY) check-proto
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

proto:
	@PYTHON=$(PYTHON) tools/proto.sh write

check-proto:
	@PYTHON=$(PYTHON) tools/proto.sh check

# From an empty environment, so that nothing enters the lock by accident.
lock:
	@rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/pip install --quiet $(PIP_ARGS) torch==2.13.0
	@.venv-lock/bin/pip install --quiet $(PIP_ARGS) 'setuptools>=77' '.[serve,test,dev]'
	@{ echo "# Every dependency of the service, its tests and its checks. Written by 'make lock'."; \
	   .venv-lock/bin/pip freeze --all --exclude understudy --exclude pip | sed -e 's/+cpu$$//'; } > requirements.lock
	@rm -rf .venv-lock build

bench: $(READY)
	@$(BIN)/python bench/engine.py
	@$(BIN)/python bench/serve.py

clean:
	rm -rf $(VENV) .venv-proto .venv-lock build *.egg-info .pytest_cache .mypy_cache .ruff_cache
