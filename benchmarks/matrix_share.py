"""A training step of the transformer as a share of the machine: of the rate of one matrix product in the same run.

    python benchmarks/matrix_share.py

Width 1024, 16 heads, 4 layers (row, column, row, conv), 256 + 1024 tokens, vocabularies of 16384 and 8192, fp32, AdamW.
Only operations that the masks need are counted, not the keys that a block meets without seeing them. The product is of
two 4096 x 4096 matrices. Both take turns in one process on all cores; a share is that of a step by the median of the
products before and after it. Writes benchmarks/results/matrix_share.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import describe

from dalle_scale import log
from dalle_scale.stages import dalle

RESULT = Path(__file__).parent / "results" / "matrix_share.json"
SIZES = {"text_vocab": 16_384, "text_length": 256, "image_vocab": 8192, "grid": 32}
SHAPE = {"width": 1024, "layers": 4, "heads": 16, "attention": ["row", "column", "row", "conv"]}
MATRIX = 4096


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--samples", type=int, default=2)
    args = parser.parse_args()
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    stage = dalle.Stage(dalle.Stage.Config.model_validate_json(json.dumps({**SIZES, **SHAPE})))
    step, product = training(stage, args.samples), matrix_product()
    seconds(step), seconds(product)  # allocates
    products, steps = [seconds(product)], []
    for _ in log.progress(range(args.repetitions), "measure", "repetitions", args.repetitions):
        steps.append(seconds(step))
        products.append(seconds(product))
    flops = stage.flops_per_sample() * args.samples
    rates = [2 * MATRIX**3 / (before + after) * 2 for before, after in itertools.pairwise(products)]
    shares = [flops / took / rate for took, rate in zip(steps, rates, strict=True)]
    result = {
        **SIZES,
        **SHAPE,
        "samples": args.samples,
        "threads": threads,
        "repetitions": args.repetitions,
        "flops_that_the_masks_need": flops,
        "seconds": round(statistics.median(steps), 3),
        "gflops_of_the_product": round(statistics.median(rates) / 1e9, 1),
        "share_of_matrix_rate": round(statistics.median(shares), 4),
        "share_lowest": round(min(shares), 4),
        "share_highest": round(max(shares), 4),
        **describe(),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def training(stage: dalle.Stage, samples: int) -> Callable[[], Any]:
    """A step on random tokens."""
    nets = stage.nets()
    optimizer = torch.optim.AdamW(nets["model"].parameters(), lr=1e-4, fused=True)
    batch = {
        "text": torch.randint(SIZES["text_vocab"], (samples, SIZES["text_length"])),
        "codes": torch.randint(SIZES["image_vocab"], (samples, SIZES["grid"] ** 2)),
        "weight": torch.ones(samples),
    }

    def step() -> None:
        optimizer.zero_grad()
        stage.loss("model", nets, batch, 0).total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def matrix_product() -> Callable[[], Any]:
    """Of two square matrices of normal numbers."""
    left, right, out = (torch.randn(MATRIX, MATRIX) for _ in range(3))
    return lambda: torch.mm(left, right, out=out)


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    log.guarded(main)
