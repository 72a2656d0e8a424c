"""What needs a GPU to be shown, each in a call of less than ten minutes on one of 141 GB.

    python benchmarks/gpu.py step           one training step of the 12-billion-parameter model, and its memory
    python benchmarks/gpu.py states         1.3 billion parameters in bf16, in fp16 with scales, with fp32 states
    python benchmarks/gpu.py training       share of the matrix rate at 1.3 billion; tokens/s beside peers
    python benchmarks/gpu.py sampling       512 candidates of a caption from the 12-billion-parameter model
    python benchmarks/gpu.py autoencoders   steps of the dVAE and of diffusion, beside peers

Each writes benchmarks/results/gpu_<name>.json; `states` also .png. A result has the rate of a bf16 matrix product that
was measured in the same run, and all seconds are of the clock, once the GPU has done its work. Peers are installed into
environments of their own unless they are already there; where that fails, their row says so.

`--toy --device cpu` runs the same code in seconds on tiny models, to see that it works; its numbers mean nothing, and
it writes only where --out says.
"""

from __future__ import annotations

import argparse
import importlib
from dataclasses import fields, replace
from pathlib import Path

import gpu_clock
from environment import ROOT

from dalle_scale import log
from dalle_scale.types import UserError

RESULTS = ROOT / "benchmarks" / "results"
MEASUREMENTS = ("step", "states", "training", "sampling", "autoencoders")


def main() -> None:
    """Measure, write, print."""
    args = parse_args()
    device = gpu_clock.open_device(args.device)
    if args.device == "cpu" and not args.toy:
        raise UserError("--device: cpu takes days for models of this size; add --toy")
    out = args.out or (None if args.toy else RESULTS / f"gpu_{args.name}.json")
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out: {out.parent} is no folder; make it first")
    measurement = importlib.import_module(f"gpu_{args.name}")  # and with it the engine, which asks for the device
    measurement.measure(sizes(args, measurement), device, gpu_clock.Report(out, device))


def sizes(args: argparse.Namespace, measurement: object) -> object:
    """Those of the measurement with what the command line changes. Raises UserError."""
    chosen = measurement.TOY if args.toy else measurement.FULL  # type: ignore[attr-defined]
    known = {field.name for field in fields(chosen)}
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    for name, value in given.items():
        if name not in known:
            taken = ", ".join(f"--{option}" for option in OPTIONS if option in known)
            raise UserError(f"--{name}: not of '{args.name}', which takes {taken}")
        if value < 1:
            raise UserError(f"--{name}: {value} is below 1")
    return replace(chosen, **given, **({"install": False} if args.no_install and "install" in known else {}))


OPTIONS = {
    "samples": "in a micro-batch, or images sampled at a time",
    "accumulation": "micro-batches a step",
    "steps": "of each training",
    "candidates": "of the caption",
    "repetitions": "timed calls, of which the median counts",
}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MEASUREMENTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="tiny models")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--no-install", action="store_true", help="only peers that are already there")
    for option, what in OPTIONS.items():
        parser.add_argument(f"--{option}", type=int, help=what)
    return parser.parse_args()


if __name__ == "__main__":
    log.guarded(main)
