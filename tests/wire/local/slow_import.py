# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Takes as long to import as a test may wait for it, and longer: like torch on a busy machine."""

import time

time.sleep(600)
