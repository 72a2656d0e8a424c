"""Training with the paper's masks: share of the matrix rate at 1.3 billion parameters, and a small model beside peers.

The share counts only the operations that the masks need; activations are kept, not recomputed. The small model is that
of transformer.py: 4 layers of width 256, fp32 weights and bf16 products on all sides (autocast).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gpu_clock
import gpu_engine
import gpu_sides
import torch
import transformer_side
from transformer import SIDES

from dalle_scale.models.transformer import flex

CHANGES = ("optim.model.kind=adamw16", "engine.dtype=bf16", "engine.activation_checkpointing=false")


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    config: str  # below configs/, without .yaml
    samples: int  # in a batch
    side_samples: int  # in a batch of the sides
    repetitions: int  # steps
    sides: dict[str, int] = field(default_factory=dict)  # constants of transformer_side.py to replace
    install: bool = True  # peers that are not there


FULL = Sizes("dalle/paper_1b", samples=8, side_samples=32, repetitions=10)
SMALL = {"LAYERS": 4, "WIDTH": 32, "HEADS": 2, "TEXT": 8, "GRID": 8, "WORDS": 40, "CODES": 24}
TOY = Sizes(gpu_engine.TOY, samples=2, side_samples=2, repetitions=2, sides=SMALL)


def measure(sizes: Sizes, device: torch.device, report: gpu_clock.Report) -> None:
    """Both, and write."""
    rate = gpu_clock.matrix_rate(device)
    result: dict[str, Any] = {"matrix_rate": rate, "alone": alone(sizes, device, rate)}
    gpu_clock.release(device)
    report.write(result, last=False)
    constants = {name: getattr(transformer_side, name) for name in SMALL} | sizes.sides
    beside: dict[str, Any] = SIDES
    asked = {
        name: {"kind": "transformer", "sizes": sizes.sides, "samples": sizes.side_samples, **side}
        for name, side in beside.items()
    }
    work = sizes.side_samples * (constants["TEXT"] + constants["GRID"] ** 2)
    rows = gpu_sides.compare(asked, work, "tokens", sizes.repetitions, sizes.install, device)
    report.write({**result, "beside_peers": {"sizes": constants, "samples": sizes.side_samples, "sides": rows}})


def alone(sizes: Sizes, device: torch.device, rate: float) -> dict[str, Any]:
    """The large model in the program's engine."""
    config = gpu_engine.load(sizes.config, sizes.samples, 1, *CHANGES)
    plan = gpu_engine.planned(config, gpu_clock.device_gib(device), rate)
    run = gpu_engine.Run.open(config)
    batches = gpu_engine.random_batches(run, device)
    run.update(batches)
    gpu_clock.forget_peak(device)
    clock = gpu_clock.spread(gpu_clock.repeated(lambda: run.update(batches), device, sizes.repetitions))
    # which kinds of attention the GPU skips blocks of; the others are computed densely with a mask
    skipped = {asked[0]: worked for asked, worked in flex._tried.items()}
    result = {
        "config": sizes.config,
        "parameters": plan["parameters"],
        "samples": sizes.samples,
        **clock,
        **gpu_engine.shares(config, run.stage, clock["seconds"], rate),
        "flex_attention": skipped,
        "peak_bytes": gpu_clock.peak_bytes(device),
        "planned_peak_bytes": plan["peak_bytes"],
    }
    run.close()
    return result
