# make demo   train the whole text-to-image chain on a small world and show the images (MINUTES=8)
# make quick  the tests that start no process
# make test   every check and test, on two workers (WORKERS=2)
# make test-all                    the same and proofs that take long
# make test-processors             which rows of tests/processors.py have passed at this code, and which are missing
# make test-processors VARIANT=sse   the tests as another processor would run them; PART=numerics, SEED=7
# make wheel   the package with its programs and configs, in dist/
# All set up .venv first, at the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MINUTES ?= 8
WORKERS ?= 2
STAMP := $(VENV)/installed

export DS_ACCELERATOR ?= cpu

.PHONY: demo quick wheel test test-all test-processors lint install clean

install: $(STAMP)

# torch first and pinned: DeepSpeed's own set-up looks for it, and an unpinned one may pull another build
$(STAMP): constraints.txt setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,benchmarks]'
	touch $@

demo: $(STAMP)
	$(BIN)/python launch/demo.py --minutes $(MINUTES)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dalle_scale launch data_tools

# a file's tests stay on one worker, which share what they have set up; two threads in each of two processes would
# wait for each other most of the time
SHARED := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
quick: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest $(SHARED) -m 'not slow and not distributed and not long'

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest $(SHARED)

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest $(SHARED) -m ''

test-processors: $(STAMP)
	$(BIN)/python tests/processors.py $(VARIANT) --workers $(WORKERS) $(PART:%=--part %) $(SEED:%=--seed %)

wheel: $(STAMP)
	rm -rf build
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info runs
