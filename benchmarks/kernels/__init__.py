# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Measurements of `shiva_kernels`: a module for each kernel, as in `shiva_kernels/ops/`.

`soft_rank`, `gather` and `scatter` know their peers and their samples. `cpu` runs them here, `gpu`
on a GPU (`make bench-gpu`), `compiled` shows what the compiler makes of the kernels without one.
`flips` and `synthetic` ask what the gradient estimators are worth.
"""
