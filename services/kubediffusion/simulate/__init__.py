# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A fleet that exists only as events: drives the policies of `scheduling` with profiles and traces.

No I/O, no clock, no global randomness: the same arguments give the same result.
"""
