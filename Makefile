# Every target sets up what it needs; a second run is quick.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint fmt bench protos generate clean

help:  ## Show this help
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  \033[1m%-10s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo:  ## Draw "a red circle above a blue square" into out/demo.png through real model nodes
	@scripts/demo

test:  ## The tests
	@scripts/test

test-all:  ## The tests and the longer studies
	@scripts/test --all

lint:  ## ruff, pyright, import-linter; generated files equal the committed ones
	@scripts/lint

fmt:  ## Format the code
	@scripts/env lint && .venv/bin/ruff check -q --fix . && .venv/bin/ruff format -q .

bench:  ## Measure us against our peers; tables, CSV and plots under benchmarks/results/
	@scripts/bench

protos:  ## Generate the Python code of protos/
	@scripts/env lint && scripts/protos

generate:  ## Generate the JSON Schema and the CRDs from the types
	@scripts/env node && scripts/generate

clean:  ## Remove the environment and outputs
	rm -rf .venv out .pytest_cache .ruff_cache
