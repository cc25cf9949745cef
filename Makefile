# Two commands: `make pretrain` and `make test`. Each sets up its own environment first.
# Another interpreter: `make PYTHON=python3.12 VENV=.venv312 test`.

.DEFAULT_GOAL := help
VENV ?= .venv
# The first interpreter that really starts: a shim without a version behind it is passed over.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RECIPE ?= phsa_demo_cpu

.PHONY: help setup pretrain test lint slow slow-all slurm verify print-python clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

setup: $(READY) ## create the environment only

$(READY): pyproject.toml $(wildcard constraints/*.txt)
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or 3.12 found. Install one, or: make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version): about two minutes the first time"
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' \
		-c constraints/$$($(BIN)/python -c 'import sys; print("py%d%d" % sys.version_info[:2])').txt
	@touch $@

pretrain: $(READY) ## train the PHSA demo model on real text, then open runs/phsa_demo_cpu/report.html
	$(BIN)/phsa-train prepare-demo
	$(BIN)/phsa-train recipe=$(RECIPE)

# A test file stays in one process, so that what its tests share is made once. One more process than there are
# cores, for tests wait for others' processes and clocks.
WORKERS := $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n + 1 : 8)))
PARALLEL := -n $(WORKERS) --dist loadfile

test: $(READY) ## the fast test suite
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu and not multigpu"

slow: $(READY) ## the tests of more than 30 s: golden curve, kill and resume, several processes
	$(BIN)/python -m pytest $(PARALLEL) -m "slow and not night and not slurm and not gpu and not multigpu"

slow-all: $(READY) ## the slow tests and those that are too long for CI
	$(BIN)/python -m pytest $(PARALLEL) -m "slow and not slurm and not gpu and not multigpu"

slurm: $(READY) ## every test on a real Slurm of four nodes (installs one; root)
	bash .ci/slurm_leg "slurm or not slurm"

lint: $(READY) ## format, style, types, import rules and the Dockerfile
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

verify: $(READY) ## prove that resume is exact, to the last bit
	$(BIN)/phsa-train prepare-demo
	$(BIN)/phsa-train verify-resume recipe=$(RECIPE)

print-python:
	@echo $(PYTHON)

print-workers:
	@echo $(WORKERS)

clean: ## remove the environment and caches; runs/ and prepared/ stay
	rm -rf $(VENV) .venv312 .venv-interpreter .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build dist
