# Every command makes and reuses .venv in this folder. Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --durations 5

.DEFAULT_GOAL := help
.PHONY: help install bench speed test test-all test-peers test-oldest gpu rehearse tune lint format docs kernels-report dist clean

help: ## what the commands are
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## the virtual environment: torch, the contenders and this package, editable (about 5 GB)

# Twice: a build in an environment of its own, which is what pip makes, sees no PyTorch and so builds no CUDA extension.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else \
	  "fastvit is tested on Python 3.11 to 3.13, and %s is %d.%d. Choose another: make PYTHON=python3.11 ..." \
	  % ((sys.executable,) + tuple(v)))'
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	FASTVIT_BUILD_CUDA=0 $(PY) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(PY) -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(PY) -m fastvit env | grep -A 1 '^extension'
	@touch $@

bench: $(STAMP) ## ViT-B/16 from fastvit, timm, torchvision and Hugging Face beside a ResNet-50, on this device
	$(PY) -m benchmarks throughput --models vit_base_patch16_224 resnet50 --sizes 224 --modes inference \
	  --contenders timm fastvit torchvision huggingface --budget 12
	$(PY) -m benchmarks report --results bench-out --out bench-out/report --no-readme

speed: $(STAMP) ## micro-benchmarks of every op and backend (pytest-benchmark)
	$(PY) -m pytest benchmarks --benchmark-only

# Three test processes, since one can't both compile Triton kernels and interpret them, and in the one that emulates the
# CUDA kernels CPU tensors reach kernels. All parts always run.
define run-tests
	@status=0; \
	$(MAKE) --no-print-directory lint || status=1; \
	echo "== compiled, and on the CPU"; $(PYTEST) $(1) tests --ignore tests/interpreted --ignore tests/emulated || status=1; \
	echo "== CUDA kernels on the CPU"; $(PYTEST) $(1) tests/emulated || status=1; \
	echo "== launches, bytes and registers against the baseline"; \
	$(PY) -m benchmarks static --out bench-out/static || status=1; \
	echo "== Triton kernels in the interpreter"; TRITON_INTERPRET=1 $(PYTEST) $(1) tests/interpreted || status=1; \
	exit $$status
endef

test: $(STAMP) ## lint, types and every test that takes seconds; GPU tests too where there is one
	$(call run-tests,)

test-all: $(STAMP) ## the same and the tests that take minutes
	$(call run-tests,-m "")

test-peers: $(STAMP) ## timm's and transformers' own model tests on our models
	$(PY) tests/check_peers.py

test-oldest: $(STAMP) ## the CUDA extension imported under the oldest PyTorch supported (downloads it: 3 GB)
	$(PY) tests/check_oldest.py

# On a machine with a GPU, without a network: the Python that is there, with its PyTorch and Triton, and no .venv.
gpu: ## on a CUDA device: tests, every benchmark, README's tables; DRY=1 lists the stages, ONLY="a b" picks some
	$(PYTHON) benchmarks/stages.py $(if $(DRY),--dry-run) $(if $(ONLY),--only $(ONLY))

rehearse: $(STAMP) ## the stages of make gpu on a CPU at toy size, into bench-out/rehearsal
	$(PY) benchmarks/stages.py --rehearse bench-out/rehearsal
	$(PY) benchmarks/stages.py --rehearse bench-out/rehearsal --tune

tune: ## the same way: measure the tiles of this GPU into kernels/triton/tables/measured; DRY=1, ONLY="a b"
	$(PYTHON) benchmarks/stages.py --tune $(if $(DRY),--dry-run) $(if $(ONLY),--only $(ONLY))

# Imports are linted where fastvit.triton is a folder of the package, as it is in a wheel.
lint: $(STAMP) ## ruff, mypy and the layers of imports
	@status=0; set -x; \
	$(VENV)/bin/ruff check . || status=1; \
	$(VENV)/bin/ruff format --check . || status=1; \
	$(VENV)/bin/mypy || status=1; \
	rm -rf build/lint; \
	FASTVIT_BUILD_CUDA=0 $(PY) setup.py --quiet build_py --build-lib build/lint 2> /dev/null || status=1; \
	(cd build/lint && PYTHONPATH=../.. ../../$(VENV)/bin/lint-imports --no-logo ../../pyproject.toml) || status=1; \
	exit $$status

format: $(STAMP) ## put the code in order as ruff has it
	$(VENV)/bin/ruff check --fix-only --quiet .
	$(VENV)/bin/ruff format .

docs: $(STAMP) ## the documentation as a site in build/docs; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

kernels-report: $(STAMP) ## registers, spills and instructions of every CUDA kernel, as compiled (needs no GPU)
	$(PY) -m csrc.compile_report

dist: $(STAMP) ## sdist and wheel, checked: contents, and an install of the wheel into an empty environment
	$(PY) tests/check_dist.py

clean: ## everything that the other commands made
	rm -rf $(VENV) fastvit/_C.*so build dist bench-out *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
