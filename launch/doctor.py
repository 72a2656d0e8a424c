"""Find faults of a cluster before anything is trained on it.

    deepspeed --hostfile hosts launch/doctor.py --run /shared/runs/mine
    deepspeed --num_gpus 8 launch/doctor.py --run runs/mine

Who does not arrive within --timeout-seconds is named. Then all ranks are compared: versions, this library's source,
devices and their free memory, variables such as NCCL_*, clocks, and whether --run is one folder for all. An all-reduce
must give the right sum; arithmetic and the links of a ring of ranks are timed, and whoever stays below --slow-below
times the median is named. Prints a table and a line for each defect; exit code 3 if there is one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from dalle_scale import dist, log
from dalle_scale.arguments import Parser, above_zero, share
from dalle_scale.cluster import diagnostics


def main() -> None:
    """Examine, print, and end all ranks with the same exit code."""
    args = parse_args()
    report = diagnostics.examine(args.run, args.timeout_seconds, args.slow_below)
    num_defects = torch.zeros(1)
    if report:
        log.say(diagnostics.table(report))
        for defect in report.defects:
            print(f"error: {defect}", file=sys.stderr, flush=True)
        num_defects[0] = len(report.defects)
    if dist.broadcast(num_defects).item():
        dist.leave()
        sys.exit(3)
    log.say(f"all is well: {dist.world_size()} ranks")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs"), help="folder that all ranks must share")
    parser.add_argument("--timeout-seconds", type=above_zero, default=60.0, help="for each part")
    parser.add_argument("--slow-below", type=share, default=0.5, help="share of the median that is too slow")
    parser.add_local_rank()
    args = parser.parse_args()
    return args


if __name__ == "__main__":
    log.guarded(main)
