"""The 1.3-billion-parameter model trained for some hundred steps with 16-bit states and with fp32 states.

All cases begin with the same weights (rounded to what they hold) and see the same batches, which a rule samples that
can be learned. fp32 states are bf16 weights with fp32 masters and moments: fp32 products would take an hour. Their
losses lie over each other in one image.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_clock
import gpu_engine
import matplotlib.pyplot as plt
import numpy as np
import torch
from gpu_tokens import Rule

from dalle_scale import log
from dalle_scale.cluster.activation_memory import open_stage
from dalle_scale.config import RunConfig

REFERENCE = "bf16, fp32 masters and states"
CASES = {
    REFERENCE: ("engine.dtype=bf16", "optim.model.kind=adamw"),
    "bf16, 16-bit states": ("engine.dtype=bf16", "optim.model.kind=adamw16"),
    "fp16, 16-bit states, a scale a branch": ("engine.dtype=fp16", "optim.model.kind=adamw16"),
}
LEARNING_RATE = 2e-4
SMOOTHED = 10  # steps


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    config: str  # below configs/, without .yaml
    samples: int  # a batch
    steps: int  # of each case
    held_out: int  # batches


FULL = Sizes("dalle/paper_1b", samples=8, steps=200, held_out=4)
TOY = Sizes(gpu_engine.TOY, samples=2, steps=12, held_out=1)


def measure(sizes: Sizes, device: torch.device, report: gpu_clock.Report) -> None:
    """Train all cases, sample, write."""
    config = gpu_engine.load(sizes.config, sizes.samples, 1)
    text_weight = open_stage(config).config.text_weight
    result: dict[str, Any] = {
        "config": sizes.config,
        "samples": sizes.samples,
        "steps": sizes.steps,
        "learning_rate": LEARNING_RATE,
        "least_possible_nats": round(rule_of(config).least_nats(text_weight), 4),
        "matrix_rate": gpu_clock.matrix_rate(device),
        "cases": {},
    }
    curves = {}
    for name, changes in CASES.items():
        result["cases"][name], curves[name] = train(name, changes, sizes, device)
        gpu_clock.release(device)
        report.write(result, last=False)
    reference = result["cases"][REFERENCE]["held_out_nats"]
    for row in result["cases"].values():
        row["by_fp32_states"] = round(row["held_out_nats"] / reference, 5)
    if report.image is not None:
        draw(result, curves, report.image)
    report.write(result)


def train(
    name: str, changes: tuple[str, ...], sizes: Sizes, device: torch.device
) -> tuple[dict[str, Any], list[float]]:
    """One case: its loss on batches that it has not seen, its speed and memory; and its loss at every step, nats."""
    schedule = f"{{kind: cosine, warmup_steps: {max(1, sizes.steps // 10)}}}"
    rates = (f"steps={sizes.steps}", f"optim.model.lr={LEARNING_RATE}", f"optim.model.schedule={schedule}")
    config = gpu_engine.load(sizes.config, sizes.samples, 1, *rates, *changes)
    gpu_clock.forget_peak(device)
    run = gpu_engine.Run.open(config)
    rule = rule_of(config)
    order, losses = torch.Generator().manual_seed(0), []
    for update in log.progress(range(sizes.steps), name, "steps", sizes.steps):
        if update == gpu_clock.WARM_UP:
            gpu_clock.synchronise(device)
            began = time.perf_counter()
        batch = gpu_engine.to_batch(*rule.draw(sizes.samples, order), device)
        losses.append(run.update([batch]))
    curve = torch.stack(losses).tolist()  # waits for the device
    seconds = time.perf_counter() - began
    order.manual_seed(1)
    with run.trained_nets.evaluating() as nets:
        held_out = [
            run.stage.loss("model", nets, gpu_engine.to_batch(*rule.draw(sizes.samples, order), device), 0).total.item()
            for _ in range(sizes.held_out)
        ]
    row = {
        "held_out_nats": round(float(np.mean(held_out)), 5),
        "tokens_per_second": round(gpu_engine.tokens(config) * (sizes.steps - gpu_clock.WARM_UP) / seconds, 1),
        "peak_bytes": gpu_clock.peak_bytes(device),
        "log": {key: value for key, value in run.trained_nets.numbers().items() if key != "lr"},
        "training_nats": [round(float(np.mean(part)), 4) for part in parts(curve)],
    }
    run.close()
    return row, curve


def rule_of(config: RunConfig) -> Rule:
    """A rule that samples tokens for a model."""
    return Rule(**{key: config.model[key] for key in ("text_vocab", "text_length", "image_vocab", "grid")})


def parts(curve: list[float]) -> list[list[float]]:
    """`SMOOTHED` steps each."""
    return [curve[start : start + SMOOTHED] for start in range(0, len(curve), SMOOTHED)]


def draw(result: dict[str, Any], curves: dict[str, list[float]], path: Path) -> None:
    """A curve for each case, smoothed."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for name, losses in curves.items():
        width, held_out = min(SMOOTHED, len(losses)), result["cases"][name]["held_out_nats"]
        curve = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(np.arange(len(curve)) + width, curve, linewidth=1, label=f"{name}: {held_out:.4f}")
    axes.axhline(result["least_possible_nats"], color="grey", linestyle="--", linewidth=1, label="the rule leaves open")
    axes.set(xlabel="steps", ylabel="loss, nats a token", yscale="log")
    axes.legend(title="loss on held-out batches", fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=90)
    plt.close(figure)
