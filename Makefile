# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` need Python >= 3.10 and make; they install everything else into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := segkern integrations tests benchmarks tools setup.py
JOBS ?= auto

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format typecheck pytest benchmark wheel clean

help: ## what there is
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 20

install: $(INSTALLED) ## .venv with segkern (editable), its extras and the tested versions

$(INSTALLED): pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "segkern needs Python 3.10 or newer, $(PYTHON) is " + sys.version)'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[all]"
	touch $@

# Tensors of the bundled checkpoint are tiny: on a busy machine a second thread only waits for the first.
demo: $(INSTALLED) ## guidance end to end on the bundled checkpoint; writes outputs/demo.png
	OMP_NUM_THREADS=1 $(BIN)/segkern demo --out outputs/demo.png --overwrite

test: lint typecheck pytest ## all checks and all tests

lint: $(INSTALLED) ## ruff, rules and format
	$(BIN)/ruff check $(wildcard $(SOURCES))
	$(BIN)/ruff format --check $(wildcard $(SOURCES))

format: $(INSTALLED) ## let ruff mend what it can
	$(BIN)/ruff check --fix $(wildcard $(SOURCES))
	$(BIN)/ruff format $(wildcard $(SOURCES))

typecheck: $(INSTALLED) ## mypy over the packages as they are installed
	rm -rf build/typecheck
	$(BIN)/python setup.py --quiet build_py --build-lib build/typecheck
	$(BIN)/mypy

pytest: $(INSTALLED) ## the tests alone, on all cores
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

benchmark: $(INSTALLED) ## speed against plain attention and the official algorithm
	$(BIN)/python -m pytest benchmarks

wheel: $(INSTALLED) ## dist/*.whl and dist/*.tar.gz
	rm -rf build/lib dist
	$(BIN)/python -m build --no-isolation

clean: ## everything that the targets above made
	rm -rf $(VENV) build dist outputs *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find segkern integrations tests benchmarks tools -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
