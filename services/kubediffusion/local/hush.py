# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Imported first by the fork server, and by nothing else: what it says goes nowhere, what stops its
whole process group does not stop it, and it does not look for garbage.

The server inherits the user's terminal, and the libraries it imports have things to say. Each node
logs to a file of its own; what fails here fails there again. SIGTERM or SIGHUP often goes to all
processes of a group (a service manager's stop, `timeout`, a closed terminal); the nodes must
outlive it to drain, and they cannot outlive the server, which ends with the supervisor anyway.

Four thousand modules make half a million objects, nearly all to stay: walking them again and again
while they come is a fifth of the time that importing takes. A node collects its own garbage.
"""

import gc
import os
import signal

_nowhere = os.open(os.devnull, os.O_WRONLY)
for _stream in (1, 2):
    os.dup2(_nowhere, _stream)
os.close(_nowhere)
for _number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(_number, signal.SIG_IGN)
gc.disable()
