# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Training of Shiva-DiT's router, ratio policy and adapter, and the study that compares arms.

Needs the `train` extra. `kubediffusion shiva train` is the way in from a shell.
"""
