# Everything from a machine with only Python 3.11+ and make. `make help` lists the targets.
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
.PHONY: help setup phase1 smoke test lint lab clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv with everything in it (done once; the other targets call it)

phase1: setup  ## train the bridge on the embedded pair (CPU): run folder, executed notebook, figures, verdict
	$(PY) -m bridgekit.cli run $(NOTEBOOK) -f $(PARAMETERS) $(ARGS)

smoke: setup  ## the same notebook in under a minute: does every part run?
	$(PY) -m bridgekit.cli run $(NOTEBOOK) -f parameters/phase1_smoke.yaml $(ARGS)

test: setup  ## run the tests (CPU, offline); one process per core, one thread each
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 $(ARGS)

lint: setup  ## ruff on modules and notebooks; notebooks are stored without outputs
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m nbstripout --verify notebooks/*.ipynb

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
