"""Memory of a run on each rank, by kind, before anything is allocated."""

from __future__ import annotations

import yaml
from torch import nn

from dalle_scale.config import OptimConfig, RunConfig
from dalle_scale.engine import optim
from dalle_scale.nn.residual_scaling import in_16_bits
from dalle_scale.types import Nets


def estimate(net: nn.Module, config: RunConfig, name: str, world_size: int) -> dict[str, int]:
    """Bytes on each rank of everything that lasts from one step to the next, or from backward to step.

    Activations, collectives' buckets and the evaluation's copy of the weights come on top. `net` may lie on the meta
    device.
    """
    stage, ranks, section = config.engine.zero, world_size, config.optim[name]
    at_1, at_2, at_3 = (ranks if stage >= least else 1 for least in (1, 2, 3))
    element = element_bytes(net, config, name)
    trained = {p: group["role"] for group in optim.param_groups(net, section) for p in group["params"]}
    numel = sum(p.numel() for p in trained)
    masters = section.kind != "adamw16" and (stage > 0 or config.engine.dtype != "fp32")
    states = sum(p.numel() * _of_states(element[p] == 2, role, section) for p, role in trained.items())
    sizes = {
        "weights": sum(p.numel() * element[p] for p in net.parameters()) / at_3,
        "master weights": 4 * numel / at_1 if masters else 0,
        "gradients": sum(p.numel() * element[p] for p in trained) / at_2,
        "optimizer": states / at_1,
        "average": 4 * numel / at_1 if section.ema_decay > 0 else 0,
        "buffers": sum(buffer.numel() * buffer.element_size() for buffer in net.buffers()),
    }
    return {kind: round(size) for kind, size in sizes.items()}


def element_bytes(net: nn.Module, config: RunConfig, name: str) -> dict[nn.Parameter, int]:
    """Bytes of an element of each parameter, and of its gradient: with adamw16 of several types in one net."""
    if config.engine.dtype == "fp32":
        return dict.fromkeys(net.parameters(), 4)
    short = in_16_bits(net) if config.optim[name].kind == "adamw16" else set(net.parameters())
    return {parameter: 2 if parameter in short else 4 for parameter in net.parameters()}


def _of_states(short: bool, role: str, config: OptimConfig) -> int:
    """Bytes of the optimizer's states a parameter."""
    if config.kind != "adamw16" or not short:
        return 4 if role == "muon" else 8
    return (8 if config.states == "fp32" else 4) + (2 if config.rounding == "compensated" else 0)


def report(config: RunConfig, nets: Nets, flops_per_sample: float, world_size: int) -> str:
    """Text of `--dry-run`: the resolved config, then parameters, FLOPs and memory."""
    lines = [yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)]
    flops_per_step = flops_per_sample * config.global_batch_size
    lines.append(f"floating-point operations: {flops_per_sample:.3e} a sample, {flops_per_step:.3e} a step")
    world_size //= config.engine.nodes  # ZeRO spans one machine
    ranks = f"each of {world_size} ranks at ZeRO {config.engine.zero}"
    for name, net in nets.items():
        sizes = estimate(net, config, name, world_size)
        lines.append(f"net '{name}': {sum(p.numel() for p in net.parameters()):,} parameters; memory on {ranks}:")
        lines += [f"  {kind:<20}{size / 2**20:>12,.1f} MiB" for kind, size in sizes.items()]
        lines.append(f"  {'sum':<20}{sum(sizes.values()) / 2**20:>12,.1f} MiB, and activations")
    return "\n".join(lines)
