"""Savings and costs of compressing gradients between nodes, at the paper's ratio: bytes, and the loss.

    python benchmarks/compression.py
    python benchmarks/compression.py --images cifar10_train.tar

Two nodes of two ranks each, as four processes on this one, started by the deepspeed launcher (compression_side.py).
The rank of PowerSGD is the largest with which 85 % of the bytes between nodes are saved (DALL-E, arXiv 2102.12092,
Table 1: 83 to 86 %), what travels whole included. Bytes are counted: what rank 0 gives to collectives between nodes.

The toy world is nearly determined by its captions, so its loss is small, and 1 % of it little; photographs, of a tar
with a folder for each class, are as uncertain as what such models are made for. Takes 35 minutes. Writes
benchmarks/results/compression.json and .png, or compression_images.json and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from environment import describe

from dalle_scale import log

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def main() -> None:
    """Train, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--images", type=Path, metavar="TAR", help="in place of the toy world")
    args = parser.parse_args()
    images = str(args.images.resolve()) if args.images else None
    name = RESULTS / ("compression_images" if images else "compression")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "plan.json").write_text(json.dumps({"steps": args.steps, "images": images}))
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "-q", "--num_gpus", "4", "--master_port", "29617"]
        command = [*launcher, str(HERE / "compression_side.py"), str(folder)]
        subprocess.run(command, env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}, check=True)
        found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    curves, mib, loss = found.pop("curves"), found["mib_between_machines"], found["held_out_nats"]
    result = {
        "steps": args.steps,
        **found,
        "share_of_bytes_saved": round(1 - mib["compressed"] / mib["exact"], 4),
        "loss_by_exact": round(loss["compressed"] / loss["exact"], 5),
        **describe(),
    }
    name.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    draw(curves, loss, name.with_suffix(".png"))
    log.say(json.dumps({key: result[key] for key in ("held_out_nats", "loss_by_exact", "share_of_bytes_saved")}))


def draw(curves: dict[str, list[float]], held_out: dict[str, float], path: Path) -> None:
    """Both curves, each a running mean of 50 steps."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for name, curve in curves.items():
        smooth = np.convolve(curve, np.ones(50) / 50, mode="valid")
        axes.plot(np.arange(len(smooth)) + 50, smooth, linewidth=1, label=f"{name}: {held_out[name]:.4f}")
    axes.set(xlabel="steps", ylabel="loss, nats a token", yscale="log")
    axes.legend(title="loss on held-out images")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    log.guarded(main)
