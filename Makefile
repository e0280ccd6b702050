# Everything on a machine with Python 3.11, pip, make and git: each target sets up what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
# Small models are fastest with one torch thread per process; the tests run two processes side by side.
TEST_PROCESSES ?= 2
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test check format test-lowest clean

demo: $(VENV)/.ready
	$(BIN)/mavis demo

test: check
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The suite at the declared lower bounds of everything but torch, in an environment of its own.
test-lowest:
	$(MAKE) VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt .venv-lowest/.ready
	.venv-lowest/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

CONSTRAINTS ?= constraints.txt
$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-lowest outputs multirun
