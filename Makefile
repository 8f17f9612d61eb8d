# make quickstart | test | test-long | test-nightly | test-slurm | lint | setup | clean
#
# Every target sets up .venv first; stamp files inside it make the second run start at once.
# A machine with a GPU chooses its own torch:  make quickstart TORCH="torch==2.13.0"

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
# What to hand pip for torch; remembered, so that it is said once. Empty: the CPU build.
TORCH ?= $(shell cat $(STAMP)/torch 2>/dev/null)
PYTHON ?=
PYTEST_ARGS ?=
# Processes that share the quick tests; 0: pytest alone (--pdb needs that). A test may use four ranks of its own.
WORKERS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHON TORCH

.PHONY: help setup quickstart test test-long test-nightly test-slurm lint format clean another-torch

help:
	@echo "make quickstart   set up, then train the tiny model and write runs/quickstart/report.html"
	@echo "make test         set up, then the quick tests;  make test-long: the long ones"
	@echo "make test-nightly more layouts, up to 8 processes"
	@echo "make test-slurm   the scripts in slurm/ on a Slurm of this machine (installed where it is missing, as root)"
	@echo "make lint         ruff and mypy;  make format: let ruff mend what it can"
	@echo "make setup        only the virtual environment $(VENV);  make clean: remove it and all caches"
	@echo "On a machine with a GPU, the first time: make quickstart TORCH=\"torch==2.13.0\""

setup: $(STAMP)/package

quickstart: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/quickstart/run.sh

test: setup
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-long: setup
	@$(BIN)/python -m pytest -m long $(PYTEST_ARGS)

test-nightly: setup
	@$(BIN)/python -m pytest -m nightly $(PYTEST_ARGS)

test-slurm: setup
	@bash tools/install_slurm.sh
	@$(BIN)/python -m pytest tests/slurm -m slurm $(PYTEST_ARGS)

lint: setup
	@failed=0; \
	$(BIN)/ruff check --output-format concise . || failed=1; \
	$(BIN)/ruff format --check --output-format concise . || failed=1; \
	$(BIN)/mypy || failed=1; \
	exit $$failed

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find megatron_sage tests examples tools -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# 1. The environment. 2. torch, alone: as a dependency it would come as the newest CUDA build. 3. The lock. 4. Ourselves.
$(STAMP)/venv:
	@bash tools/setup_env.sh venv $(VENV)
	@mkdir -p $(STAMP) && touch $@

$(STAMP)/torch: $(STAMP)/venv requirements-torch.txt
	@bash tools/setup_env.sh torch $(VENV)
	@echo "$(TORCH)" >$@

ifneq ($(strip $(TORCH)),$(shell cat $(STAMP)/torch 2>/dev/null))
$(STAMP)/torch: another-torch
endif

$(STAMP)/lock: $(STAMP)/torch requirements.lock
	@bash tools/setup_env.sh lock $(VENV)
	@touch $@

$(STAMP)/package: $(STAMP)/lock setup.py
	@bash tools/setup_env.sh package $(VENV)
	@touch $@
