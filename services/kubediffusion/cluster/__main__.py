# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from kubediffusion.cluster import main

if __name__ == "__main__":
    main()
