# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors

BIN := .venv/bin
MODEL := smollm2-135m-instruct
CONFIG := smollm2-135m
TREE := build/tree
# Of what is not committed, the time tells one build from the next.
COMMIT = $(or $(VLLM_SPARSE_COMMIT),$(shell git describe --always --abbrev=12 --exclude='*' \
  --dirty=.d$$(date -u +%Y%m%dt%H%M%S)))
# A GPU host need not have .venv: its Python then has what a GPU needs.
PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)

.DEFAULT_GOAL := help
.PHONY: help setup wheel demo serve test test-fast lint style tree types layers site dockerfile docs tables report format bench soak fuzz sanitize metrics-check serve-matrix contract gpu-first gpu-check gpu-bench gpu-tune gpu-walk clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Create .venv with vLLM, the plugin and the tools (does nothing if up to date)
	@scripts/setup.sh

demo: setup ## Compare stock vLLM and ROCKETKV on a long document
	@$(BIN)/vllm-sparse demo

serve: setup ## Serve the demo model with ROCKETKV on port 8000
	@model=$$($(BIN)/vllm-sparse fetch-model $(MODEL)) && \
	$(BIN)/vllm serve "$$model" --served-model-name $(MODEL) --dtype bfloat16 \
		--kv-cache-memory-bytes 1G --attention-backend ROCKETKV \
		--additional-config '{"vllm_sparse": {"config": "$(CONFIG)"}}'

test: setup ## Run all tests that this machine can run
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-fast: setup ## Run the tests that need no engine, no model and little time
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not vllm and not model"

lint: setup style types layers site dockerfile ## Check style, types, layers, the documentation's links and the Dockerfile

style:
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# The package as it is installed: tools that read the sources do not know how it is mapped.
tree:
	@rm -rf $(TREE) && mkdir -p $(TREE)
	@cp -a vllm_sparse $(TREE) && cp -a kernels configs $(TREE)/vllm_sparse

types: tree
	@cd $(TREE) && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache

layers: tree
	@cd $(TREE) && ../../$(BIN)/lint-imports --no-cache --no-logo ../../pyproject.toml

# Any warning ends it; --quiet would hide them even from --strict.
site:
	@said=$$(NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict 2>&1) || { echo "$$said"; exit 1; }

dockerfile:
	@$(BIN)/hadolint Dockerfile

docs: setup site ## Build the documentation into build/site
	@echo "build/site/index.html"

tables: setup ## Write the tables of README.md and docs/ anew, from code and result files
	@$(BIN)/python -m scripts.pages

report: setup ## Draw the pictures of the results anew
	@$(BIN)/python -m benchmarks.pictures

format: setup ## Format the code and fix what can be fixed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup ## Measure the published results again, into build/results (options: ARGS="--only capacity", "--quick")
	@$(BIN)/python -m benchmarks.run_all $(ARGS)

soak: setup ## Soak a server with hard traffic and kills (options: ARGS="--backend SPARDA --minutes 10")
	@$(BIN)/python -m benchmarks.soak $(ARGS)

fuzz: setup ## Send a server generated requests, right and wrong (options: ARGS="--backend SPARDA --minutes 5")
	@$(BIN)/python -m benchmarks.fuzz $(ARGS)

serve-matrix: setup ## Serve each row of the table of features once, beside stock vLLM (options: ARGS="--rows LoRA")
	@$(BIN)/python -m benchmarks.served $(ARGS)

sanitize: setup ## Run the tests of the C++ kernels under GCC's sanitizers (options: ARGS="tests/kernels/test_decode.py")
	@scripts/sanitize.sh $(ARGS)

metrics-check: setup ## Ask a real Prometheus every query of the dashboard, and check the alerts
	@$(BIN)/python -m pytest -q -s -n 0 tests/metrics/live_check.py $(ARGS)

contract: setup ## Compare what we use of vLLM with another version's wheel from PyPI (options: VLLM=0.33.0)
	@scripts/contract.sh $(or $(VLLM),0.33.0)

wheel: setup ## Build the plugin's wheel into dist/, for a machine without a network
	@rm -f dist/vllm_sparse-*.whl
	@VLLM_SPARSE_COMMIT=$(COMMIT) $(BIN)/python -m pip wheel -q --no-deps --no-build-isolation --wheel-dir dist .

gpu-first: ## The first ten minutes on a GPU: checks and the cells that matter (options: ARGS="...")
	@$(PYTHON) -m benchmarks.gpu.first $(ARGS)

gpu-check: ## Check installation, kernels and engines on a GPU (options: ARGS="...")
	@$(PYTHON) -m benchmarks.gpu.check $(ARGS)

gpu-bench: ## Measure kernels and engines on a GPU against stock vLLM (options: ARGS="--part rocketkv")
	@$(PYTHON) -m benchmarks.gpu.bench $(ARGS)

# Stages that need what only a GPU has are left out.
gpu-walk: setup ## Walk the stages of gpu-first on a pretended GPU (options: ARGS="...", PROGRAMS="check bench tune")
	@for program in $(or $(PROGRAMS),first); do \
	  GPU_WALK=$$program $(PYTHON) -m tests.support.gpu_walk --out build/gpu-walk $(ARGS) || exit 1; done

gpu-tune: ## Find faster kernel launches for this GPU and install them (options: ARGS="...")
	@$(PYTHON) -m benchmarks.gpu.tune $(ARGS)

clean: ## Remove builds and caches, but not .venv
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find vllm_sparse kernels configs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
