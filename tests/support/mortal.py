"""Started by tests, once for each rank: a program that keeps a log and in which something goes wrong.

mortal.py <run> sums | hang | raise | quiet
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from dalle_scale import dist, log, rank_log


def main() -> None:
    run, what = Path(sys.argv[1]), sys.argv[2]
    rank_log.start(run)
    dist.join()
    rank_log.watch()
    for _ in tqdm(range(50), mininterval=0):
        pass
    log.say("a line of rank 0")
    print(f"one of rank {dist.rank()}", file=sys.stderr, flush=True)
    os.write(1, b"one from C\n")
    subprocess.run(["echo", "one of a child"], check=True)
    if what == "raise" and dist.rank() == 1:
        raise ValueError("one rank is unlike the others")
    if what == "hang":
        time.sleep(1000)
    while what != "quiet":
        dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    log.guarded(main)
