# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Text-to-image diffusion, served a model at a time."""

__version__ = "0.1.0"
