# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What `make bench` measures: us and a peer in turn, in one run, as ratios of medians."""
