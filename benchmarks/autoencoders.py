"""Parts of the VQ-VAE family against the plain way to do the same, side by side.

    python benchmarks/autoencoders.py pixelsnail quantizer

    quantizer    forward, backward and codebook update of 8192 codes of width 256, beside vector-quantize-pytorch
    pixelsnail   codes of 32x32 squares drawn pixel by pixel from what is kept, against a full forward pass for each

Both sides run in one process on one thread, in turn, repetition after repetition; a figure is the median over the
repetitions, each of which ran both. Processor time is there for busy machines.

Writes benchmarks/results/autoencoders_<name>.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import describe, peer
from torch import Tensor

from dalle_scale import log
from dalle_scale.stages import vqvae2_prior
from dalle_scale.types import Nets

RESULTS = Path(__file__).parent / "results"
VECTOR_QUANTIZE = "vector-quantize-pytorch==1.32.0"


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


# --- quantizer --------------------------------------------------------------------------------------------------------


def quantizer(repetitions: int) -> dict[str, Any]:
    """4 x 32 x 32 vectors through 8192 codes of width 256, EMA update. Each side in a process of its own, which waits
    while the other works; the peer is installed into an environment of its own."""
    pythons = {"ours": Path(sys.executable), "vector-quantize-pytorch": peer("quantizers", VECTOR_QUANTIZE)}
    program = str(Path(__file__).with_name("quantizer_side.py"))
    sides = {
        name: subprocess.Popen([str(python), program, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name, python in pythons.items()
    }

    def ask(name: str, what: str) -> float:
        side = sides[name]
        assert side.stdin is not None and side.stdout is not None
        print(what, file=side.stdin, flush=True)
        return float(side.stdout.readline())

    try:
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for name in sides:
            ask(name, "run")  # the first allocates
        for _ in log.progress(range(repetitions), "quantizer", "repetitions", repetitions):
            for name in sides:
                seconds[name].append(ask(name, "run"))
        memory = {name: ask(name, "memory") for name in sides}
    finally:
        for side in sides.values():
            side.kill()
    ours, theirs = sides
    ratios = [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
    return {
        "vectors": "4 x 32 x 32 of width 256",
        "codes": 8192,
        "peer": VECTOR_QUANTIZE,
        "seconds": {name: round(statistics.median(times), 4) for name, times in seconds.items()},
        "times_as_fast": round(statistics.median(ratios), 2),
        "times_as_fast_lowest": round(min(ratios), 2),
        "peak_mebibytes": {name: round(size / 2**20, 1) for name, size in memory.items()},
        "share_of_memory": round(memory[ours] / memory[theirs], 3),
    }


COMPARISONS: dict[str, Callable[[int], dict[str, Any]]] = {"pixelsnail": pixelsnail, "quantizer": quantizer}


if __name__ == "__main__":
    main()
