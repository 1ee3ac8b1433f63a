# make demo | test | bench | lint: each makes what it needs, from a clean clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := CMakeLists.txt $(wildcard csrc/*) src/fusedloss/cpu/printer.py $(wildcard src/fusedloss/losses/*.py)

.PHONY: demo test bench lint format clean

demo: $(VENV)/installed
	$(BIN)/fusedloss demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto $(ARGS)

bench: $(VENV)/installed
	$(BIN)/fusedloss bench $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/*

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

# constraints.txt pins the versions; an unpinned torch may bring gigabytes of CUDA packages.
$(VENV)/installed: pyproject.toml constraints.txt $(SOURCES)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	touch $@

clean:
	rm -rf $(VENV) build
