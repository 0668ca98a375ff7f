#: make sample    a fresh machine → a picture of samples
#: make test      the tests
#: make test-isa  those that depend on the CPU, held to AVX2 and to SSE2
#: make ptx       those of the GPU kernels on their machine-level programs, interpreted: no GPU is needed
#: make lint      ruff
#: make bench     the benchmarks; ARGS="--base REV" is this tree against a revision
#: make bench-history  ratios by commit, from the comparisons kept in bench/results/base
#: make sanitize  the C++ under the sanitizers of addresses, undefined behaviour and threads: some minutes
#: make fuzz      damaged files, odd command lines and random calls; ARGS="--seed 7 --seconds 3600" for an hour of others
#: make setup     what the last eight install, and nothing else
#: make clean     remove what make made
#:
#: PYTHON=python3.12   which Python     VENV=.venv   where to install     ARGS="--n 16"   more for sgm sample or pytest
#: JOBS=2              processes that run the tests, a file at a time

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
JOBS ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
BUILT_FROM := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

.PHONY: help setup sample test test-isa ptx lint bench bench-history sanitize fuzz clean
help:
	@sed -n 's/^#: \{0,1\}//p' Makefile

setup: $(VENV)/.dev

sample: $(VENV)/.installed
	@$(BIN)/sgm sample --out samples.png $(ARGS)

test: $(VENV)/.dev
	@$(BIN)/python -m pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-isa: $(VENV)/.dev
	@$(BIN)/python -m tests.isa -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

ptx: $(VENV)/.dev
	@$(BIN)/python -m tests.ptx -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

bench: $(VENV)/.dev
	@$(BIN)/python -m pytest bench $(ARGS)

bench-history: $(VENV)/.dev
	@$(BIN)/python -m bench.history

sanitize: $(VENV)/.dev
	@$(BIN)/python -m tests.sanitize

fuzz: $(VENV)/.dev
	@$(BIN)/python -m tests.fuzz $(ARGS)

# Editable, so that a change in Python needs no new install and a change in csrc/ rebuilds.
$(VENV)/.installed: $(BUILT_FROM) | $(BIN)/python
	@echo "Installing sgm-engine into $(VENV): once, some minutes, most of them for PyTorch."
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@$(PIP) -e '.[test,lint,integrations,train,trainers]'
	@$(PIP) --no-deps azula deepinv k-diffusion  # see pyproject.toml
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "sgm-engine needs Python 3.10 or newer and $(PYTHON) is not; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import pathlib, sysconfig as s; assert pathlib.Path(s.get_path("include"), "Python.h").exists()' 2>/dev/null || \
	  { echo "$(PYTHON) comes without its headers (Python.h); on Debian and Ubuntu: apt install python3-dev" >&2; exit 1; }
	@command -v $(CXX) >/dev/null || \
	  { echo "there is no C++ compiler ($(CXX)); on Debian and Ubuntu: apt install g++" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .venv-wheel build dist *.egg-info samples.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find kernels sgm_engine -name '*.so' -delete
