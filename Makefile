# Every target sets up what it needs; a second run is quick.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test test-all e2e lint fmt bench bench-gpu study paper paper-full protos generate images clean

help:  ## Show this help
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  \033[1m%-10s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo:  ## Draw "a red circle above a blue square" into out/demo.png through real model nodes
	@scripts/demo

test:  ## The tests: units, real processes, a real API server
	@scripts/test

test-all:  ## The tests and the longer studies, also those on a real cluster (root)
	@scripts/test --all
	@scripts/e2e --all

e2e:  ## The whole way on a real cluster of this machine (root): kubelet, containerd, helm, Prometheus
	@scripts/e2e

lint:  ## ruff, pyright, import-linter; generated files equal the committed ones
	@scripts/lint

fmt:  ## Format the code
	@scripts/env lint && .venv/bin/ruff check -q --fix . && .venv/bin/ruff format -q .

bench:  ## Measure us against our peers; tables, CSV and plots under benchmarks/results/
	@scripts/bench

bench-gpu:  ## Measure the Triton kernels beside eager and inductor, on a machine with an NVIDIA GPU
	@scripts/env bench,test && .venv/bin/python -m benchmarks.kernels.gpu

study:  ## Compare estimators and arms of token pruning: six CPU hours; started again, it goes on
	@scripts/env train && OMP_NUM_THREADS=1 .venv/bin/kubediffusion shiva study $(STUDY)

paper:  ## Every scheduling policy on the published settings, in the simulator
	@scripts/paper

paper-full:  ## And its variations: lost GPUs, several gateways, pruning, pinned loads, less memory
	@scripts/paper --full

protos:  ## Generate the Python code of protos/
	@scripts/env lint && scripts/protos

generate:  ## Generate the JSON Schema and the CRDs from the types
	@scripts/env node && scripts/generate

images:  ## Build the images of the control plane and of a CPU node with buildah (root)
	@scripts/cluster/packages && scripts/cluster/image control-plane node-cpu

clean:  ## Remove the environment and outputs
	rm -rf .venv out .pytest_cache .ruff_cache
