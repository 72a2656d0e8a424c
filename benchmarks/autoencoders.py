"""Parts of the VQ-VAE family against the plain way to do the same, side by side.

    python benchmarks/autoencoders.py pixelsnail

    pixelsnail   codes of 32x32 squares drawn pixel by pixel from what is kept, against a full forward pass for each

Both sides run in one process on one thread, in turn, repetition after repetition; a figure is the median over the
repetitions, each of which ran both. Processor time is there for busy machines.

Writes benchmarks/results/autoencoders_<name>.json.
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
from torch import Tensor

from dalle_scale import log
from dalle_scale.stages import vqvae2_prior
from dalle_scale.types import Nets

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run the comparisons that were asked for, print and write each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=COMPARISONS)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.names:
        result = {**COMPARISONS[name](args.repetitions), "repetitions": args.repetitions, **describe()}
        print(json.dumps(result, indent=1))
        (RESULTS / f"autoencoders_{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """How long a call takes: (seconds, seconds of the processor, which other programs on the machine do not change)."""
    started, used = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - started, time.process_time() - used


# --- PixelSNAIL -------------------------------------------------------------------------------------------------------


def pixelsnail(repetitions: int, samples: int = 1) -> dict[str, Any]:
    """Cached against uncached drawing of one 32x32 square from a net of 4 layers of width 64 with 2 attention blocks.

    Raises:
        AssertionError: the two draw different codes.
    """
    config = vqvae2_prior.Stage.Config(
        grids=(32,), vocab=512, width=64, residual_width=64, layers=4, attention_blocks=2, heads=4, output_layers=2
    )
    stage = vqvae2_prior.Stage(config)
    torch.manual_seed(0)
    nets = stage.nets()
    nets["model"].eval()
    seeds = torch.arange(samples)
    drawn: dict[str, Tensor] = {}

    def cached() -> None:
        drawn["cached"] = stage.sample(nets, seeds)

    def uncached() -> None:
        drawn["uncached"] = draw_uncached(stage, nets, seeds)

    cached()  # warms code and memory; a whole uncached drawing would take minutes to warm the same
    fast, slow = [], []
    for _ in log.progress(range(repetitions), "measure", "repetitions", repetitions):
        fast.append(timed(cached))
        slow.append(timed(uncached))
        assert torch.equal(drawn["cached"], drawn["uncached"]), "cached and uncached drawing differ"
    ratios = [[b / a for a, b in zip(*clocks, strict=True)] for clocks in zip(fast, slow, strict=True)]
    times, times_by_processor = zip(*ratios, strict=True)
    return {
        "net": config.model_dump(mode="json"),
        "parameters": sum(parameter.numel() for parameter in nets["model"].parameters()),
        "samples": samples,
        "cached_seconds": round(statistics.median(wall for wall, _ in fast), 3),
        "uncached_seconds": round(statistics.median(wall for wall, _ in slow), 3),
        "times_as_fast": round(statistics.median(times), 1),
        "times_as_fast_lowest": round(min(times), 1),
        "times_as_fast_by_processor_time": round(statistics.median(times_by_processor), 1),
        "same_codes": True,
    }


@torch.inference_mode()
def draw_uncached(stage: vqvae2_prior.Stage, nets: Nets, seeds: Tensor) -> Tensor:
    """The codes of `Stage.sample`, by a full forward pass for each."""
    codes = torch.zeros(len(seeds), stage.config.grid**2, dtype=torch.int64)
    for index in range(codes.shape[1]):
        row, column = divmod(index, stage.config.grid)
        if column == 0:
            noise = stage.noise(seeds, row)
        codes[:, index] = (nets["model"](codes)[:, index] + noise[:, column]).argmax(-1)
    return codes


COMPARISONS: dict[str, Callable[[int], dict[str, Any]]] = {"pixelsnail": pixelsnail}


if __name__ == "__main__":
    main()
