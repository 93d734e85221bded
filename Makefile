# Everything runs in the project's own .venv: the rooms `data` and `parallel` are top-level package names.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test test-slow check bench bench-gpu

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python benchmarks/demo.py

test: setup
	$(BIN)/python -m pytest

test-slow: setup
	$(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python benchmarks/lightning_cpu.py
	$(BIN)/python benchmarks/lightning_layer.py
	$(BIN)/python benchmarks/tiny_step.py
	$(BIN)/python benchmarks/context_bytes.py
	$(BIN)/python benchmarks/context_trace.py
	$(BIN)/python benchmarks/long_context.py
	$(BIN)/python benchmarks/expert_overlap.py
	$(BIN)/python benchmarks/data_prepare.py

bench-gpu: setup
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python benchmarks/lightning_gpu.py
	$(BIN)/python benchmarks/experts_gpu.py
