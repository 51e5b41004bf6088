# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The operator: DiffusionWorkflows become model nodes, kept so by one plan for each namespace."""
