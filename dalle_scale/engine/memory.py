"""How much memory a run will take on each rank, by kind, before anything is allocated."""

from __future__ import annotations

import yaml
from torch import nn

from dalle_scale.config import OptimConfig, RunConfig
from dalle_scale.engine import optim
from dalle_scale.types import Nets


def estimate(net: nn.Module, config: RunConfig, name: str, world_size: int) -> dict[str, int]:
    """Bytes on each rank of everything that lasts from one update to the next, or from backward to step.

    Activations, collectives' buckets and the evaluation's copy of the weights come on top. `net` may lie on the meta
    device.
    """
    stage, working = config.engine.zero, 4 if config.engine.dtype == "fp32" else 2
    count = sum(parameter.numel() for parameter in net.parameters())
    groups = optim.param_groups(net, config.optim[name])
    numel = {group["role"]: sum(p.numel() for p in group["params"]) for group in groups}
    owned = sum(numel.values()) / (world_size if stage > 0 else 1)
    momentum_only = numel.get("muon", 0)  # ZeRO 0
    short = config.optim[name].kind == "adamw16"
    separate_master = stage > 0 or config.engine.dtype != "fp32"
    sizes = {
        "weights": count * working / (world_size if stage == 3 else 1),
        "master weights": (2 if short else 4) * owned if separate_master else 0,
        "gradients": sum(numel.values()) * working / (world_size if stage >= 2 else 1),
        "optimizer": _of_adamw16(config.optim[name]) * owned if short else 8 * owned - 4 * momentum_only,
        "average": 4 * owned if config.optim[name].ema_decay > 0 else 0,
        "buffers": sum(buffer.numel() * buffer.element_size() for buffer in net.buffers()),
    }
    return {kind: round(size) for kind, size in sizes.items()}


def _of_adamw16(config: OptimConfig) -> int:
    """Bytes of its states a parameter."""
    return (8 if config.states == "fp32" else 4) + (2 if config.rounding == "compensated" else 0)


def report(config: RunConfig, nets: Nets, flops_per_sample: float, world_size: int) -> str:
    """What `--dry-run` prints: the resolved config, then parameters, FLOPs and memory."""
    lines = [yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)]
    flops_per_update = flops_per_sample * config.batch_samples
    lines.append(f"floating-point operations: {flops_per_sample:.3e} a sample, {flops_per_update:.3e} an update")
    world_size //= config.engine.machines  # ZeRO spans one machine
    ranks = f"each of {world_size} ranks at ZeRO {config.engine.zero}"
    for name, net in nets.items():
        sizes = estimate(net, config, name, world_size)
        lines.append(f"net '{name}': {sum(p.numel() for p in net.parameters()):,} parameters; memory on {ranks}:")
        lines += [f"  {kind:<20}{size / 2**20:>12,.1f} MiB" for kind, size in sizes.items()]
        lines.append(f"  {'sum':<20}{sum(sizes.values()) / 2**20:>12,.1f} MiB, and activations")
    return "\n".join(lines)
