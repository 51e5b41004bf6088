# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The policies behind `scheduling.policy.Policy`: monolithic baselines, DiFlow's, and ours."""
