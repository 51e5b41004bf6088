# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Live faults under open-loop load: nodes killed, paused, slowed and cut off, a gateway killed.

python -m benchmarks.chaos [--seconds 600] [--requests 10000] [--model standin|tiny-sd3] [--seed 1]

Real node processes (two of each stage) behind relays that can be cut, two gateway processes that
share a job database. Requests come whether or not earlier ones are done, and each is either a
stream, which its client sends again with the same key when its gateway dies, or a job. What must
hold: every request that was accepted gives its picture, the bytes of an undisturbed run, within its
deadline; a lost node costs no stream more steps than lie between two checkpoints; and in the end
nothing is left on any node. Which faults come, and when, follows from the seed.
"""
