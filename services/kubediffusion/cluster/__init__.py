# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A gateway that follows a Kubernetes cluster.

    api        the Kubernetes API in plain dicts
    watch      a mirror of objects of one kind, kept up for ever
    view       objects -> which workflows to serve on which nodes; pure
    follow     the mirrors, the view, and the gateway that is told
    main       the process around it: `flags`, doors, signals

`api` and `watch` know nothing of gateways: the operator uses them too.
"""


def main() -> None:
    """The console script `kubediffusion-gateway`."""
    from kubediffusion.cluster.main import main as run

    run()


__all__ = ["main"]
