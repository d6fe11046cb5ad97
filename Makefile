# `make quickstart` and `make test` each start from a bare clone: they make .venv from the lock.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help quickstart test check format kernels bench soak clean

help:
	@echo "make quickstart   train, compress, gate, serve and ask a model on this machine (minutes)"
	@echo "make test         run the test suite"
	@echo "make check        format, lint, types, import contracts"
	@echo "make format       rewrite the code in the house format"
	@echo "make kernels      build the C++ kernels again after an edit"
	@echo "make bench        measure, against peers where they are installed"
	@echo "make soak         slow soak and chaos suites"

quickstart: .venv/core
	$(BIN)/minigpt quickstart

test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not soak"

soak: .venv/dev
	$(BIN)/python -m pytest -m soak

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# An install builds them too; this way only what changed, and into any checkout's src.
kernels: .venv/core
	$(BIN)/cmake -S src/minigpt/kernels/csrc -B build/kernels -G Ninja \
		-DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
	$(BIN)/cmake --build build/kernels

bench: .venv/dev
	$(BIN)/python -m bench

clean:
	rm -rf .venv build src/minigpt/kernels/lib runs .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The stamps make a second run reuse the environment until the lock or the project changes.
# torch goes first, with what it needs; everything else without dependency resolution, so that
# nothing can pull another torch.
.venv/core: lock/core.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "minigpt needs Python 3.11 or newer: set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c lock/core.txt "$$(grep '^torch==' lock/core.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r lock/core.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

.venv/dev: .venv/core lock/dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r lock/dev.txt
	@touch $@
