# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Measurements of `shiva_kernels`: a module for each kernel, as in `shiva_kernels/ops/`.

soft_rank, gather, scatter   each against its peers; `memory` and CPU time here, GPU time there
compiled                     what the compiler makes of the kernels, without a GPU
gpu                          all three on a GPU: `make bench-gpu`
flips, synthetic             what the gradient estimators are worth
"""
