"""One training step of the 12-billion-parameter model on one GPU: 16-bit states, recomputed activations.

8 bytes a parameter last: weights, gradients and two moments of 16 bits. The peak is the allocator's over the timed
steps, beside what launch/plan.py predicts; what was there when all gradients were is beside the part that lasts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gpu_clock
import gpu_engine
import torch
from static_bytes import live_bytes


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    config: str  # below configs/, without .yaml
    samples: int  # in a micro-batch
    accumulation: int  # micro-batches a step
    repetitions: int  # steps


FULL = Sizes("dalle/paper_12b", samples=8, accumulation=1, repetitions=5)
TOY = Sizes(gpu_engine.TOY, samples=2, accumulation=2, repetitions=2)
CHANGES = ("optim.model.kind=adamw16", "engine.dtype=bf16", "engine.activation_checkpointing=true")


def measure(sizes: Sizes, device: torch.device, report: gpu_clock.Report) -> None:
    """Train and write."""
    config = gpu_engine.load(sizes.config, sizes.samples, sizes.accumulation, *CHANGES)
    rate = gpu_clock.matrix_rate(device)
    plan = gpu_engine.planned(config, gpu_clock.device_gib(device), rate)
    gpu_clock.forget_peak(device)
    run = gpu_engine.Run.open(config)
    opening_peak = gpu_clock.peak_bytes(device)
    batches = gpu_engine.random_batches(run, device)
    held: list[int] = []
    run.update(batches)  # allocates the states
    gpu_clock.forget_peak(device)
    times = gpu_clock.repeated(lambda: run.update(batches), device, sizes.repetitions)
    peak = gpu_clock.peak_bytes(device)
    loss = run.update(batches, before_step=lambda: held.append(held_bytes(device)))
    clock = gpu_clock.spread(times)
    report.write(
        {
            "config": sizes.config,
            "samples": sizes.samples,
            "accumulation": sizes.accumulation,
            "steps": run.steps,
            "loss_nats": round(loss.item(), 4),
            "matrix_rate": rate,
            **clock,
            **gpu_engine.shares(config, run.stage, clock["seconds"], rate),
            "memory": {
                **plan,
                "measured_lasting_bytes": held[0],
                "measured_lasting_by_plan": round(held[0] / plan["lasting_bytes"], 4),
                "measured_peak_bytes": peak,
                "measured_peak_by_plan": None if peak is None else round(peak / plan["peak_bytes"], 4),
                "measured_peak_bytes_while_opening": opening_peak,
            },
        }
    )


def held_bytes(device: torch.device) -> Any:
    """Bytes of all tensors now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else live_bytes()
