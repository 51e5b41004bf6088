# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Generated from protos/ by `make protos`; do not edit."""
