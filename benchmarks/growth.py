"""Growth of the cost of a token with the image: grids of 16, 32 and 64 codes a side, beside the keys that it sees.

    python benchmarks/growth.py

A caption of 256 tokens; layers row, column, row, conv of width 256 with 8 heads; fp32, one thread. Three things are
timed, and each is told a token: attention alone, forward and backward; a training step, in which all else costs the
same a token; and a step of sampling, for which a token is a code of each candidate. Training takes as many samples as
give every grid 4096 codes; 16 candidates are sampled, whole images. All grids take turns. Growth is that from the
smallest grid, the median over repetitions, of processor time. Writes benchmarks/results/growth.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import describe

from dalle_scale import log
from dalle_scale.models.transformer.attention import attend
from dalle_scale.models.transformer.masks import Kind, Layout, visible
from dalle_scale.stages import dalle

RESULT = Path(__file__).parent / "results" / "growth.json"
GRIDS = (16, 32, 64)
KINDS: tuple[Kind, ...] = ("row", "column", "row", "conv")
WIDTH, HEADS, TEXT, VOCABULARY, CODES = 256, 8, 256, 512, 4096
CANDIDATES = 16
Measurement = tuple[Callable[[], float], float]  # -> seconds a token; keys that a token sees


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = {}
    for name, of_grid in {"attention": attention, "training step": training, "sampling": decoding}.items():
        rows[name] = compared({grid: of_grid(grid) for grid in GRIDS}, name, args.repetitions)
    result = {"repetitions": args.repetitions, **rows, **describe()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


def compared(measurements: dict[int, Measurement], name: str, repetitions: int) -> dict[str, Any]:
    """Each grid beside the smallest."""
    times: dict[int, list[float]] = {grid: [] for grid in measurements}
    for repetition in log.progress(range(repetitions + 1), name, "repetitions", repetitions + 1):
        for grid, (measure, _) in measurements.items():
            took = measure()
            if repetition:  # the first allocates
                times[grid].append(took)
    first = min(measurements)
    return {
        f"{grid} x {grid}": {
            "microseconds_a_token": round(1e6 * statistics.median(times[grid]), 2),
            "keys_a_token": round(keys, 1),
            "time_by_smallest": round(statistics.median(b / a for a, b in zip(times[first], row, strict=True)), 3),
            "keys_by_smallest": round(keys / measurements[first][1], 3),
        }
        for (grid, (_, keys)), row in zip(measurements.items(), times.values(), strict=True)
    }


def layout_of(grid: int) -> Layout:
    """Of the states of a caption and an image."""
    return Layout(TEXT + 2, grid)


def keys_seen(grid: int, first: int = 0) -> float:
    """By a state from `first` on, the mean over layers."""
    pairs = [visible(kind, layout_of(grid))[first:].sum().item() for kind in KINDS]
    return statistics.mean(pairs) / (layout_of(grid).length - first)


def timed(call: Callable[[], Any], tokens: int) -> float:
    """Processor seconds a token."""
    began = time.process_time()
    call()
    return (time.process_time() - began) / tokens


def attention(grid: int) -> Measurement:
    """All four layers, forward and backward."""
    layout, samples = layout_of(grid), CODES // grid**2
    size = (samples, layout.length, HEADS, WIDTH // HEADS)
    states = [torch.randn(size).transpose(1, 2).requires_grad_() for _ in range(3)]
    slope = torch.randn(size).transpose(1, 2)

    def all_layers() -> None:
        for kind in KINDS:
            torch.autograd.grad(attend(*states, kind, layout), states, slope)

    return lambda: timed(all_layers, samples * layout.length), keys_seen(grid)


def stage_of(grid: int) -> dalle.Stage:
    """A small vocabulary, because all tokens pay the same for it."""
    sizes = {"text_vocab": VOCABULARY, "text_length": TEXT, "image_vocab": VOCABULARY, "grid": grid}
    shape = {"width": WIDTH, "layers": len(KINDS), "heads": HEADS, "attention": KINDS}
    return dalle.Stage(dalle.Stage.Config.model_validate_json(json.dumps({**sizes, **shape})))


def training(grid: int) -> Measurement:
    """Loss and gradients."""
    stage, samples = stage_of(grid), CODES // grid**2
    nets = stage.nets()
    batch = {
        "text": torch.randint(VOCABULARY, (samples, TEXT)),
        "codes": torch.randint(VOCABULARY, (samples, grid**2)),
        "weight": torch.ones(samples),
    }

    def step() -> None:
        stage.loss("model", nets, batch, 0).total.backward()  # type: ignore[no-untyped-call]

    return lambda: timed(step, samples * layout_of(grid).length), keys_seen(grid)


def decoding(grid: int) -> Measurement:
    """All codes, without choosing them."""
    net: Any = stage_of(grid).nets()["model"].eval()
    text = torch.randint(VOCABULARY, (1, TEXT))
    codes = torch.randint(VOCABULARY, (CANDIDATES,))

    @torch.inference_mode()
    def draw() -> float:
        _, decoding = net.prefill(text, torch.zeros(CANDIDATES, dtype=torch.int64))

        def steps() -> None:
            for index in range(grid**2):
                net.decode_step(codes, index, decoding)

        return timed(steps, grid**2 * CANDIDATES)

    return draw, keys_seen(grid, first=TEXT + 2)


if __name__ == "__main__":
    log.guarded(main)
