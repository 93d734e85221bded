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
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,slow]'
	$(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Runs every command given, says which of them failed (a benchmark fails where a target is missed), and fails if any did.
define each
@failed=; for command in $(1); do echo "$$command"; $$command || failed="$$failed [$$command: $$?]"; done; \
if test -n "$$failed"; then echo "failed, or missed a target:$$failed"; exit 1; fi
endef

BENCHMARKS := lightning_cpu lightning_layer tiny_step context_bytes context_trace long_context expert_overlap data_rows data_prepare conversion context_extension

bench: setup
	$(call each,$(foreach name,$(BENCHMARKS),'$(BIN)/python benchmarks/$(name).py'))

# At most 90 + 250 + 130 seconds, and 2 for each to die: under 8 minutes whatever hangs. lightning_gpu.py ends by itself before, with what it has.
bench-gpu: setup
	$(call each,'timeout -k 2 90 $(BIN)/python -m pytest -m gpu' 'timeout -k 2 250 $(BIN)/python benchmarks/lightning_gpu.py --minutes 3.5' \
	'timeout -k 2 130 $(BIN)/python benchmarks/experts_gpu.py')
