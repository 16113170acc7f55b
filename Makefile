# `make test` and `make bench` do everything, from a bare checkout on. PYTHON makes the environment, VENV is where it lies.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# The environment is of this list of requirements, the build of these sources; what has not changed is not done again.
REQUIREMENTS := $(VENV)/requirements-$(shell cksum <requirements-dev.txt | tr ' ' '-')
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
BUILT := $(VENV)/built
CXX_FILES = $(shell find csrc tests/emulation -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help build test bench lint format test-abi clean force
.DEFAULT_GOAL := help

help:
	@echo 'make test      environment, build, all checks and tests'
	@echo 'make bench     environment, build, benchmark; ARGS="--help" shows its options'
	@echo 'make build     environment and build'
	@echo 'make lint      the checks of the sources alone: ruff, mypy, clang-format, import-linter'
	@echo 'make format    rewrite the sources as ruff and clang-format want them'
	@echo 'make test-abi  the object as built, under the oldest torch it serves and the newest'
	@echo 'make clean     remove what was built; the environment stays'

build: $(BUILT)

test: build
	$(PY) -m pytest $(ARGS)

bench: build
	$(PY) -m bench.run $(ARGS)

lint: build
	$(PY) -m pytest -q tests/test_lint.py tests/test_floor_plan.py

format: $(REQUIREMENTS)
	$(PY) -m ruff check --fix --exit-zero .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

test-abi: build
	PYTHON=$(PYTHON) bash tests/abi.sh

clean:
	rm -rf build dist *.egg-info aliasfused/_C*.so $(BUILT) .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks \
	  .import_linter_cache

$(REQUIREMENTS): requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --requirement requirements-dev.txt
	touch $@

# Editable: the object lands in aliasfused/, beside the sources. Built against the environment's own torch.
$(BUILT): $(REQUIREMENTS) $(SOURCES) $(if $(wildcard aliasfused/_C*.so),,force)
	$(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@
