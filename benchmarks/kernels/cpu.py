# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The operations on a CPU beside their peers: bytes kept for backward, and CPU time.

python -m benchmarks.kernels.cpu [--rounds 21] [--out benchmarks/results/kernels_cpu.csv]
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.common import RESULTS, machine, write_csv
from benchmarks.kernels import gather, scatter, soft_rank
from benchmarks.run import table

OUT = RESULTS / "kernels_cpu.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for op in (soft_rank, gather, scatter) for row in op.run(arguments.rounds)]
    write_csv(rows, arguments.out, f"{datetime.date.today()}  {machine()}")
    Console(width=150).print(table(rows))


if __name__ == "__main__":
    main()
