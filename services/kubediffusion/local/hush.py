# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Imported first by the fork server, and by nothing else: its output goes nowhere.

The server inherits the user's terminal, and the libraries it imports have things to say. Each node
logs to a file of its own; what fails here fails there again.
"""

import os

_nowhere = os.open(os.devnull, os.O_WRONLY)
for _stream in (1, 2):
    os.dup2(_nowhere, _stream)
os.close(_nowhere)
