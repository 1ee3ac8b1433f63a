# make demo | test | docs | bench | wheel | lint | sanitize | mutation | nightly: each makes what it needs,
# from a clean clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := CMakeLists.txt $(wildcard csrc/*) src/fusedloss/engines/cpu/printer.py $(wildcard src/fusedloss/losses/*.py)

.PHONY: demo test test-torch docs nightly arm64 arm64-tests bench wheel lint format sanitize mutation clean

demo: $(VENV)/installed
	$(BIN)/fusedloss demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# What `make test` leaves out: 20,000 hostile calls, more than 2**31 elements, every mutant, and
# every GPU kernel for four targets. Hours.
nightly: $(VENV)/installed
	$(BIN)/python -m pytest -m 'nightly or large' -n 0 $(ARGS)

# The kernels that arm64 has, under qemu-user.
arm64: $(VENV)/installed
	$(BIN)/python tests/arm64.py

# One in fifty of the tests of losses there, on Debian: fetches its Python for arm64 and PyPI's torch. EVERY=1 runs all.
arm64-tests: $(VENV)/installed
	$(BIN)/python tests/arm64_tests.py $(ARGS)

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

# dist/: the sdist and the wheel of this machine, tried where there is torch alone, no compiler and no source.
wheel: build/wheel/built
	rm -rf dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m build --sdist --outdir dist .
	PATH=$(CURDIR)/$(BIN):$$PATH auditwheel repair --only-plat --plat manylinux_2_28_$$(uname -m) --wheel-dir dist build/wheel/*.whl
	$(BIN)/python tests/wheel.py

# From the kernels that are built here.
build/wheel/built: $(VENV)/installed $(shell find src -name '*.py*' -not -path '*/__pycache__/*') README.md
	rm -rf build/wheel
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m build --wheel --outdir build/wheel .
	touch $@

# The quick rooms on another torch, with the wheel, in an environment of its own: make test-torch TORCH=2.14.1
OTHER = .venv-torch-$(TORCH)
ROOMS = tests/house tests/front tests/faces tests/losses
test-torch: build/wheel/built
	test -n "$(TORCH)" || { echo "make test-torch: TORCH=VERSION is missing, say TORCH=2.14.1"; exit 2; }
	$(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --quiet --extra-index-url https://download.pytorch.org/whl/cpu torch==$(TORCH)
	grep -v '^torch==\|^triton==' constraints.txt > build/constraints-without-torch.txt
	$(OTHER)/bin/python -m pip install --quiet -c build/constraints-without-torch.txt torch==$(TORCH) \
	    expecttest hypothesis mpmath numpy pytest pytest-xdist rich
	$(OTHER)/bin/python -m pip install --quiet --no-deps --force-reinstall build/wheel/*.whl
	FUSEDLOSS_TEST_EVERY=$(or $(EVERY),20) $(OTHER)/bin/python -m pytest -n auto $(ROOMS) $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/* tests/native/*

format: $(VENV)/installed
	$(BIN)/python tests/stubs.py
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/* tests/native/*

# constraints.txt pins the versions; an unpinned torch may bring gigabytes of CUDA packages.
$(VENV)/installed: pyproject.toml constraints.txt $(SOURCES)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint,docs,wheel]'
	touch $@

clean:
	rm -rf $(VENV) .venv-torch-* build dist
