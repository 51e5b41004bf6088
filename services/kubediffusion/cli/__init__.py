# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The command line: `kubediffusion`, also installed as `kubectl-diffusion`.

    app        the commands and their options; everything heavier is imported by the one that runs
    inputs     what a user typed, as the workflow's typed inputs
    run, up, remote, check    one command's work each
    revisions  a workflow's revisions in a cluster
    progress, screens         what is seen
    shell      exit codes, errors and signals

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""


def main() -> None:
    from kubediffusion.cli.app import app

    app()
