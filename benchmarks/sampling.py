"""The 1024 codes of images of one caption, sampled by the transformer, beside DALLE-pytorch and a cached GPT-2.

    python benchmarks/sampling.py

The nets of transformer.py with random weights; 1 and 16 candidates. Beside ours: DALLE-pytorch as shipped, a forward
pass over everything for each code; and transformers' generate over a dense GPT-2 of the same size, whose keys and
values grow by concatenation as minDALL-E's do, or lie in static memory. Ours samples with seeds that make an image
independent of its batch. Each side is a process of its own on one thread, in turn. DALLE-pytorch samples five of the
codes, first to last, and its time is 1024 times their mean. Writes benchmarks/results/sampling.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from autoencoders import DALLE_PYTORCH, DALLE_PYTORCH_NEEDS
from environment import describe, peer
from sampling_side import PLACES
from sides import Sides
from transformer_side import GRID

from dalle_scale import log

RESULT = Path(__file__).parent / "results" / "sampling.json"
CACHED = ("ours", "growing cache", "static cache")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 16])
    args = parser.parse_args()
    python = str(peer("dalle_pytorch", "--no-deps", DALLE_PYTORCH, *DALLE_PYTORCH_NEEDS))
    rows = {f"{count} candidates": compare(python, count, args.repetitions) for count in args.candidates}
    result = {"repetitions": args.repetitions, **rows, **describe()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


def compare(python: str, candidates: int, repetitions: int) -> dict[str, Any]:
    """All sides at one number of candidates."""
    program = str(Path(__file__).with_name("sampling_side.py"))
    names = (*CACHED, "dalle-pytorch")
    pythons = {"dalle-pytorch": python}
    commands = {
        name: [pythons.get(name, sys.executable), program, json.dumps({"side": name, "candidates": candidates})]
        for name in names
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with Sides(commands) as sides:
        for repetition in log.progress(range(repetitions + 1), f"{candidates} candidates", "rounds", repetitions + 1):
            round_ = {name: tuple(sides.ask(name, "sample")) for name in CACHED}
            places = [sides.ask("dalle-pytorch", f"sample {place}") for place in PLACES]
            round_["dalle-pytorch"] = tuple(GRID**2 * statistics.mean(clock) for clock in zip(*places, strict=True))
            for name, clocks in round_.items() if repetition else ():  # the first allocates
                seconds[name].append(clocks)
    return {name: row(seconds[name], seconds["ours"]) for name in names}


def row(theirs: list[tuple[float, float]], ours: list[tuple[float, float]]) -> dict[str, float]:
    """Medians, by the clock and by the processor."""
    times = [[b / a for a, b in zip(*pair, strict=True)] for pair in zip(ours, theirs, strict=True)]
    wall, processor = zip(*times, strict=True)
    return {
        "seconds": round(statistics.median(clock for clock, _ in theirs), 2),
        "ours_times_as_fast": round(statistics.median(wall), 2),
        "ours_times_as_fast_by_processor_time": round(statistics.median(processor), 2),
        "ours_times_as_fast_by_processor_time_lowest": round(min(processor), 2),
    }


if __name__ == "__main__":
    log.guarded(main)
