"""A training step of diffusion and the sampling of images, beside diffusers and denoising-diffusion-pytorch.

    python benchmarks/diffusion.py

Ours and diffusers' are the paper's net for CIFAR-10 (35.7 million parameters). That of denoising-diffusion-pytorch has
other blocks and at the same channels and multipliers fewer parameters, so it stands also beside ours with about as many
(3 % more).

The sides run on one thread, each in a process of its own that waits while the others work, in turn, repetition after
repetition; a figure is the median over the repetitions, each of which ran them all. Processor time is there for busy
machines. Writes benchmarks/results/diffusion.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from environment import describe, peer
from sides import Sides, compared

from dalle_scale import log

RESULT = Path(__file__).parent / "results" / "diffusion.json"
# what the peers need to be imported and the project does not have; others of their requirements are not needed here
PACKAGES = ("diffusers==0.42.1", "denoising-diffusion-pytorch==2.3.4", "einops==0.8.1", "ema-pytorch==0.7.9",
            "accelerate==1.12.0", "pytorch-fid==0.3.0", "scipy==1.17.1")  # fmt: skip
PAPER = {"width": 128, "multipliers": [1, 2, 2, 2], "dropout": 0.1}
OURS = {"side": "ours", "net": PAPER, "blocks": 2, "attention_sizes": [16], "optimizer": "adam"}
SIDES: dict[str, dict[str, Any]] = {
    "diffusers": {**OURS, "side": "diffusers"},
    "denoising-diffusion-pytorch": {"side": "denoising-diffusion-pytorch", "net": PAPER},
    "ours": OURS,
    "ours, engine's optimizer": {**OURS, "optimizer": "engine"},
    "ours, narrower": {**OURS, "net": {**PAPER, "width": 116}, "optimizer": "engine"},
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 2], help="batch sizes")
    parser.add_argument("--steps", type=int, default=4, help="of DDIM")
    args = parser.parse_args()
    python = str(peer("diffusion", "--no-deps", *PACKAGES))
    shapes = {f"{count} samples": compare(python, count, args.steps, args.repetitions) for count in args.samples}
    result = {"peers": PACKAGES[:2], "steps_of_ddim": args.steps, **shapes, **describe()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def compare(python: str, samples: int, steps: int, repetitions: int) -> dict[str, Any]:
    """All sides at one batch size."""
    program = str(Path(__file__).with_name("diffusion_side.py"))
    commands = {
        name: [
            sys.executable if side["side"] == "ours" else python,
            program,
            json.dumps({**side, "samples": samples, "steps": steps}),
        ]
        for name, side in SIDES.items()
    }
    with Sides(commands) as sides:
        parameters = {name: sides.ask(name, "parameters") for name in SIDES}
        answers = {action: sides.measure(action, repetitions) for action in ("step", "sample")}
        memory = {name: sides.ask(name, "memory") for name in SIDES}
    beside = {
        action: {theirs: compared(clocks, theirs) for theirs in ("diffusers", "denoising-diffusion-pytorch")}
        for action, clocks in answers.items()
    }
    return {
        name: {
            "parameters": parameters[name],
            "peak_mebibytes": round(memory[name] / 2**20, 1),
            **{
                action: {
                    "seconds": rows["diffusers"][name]["seconds"],
                    "processor_seconds": rows["diffusers"][name]["processor_seconds"],
                    **{
                        f"times_as_fast_as_{theirs}": {
                            "wall": row[name]["times_as_fast"],
                            "processor": row[name]["times_as_fast_by_processor_time"],
                            "processor_lowest": row[name]["times_as_fast_by_processor_time_lowest"],
                        }
                        for theirs, row in rows.items()
                    },
                }
                for action, rows in beside.items()
            },
        }
        for name in SIDES
    }


if __name__ == "__main__":
    log.guarded(main)
