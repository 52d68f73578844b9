# All that is needed beforehand is Python 3.11 or newer with venv, and make. Everything is installed into .venv here.
#
#   make demo                  the main job on the sample slide
#   make test                  the quick tests          make test-slow   the slow ones        make test-all   both
#   make lint                  ruff and mypy            make format      let ruff rewrite     make bench      all benchmarks
#   make clean                 remove .venv and everything else that make or the tools made
#
#   make demo PYTHON=python3.12      another interpreter
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126"     another build of torch
#   make demo TORCH=                 the torch that PYTHON (system or conda, not a venv) already has, as on a GPU node
# PYTHON and TORCH count when .venv is made: `make clean` first to change them.

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
# Tests run in as many processes as there are cores, but no more than memory is sure to be there for.
SIDE_BY_SIDE := -n auto --maxprocesses 4

BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo test test-slow test-all lint format bench clean
help:
	@sed -n '/^#   /s/^#   //p' $(firstword $(MAKEFILE_LIST))

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python %d.%d is too old: use make PYTHON=..., 3.11 or newer" % sys.version_info[:2])'
	$(PYTHON) -m venv $(if $(strip $(TORCH)),,--system-site-packages) .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(if $(strip $(TORCH)),$(BIN)/python -m pip install --quiet $(TORCH))
	$(BIN)/python -m pip install --quiet --editable . --group dev
	@touch $@

demo: $(READY)
	$(BIN)/pathology run sample_data/sample.svs --model nuclei-density --out demo-out $(ARGS)
	@echo
	@echo "Look at  $$(echo demo-out/slides/*/nuclei-density/overlay.png)"
	@echo "Beside it lie heatmap.ome.zarr, tiles.parquet and result.json; what was planted is in sample_data/sample.geojson."

test: $(READY)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow" $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m slow $(ARGS)

test-all: $(READY)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/run.py $(ARGS)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-out build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
