# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The operator: DiffusionWorkflows become model nodes, kept so by one plan for each namespace.

cluster      what is there: every object that matters, in memory, by list and watch
queueing     which namespaces are to be looked at: one mark each, debounced
reconciling  one namespace: observe, plan, carry out
planning/    what it should hold, from what it holds                                        pure
holding      which writes rest for a while                                                  pure
writing      server-side apply and its retries; `events` on what a user looks at
resolver     workflows looked up in their sources, in threads
residency    running nodes told what to host
autoscaler/  how many replicas, from Prometheus
health       /healthz and /readyz
process      these parts put together; `frame` is kopf around them, `flags` the command line
"""


def main() -> None:
    """The console script `kubediffusion-operator`."""
    from kubediffusion_operator.frame import main as run

    run()
