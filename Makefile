# make demo | test | docs | bench | lint | sanitize | mutation | nightly: each makes what it needs,
# from a clean clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := CMakeLists.txt $(wildcard csrc/*) src/fusedloss/engines/cpu/printer.py $(wildcard src/fusedloss/losses/*.py)

.PHONY: demo test docs nightly bench lint format sanitize mutation clean

demo: $(VENV)/installed
	$(BIN)/fusedloss demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto $(ARGS)

# What `make test` leaves out: 20,000 hostile calls, more than 2**31 elements, every mutant, and
# every GPU kernel for four targets. Hours.
nightly: $(VENV)/installed
	$(BIN)/python -m pytest -m 'nightly or large' -n 0 $(ARGS)

# Plants errors in formulas and kernels, each of which the suite must see.
mutation: $(VENV)/installed
	$(BIN)/python tests/mutation.py

bench: $(VENV)/installed
	$(BIN)/fusedloss bench $(ARGS)

# The C++ core under address, undefined-behaviour and thread sanitizers, and valgrind where there is one.
sanitize: $(VENV)/installed
	$(BIN)/python tests/sanitize.py

# The guide, into build/docs/html: built with warnings as errors, and looked at in Chromium where there is one.
docs: $(VENV)/installed
	$(BIN)/python docs/site
	$(BIN)/python docs/site/check.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/* tests/native/*

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/* tests/native/*

# constraints.txt pins the versions; an unpinned torch may bring gigabytes of CUDA packages.
$(VENV)/installed: pyproject.toml constraints.txt $(SOURCES)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint,docs]'
	touch $@

clean:
	rm -rf $(VENV) build
