# Every command makes and reuses .venv in this folder. Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --durations 5

.DEFAULT_GOAL := help
.PHONY: help install bench test test-all test-peers gpu lint format dist clean

help: ## what the commands are
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## the virtual environment: torch, the peers and this package, editable (about 5 GB)

$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else \
	  "fastvit is tested on Python 3.11 to 3.13, and %s is %d.%d. Choose another: make PYTHON=python3.11 ..." \
	  % ((sys.executable,) + tuple(v)))'
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

bench: $(STAMP) ## throughput of fastvit beside timm, torchvision, Hugging Face and a ResNet, on this device
	$(PY) -m benchmarks throughput

# Two test processes, since one can't both compile Triton kernels and interpret them. All parts always run.
define run-tests
	@status=0; \
	$(MAKE) --no-print-directory lint || status=1; \
	echo "== compiled, and on the CPU"; $(PYTEST) $(1) tests --ignore tests/interpreted || status=1; \
	echo "== Triton kernels in the interpreter"; TRITON_INTERPRET=1 $(PYTEST) $(1) tests/interpreted || status=1; \
	exit $$status
endef

test: $(STAMP) ## lint, types and every test that takes seconds; GPU tests too where there is one
	$(call run-tests,)

test-all: $(STAMP) ## the same and the tests that take minutes
	$(call run-tests,-m "")

test-peers: $(STAMP) ## timm's own model tests on our models
	$(PY) tests/check_timm.py

gpu: $(STAMP) ## on a CUDA device: its tests, the benchmark, and the tables in README.md
	@$(PY) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else \
	  "make gpu needs a CUDA device, and PyTorch sees none (torch.cuda.is_available() is False)")'
	$(PY) -m pytest -m gpu tests --ignore tests/interpreted
	$(PY) -m benchmarks throughput --device cuda --keep
	$(PY) -m benchmarks tables

lint: $(STAMP) ## ruff and mypy
	@status=0; set -x; \
	$(VENV)/bin/ruff check . || status=1; \
	$(VENV)/bin/ruff format --check . || status=1; \
	$(VENV)/bin/mypy || status=1; \
	exit $$status

format: $(STAMP) ## put the code in order as ruff has it
	$(VENV)/bin/ruff check --fix-only --quiet .
	$(VENV)/bin/ruff format .

dist: $(STAMP) ## sdist and wheel, checked: contents, and an install of the wheel into an empty environment
	$(PY) tests/check_dist.py

clean: ## everything that the other commands made
	rm -rf $(VENV) build dist bench-out *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
