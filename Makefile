# `make` lists the targets. Each of `make demo` and `make test` installs what is missing first.

PYTHON ?=
TORCH ?=
PY ?=
HOST_HAS ?=
export PYTHON TORCH PY HOST_HAS

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow gpu-check lint docs wheel offline-bundle clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  make setup PYTHON=python3.12   with another Python (3.11 or newer)"
	@echo "  make setup TORCH=system        over the torch and torchvision that this Python has"
	@echo "  make offline-bundle PY=3.12 HOST_HAS=\"torch numba\"    without these and what they bring"

setup: ## install what is missing: system packages, .venv, the FFCV wheel, fastssl
	@scripts/setup.sh

demo: setup ## train on 3,200 digits and show what was learned (two to five minutes on two cores)
	@.venv/bin/python -m fastssl demo

test: setup ## run the tests, in two processes
	@.venv/bin/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: setup ## run the slow tests only
	@.venv/bin/python -m pytest -n 2 --dist loadfile -m slow

gpu-check: setup ## on a machine with a GPU: run what only it can show (10 to 20 minutes), write records/gpu/
	@.venv/bin/python benchmarks/gpu_check.py

lint: setup ## check style, formatting and types (ruff, mypy)
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

docs: setup ## build the documentation as a site in dist/docs; a broken link is an error
	@.venv/bin/python scripts/write_reference.py
	@.venv/bin/python scripts/build_docs.py

wheel: ## build the self-contained FFCV wheel into .cache/wheels
	@scripts/build_ffcv_wheel.sh

offline-bundle: ## collect in dist/ what a host without network lacks: PY=3.12
	@scripts/offline_bundle.sh

clean: ## remove .venv and every cache; data and runs stay
	rm -rf .venv .cache .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
