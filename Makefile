# Every target sets up what it needs; nothing has to be installed by hand. `make setup VARIANT=gpu` makes
# .venv for GPUs, and the other targets then use it as it is.
PY := .venv/bin/python
VARIANT ?=
QUICK ?= 0
SEED ?= 0
export QUICK

.PHONY: quickstart test unit check show bench setup lock

quickstart: setup
	@.venv/bin/hone train deploy/configs/quickstart.yaml run.seed=$(SEED) --run quickstart-$$(date +%H%M%S)

setup:
	@scripts/bootstrap $(VARIANT)

check: setup
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .
	@.venv/bin/pyright
	@.venv/bin/lint-imports

unit: setup
	@$(PY) -m pytest tests/unit

test: check
	@browser="$$(scripts/chromium)" && export PATH="$$PATH:$$browser"; \
	  $(PY) -m pytest --durations=20 -m 'not slow' tests/unit tests/integration tests/e2e

show: setup
	@$(PY) -m benchmarks.show $(AREA)

bench: setup
	@$(PY) -m benchmarks.replay_buffer
	@$(PY) -m benchmarks.entropy_memory
	@$(PY) -m benchmarks.cpu_matmul

lock: setup
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" .venv/bin/uv pip compile pyproject.toml \
	  --extra cpu --group dev --overrides requirements/overrides-cpu.txt --python-version 3.11 \
	  --python-platform x86_64-manylinux_2_28 --no-header --no-annotate \
	  --generate-hashes -q -o requirements/cpu.txt
	UV_FIND_LINKS= .venv/bin/uv --no-config pip compile pyproject.toml --extra gpu \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-header --no-annotate \
	  --generate-hashes -q -o requirements/gpu.txt
