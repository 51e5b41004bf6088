# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Train, export and measure a tiny SD3 pipeline on captioned shapes."""
