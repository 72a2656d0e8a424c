"""Autoencoders and their parts against the plain way to do the same or against a peer, side by side.

    python benchmarks/autoencoders.py pixelsnail quantizer dvae

    dvae         one training step of the dVAE, beside DALLE-pytorch's DiscreteVAE with as many parameters
    quantizer    forward, backward and codebook step of 8192 codes of width 256, beside vector-quantize-pytorch
    pixelsnail   codes of 32x32 squares drawn pixel by pixel from what is kept, against a full forward pass for each

The sides run on one thread, in turn, repetition after repetition; a figure is the median over the repetitions, each of
which ran them all. A side that is measured beside a peer has a process of its own, which waits while the others work.
Processor time is there for busy machines.

Writes benchmarks/results/autoencoders_<name>.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import describe, peer
from side import timed
from sides import Sides, compared
from torch import Tensor

from dalle_scale import log
from dalle_scale.stages import vqvae2_prior
from dalle_scale.types import Nets

RESULTS = Path(__file__).parent / "results"
VECTOR_QUANTIZE = "vector-quantize-pytorch==1.32.0"
DALLE_PYTORCH = "dalle-pytorch==1.6.6"
# what its DiscreteVAE needs to be imported; others of its requirements are not needed here or do not build any more
DALLE_PYTORCH_NEEDS = ("axial-positional-embedding==0.3.12", "rotary-embedding-torch==0.9.1", "setuptools==80.9.0")

# Shapes of the dVAE: images 4 times the grid, and the paper's 8192 codes and downsampling of 8. The peer's widths are
# those of its train_vae.py; ours have as many parameters within 1 %. "ours" has the stem of the recipes and one width,
# "paper's stem" the paper's widths of groups.
_THEIRS = {"hidden_dim": 256, "codebook_dim": 512, "num_resnet_blocks": 2}
DVAES: dict[str, dict[str, Any]] = {
    "64 px, 16x16 of 1024 codes": {
        "shape": {"image_size": 64, "vocab": 1024, "samples": 8},
        "dalle-pytorch": {"num_layers": 2, **_THEIRS},
        "ours": {"downsampling": 4, "stem": "patch", "multipliers": [1], "n_hid": 720, "n_init": 720},
        "paper's stem": {"downsampling": 4, "multipliers": [1, 2, 4], "n_hid": 164, "n_init": 164},
    },
    "256 px, 32x32 of 8192 codes": {
        "shape": {"image_size": 256, "vocab": 8192, "samples": 1},
        "dalle-pytorch": {"num_layers": 3, **_THEIRS},
        "ours": {"downsampling": 8, "stem": "patch", "multipliers": [1], "n_hid": 640, "n_init": 640},
        "paper's stem": {"downsampling": 8, "multipliers": [1, 2, 4, 8], "n_hid": 92, "n_init": 46},
    },
}


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
    sampled: dict[str, Tensor] = {}

    def cached() -> None:
        sampled["cached"] = stage.sample(nets, seeds)

    def uncached() -> None:
        sampled["uncached"] = draw_uncached(stage, nets, seeds)

    cached()  # warms code and memory; a whole uncached drawing would take minutes to warm the same
    fast, slow = [], []
    for _ in log.progress(range(repetitions), "measure", "repetitions", repetitions):
        fast.append(timed(cached))
        slow.append(timed(uncached))
        assert torch.equal(sampled["cached"], sampled["uncached"]), "cached and uncached drawing differ"
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
    """4 x 32 x 32 vectors through 8192 codes of width 256, EMA step. The peer is installed into an environment of its
    own."""
    pythons = {"ours": Path(sys.executable), "vector-quantize-pytorch": peer("quantizers", VECTOR_QUANTIZE)}
    program = str(Path(__file__).with_name("quantizer_side.py"))
    with Sides({name: [str(python), program, name] for name, python in pythons.items()}) as sides:
        answers = sides.measure("step", repetitions)
        memory = {name: sides.ask(name, "memory") for name in pythons}
    ours, theirs = pythons
    times = compared(answers, theirs)
    return {
        "vectors": "4 x 32 x 32 of width 256",
        "codes": 8192,
        "peer": VECTOR_QUANTIZE,
        "sides": {name: {**times[name], "peak_mebibytes": round(size / 2**20, 1)} for name, size in memory.items()},
        "share_of_memory": round(memory[ours] / memory[theirs], 3),
    }


# --- dVAE -------------------------------------------------------------------------------------------------------------


def dvae(repetitions: int) -> dict[str, Any]:
    """One step of each dVAE on random images: forward pass, backward pass, step. Ours with the loss of the paper or
    of the recipes for emoji, with the peer's optimizer or the one that the engine builds.

    Raises:
        AssertionError: a side has over 1 % more or less parameters than the peer.
    """
    python = str(peer("dalle_pytorch", "--no-deps", DALLE_PYTORCH, *DALLE_PYTORCH_NEEDS))
    compared = {title: _compare_dvaes(title, models, python, repetitions) for title, models in DVAES.items()}
    return {"peer": DALLE_PYTORCH, "compared": compared}


def _compare_dvaes(title: str, models: dict[str, Any], python: str, repetitions: int) -> dict[str, Any]:
    """The sides at one shape."""
    shape, patch, stem = models["shape"], models["ours"], models["paper's stem"]
    ours = {"side": "ours", "optimizer": "adam", "dtype": "fp32"}
    asked = {
        "dalle-pytorch": {**ours, "side": "dalle-pytorch", "model": models["dalle-pytorch"]},
        "ours": {**ours, "model": patch},
        "ours, engine's optimizer": {**ours, "model": patch, "optimizer": "engine"},
        "ours, squared error": {**ours, "model": {**patch, "likelihood": "l2"}},
        "ours, bf16": {**ours, "model": patch, "dtype": "bf16"},
        "ours, paper's stem": {**ours, "model": stem},
        "ours, paper's stem, bf16": {**ours, "model": stem, "dtype": "bf16"},
    }
    program = str(Path(__file__).with_name("dvae_side.py"))
    commands = {
        name: [python if name == "dalle-pytorch" else sys.executable, program, json.dumps({**side, "shape": shape})]
        for name, side in asked.items()
    }
    with Sides(commands) as sides:
        parameters = {name: sides.ask(name, "parameters") for name in asked}
        theirs = parameters["dalle-pytorch"]
        assert all(abs(count / theirs - 1) < 0.01 for count in parameters.values()), parameters
        answers = sides.measure("step", repetitions)
        memory = {name: sides.ask(name, "memory") for name in asked}
    times = compared(answers, "dalle-pytorch")
    rows = {
        name: {
            "model": side["model"],
            "optimizer": side["optimizer"],
            "dtype": side["dtype"],
            "parameters": parameters[name],
            **times[name],
            "peak_mebibytes": round(memory[name] / 2**20, 1),
        }
        for name, side in asked.items()
    }
    return {"samples": shape["samples"], "sides": rows}


COMPARISONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "pixelsnail": pixelsnail,
    "quantizer": quantizer,
    "dvae": dvae,
}


if __name__ == "__main__":
    main()
