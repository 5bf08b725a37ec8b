# Everything from a machine with only Python 3.11+ and make. `make help` lists the targets; `make phase1` and
# `make test` set up what they need.
#   make setup PYTHON=python3.12      another interpreter
#   make setup EXTRA=                 without the test and lint tools
#   make phase1 PARAMETERS=parameters/phase1_gpu.yaml

PYTHON     ?= python3
VENV       ?= .venv
EXTRA      ?= dev
NOTEBOOK   ?= notebooks/phase1.ipynb
PARAMETERS ?= parameters/phase1.yaml
ARGS       ?=

PY      := $(VENV)/bin/python
STAMP   := $(VENV)/.installed-$(if $(EXTRA),$(EXTRA),base)

.DEFAULT_GOAL := help
.PHONY: help setup phase1 notebooks smoke test faults lint figures audit readme lab clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv with everything in it (done once; the other targets call it)

phase1: setup  ## train the bridge on the embedded pair (CPU): run folder, executed notebook, figures, verdict
	$(PY) -m bridgekit run $(NOTEBOOK) -f $(PARAMETERS) $(ARGS)

notebooks: setup  ## execute every notebook with its small parameters (CPU, some minutes each)
	@for name in phase1 ablation swap diagnostics headline paper preserved benchmark; do \
	  file=parameters/$$name.yaml; \
	  $(PY) -m bridgekit run notebooks/$$name.ipynb $$(test -f $$file && echo -f $$file) || exit 1; \
	done

smoke: setup  ## every notebook that runs something, in about a minute each: does every part work?
	$(PY) tests/run_smoke.py $(ARGS)

test: setup  ## run the tests (CPU, offline); one process per core, one thread each; ARGS="-m slow" the long ones
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 $(ARGS)

faults: setup  ## kill real runs again and again, go on with them, and compare every byte (some 20 minutes)
	OMP_NUM_THREADS=1 $(PY) tests/faults.py $(ARGS)

lint: setup  ## ruff on modules and notebooks; notebooks are stored without outputs
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m nbstripout --verify notebooks/*.ipynb

figures: setup  ## draw the figures of the kept runs again, from their data
	$(PY) -m bridgekit run notebooks/headline.ipynb $(ARGS)
	$(PY) -m bridgekit run notebooks/paper.ipynb $(ARGS)
	$(PY) -m bridgekit run notebooks/preserved.ipynb $(ARGS)
	$(PY) -m bridgekit run notebooks/benchmark.ipynb $(ARGS)

audit: setup  ## recompute every claim from its data
	$(PY) -m bridgekit audit $(ARGS)

readme: setup  ## write README.md and RESULTS.md again, their numbers from the kept runs
	$(PY) -m bridgekit readme $(ARGS)

lab: setup  ## open JupyterLab on the project
	$(PY) -m jupyter lab $(ARGS)

clean:  ## remove the environment and the caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is not Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	  || { echo "error: $(PYTHON) comes without venv: install it (Debian: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(PY)
	@.ci/install $(PY) $(EXTRA)
	@rm -f $(VENV)/.installed-* && touch $@
