# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The same workflow file on one machine, without Kubernetes.

plan        which node processes, with which models and threads     pure
restart     when a dead node is started again                       pure
folders     a run's private files, and the sweeping of old ones
process     node processes from a fork server that has torch imported
supervisor  keeps the planned nodes alive and loaded; the planner of one machine
runtime     all of it with a gateway, as an async context manager
"""

from kubediffusion.local.folders import RunState, running
from kubediffusion.local.runtime import LocalRuntime
from kubediffusion.local.supervisor import NodePhase, NodeReport, Supervisor

__all__ = ["LocalRuntime", "NodePhase", "NodeReport", "RunState", "Supervisor", "running"]
