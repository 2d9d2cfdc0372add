# Two commands for a newcomer: `make demo` draws a picture, `make test` checks everything.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-all golden matrix bench

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/installed ## install into .venv and draw a picture with the embedded model
	folder=outputs/demo-$$(date +%Y%m%d-%H%M%S); \
	$(BIN)/python -m hydrarun hydra.run.dir=$$folder && echo "The picture: $$(ls $$folder/*.png)"

test: $(VENV)/installed-test ## lint, check types, run all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadscope

test-all: $(VENV)/installed-launchers ## all that `make test` runs, the wheel, every variant, and sweeps by Ray, submitit and Optuna
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "" tests tests/launchers

golden: $(VENV)/installed-test ## rewrite what is made from the code: tests/golden, tables of README and docs/models.md, recipes/schema.json
	$(BIN)/python -m tests.golden.update

matrix: $(VENV)/installed-test ## run every model with every acceleration and write docs/matrix.md
	$(BIN)/python -m pytest tests/test_matrix.py -m "" --write-matrix

bench: $(VENV)/installed-test ## our denoising loop against diffusers' on the demo model
	$(BIN)/python bench/loop.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 10) and sys.exit("Python >= 3.10 is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch first and alone: no other requirement can then pull a different build of it; one that is there already
# (2.13.0 for CUDA, say) is kept
$(VENV)/torch: | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch==2.13.0
	@touch $@

$(VENV)/installed: pyproject.toml constraints.txt $(VENV)/torch
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

$(VENV)/installed-launchers: $(VENV)/installed-test
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[ray,slurm,optuna]"
	@touch $@
