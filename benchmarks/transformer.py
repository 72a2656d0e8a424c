"""A training step of the text+image transformer, beside DALLE-pytorch and a GPT-2 of transformers.

    python benchmarks/transformer.py

4 layers of width 256 with 8 heads, 256 caption tokens of 16,384 and 32x32 codes of 8192; row, column, row and conv
attention, and full attention for DALLE-pytorch once more. fp32, AdamW. Each side is a process of its own on one thread
that waits while the others work, in turn, repetition after repetition. DALLE-pytorch keeps its defaults (rotary
embeddings, shifted tokens, gated MLPs), so it has more parameters. Writes benchmarks/results/transformer.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from autoencoders import DALLE_PYTORCH, DALLE_PYTORCH_NEEDS
from environment import describe, peer
from sides import Sides, compared

from dalle_scale import log

RESULT = Path(__file__).parent / "results" / "transformer.json"
PAPER, FULL = ["row", "column", "row", "conv"], ["full"]
SIDES = {
    "ours": {"side": "ours", "attention": PAPER},
    "DALLE-pytorch": {"side": "dalle-pytorch", "attention": PAPER},
    "DALLE-pytorch, full attention": {"side": "dalle-pytorch", "attention": FULL},
    "GPT-2": {"side": "gpt2"},
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4)
    args = parser.parse_args()
    python = str(peer("dalle_pytorch", "--no-deps", DALLE_PYTORCH, *DALLE_PYTORCH_NEEDS))
    program = str(Path(__file__).with_name("transformer_side.py"))
    commands = {
        name: [
            python if side["side"] == "dalle-pytorch" else sys.executable,
            program,
            json.dumps({**side, "samples": args.samples}),
        ]
        for name, side in SIDES.items()
    }
    with Sides(commands) as sides:
        parameters = {name: sides.ask(name, "parameters") for name in SIDES}
        clocks = sides.measure("step", args.repetitions)
        mebibytes = {name: round(sides.ask(name, "memory") / 2**20) for name in SIDES}
    rows = {
        name: {
            "parameters": parameters[name],
            "peak_mebibytes": mebibytes[name],
            "ours_takes_of_its_memory": round(mebibytes["ours"] / mebibytes[name], 3),
            **{f"ours_{key}": value for key, value in compared(clocks, name)["ours"].items() if "times" in key},
            "seconds": compared(clocks, name)[name]["seconds"],
        }
        for name in SIDES
    }
    result = {"samples": args.samples, "sides": rows, **describe()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    log.guarded(main)
