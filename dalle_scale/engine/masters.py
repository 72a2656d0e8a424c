"""The master weights of a DeepSpeed engine (fp32, with adamw16 bf16), however ZeRO spreads them over ranks.

The attributes read here are DeepSpeed's own (0.19); tests compare what they give at every stage with plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from dalle_scale import dist


def owned(engine: Any) -> list[Tensor]:
    """The weights that this rank updates, as live tensors: whole at ZeRO 0, a flat slice a group at 1 to 3."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        return [tensor.data for tensor in optimizer.fp32_partitioned_groups_flat]
    if stage in (1, 2):
        return [tensor.data for tensor in optimizer.single_partition_of_fp32_groups]
    return [master.data for _, master in _pairs_at_stage_0(engine)]


@torch.no_grad()
def full_state(engine: Any, everywhere: bool = False) -> dict[str, Tensor]:
    """The module's `state_dict` with whole fp32 weights, and its buffers, as copies. Collective.

    On the CPU of rank 0 and empty elsewhere; with `everywhere` on the device of every rank.
    """
    module: nn.Module = engine.module
    at_stage_0 = {id(working): master for working, master in _pairs_at_stage_0(engine)}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    state = {}
    for name, tensor in module.state_dict().items():
        if name in parameters:
            parameter = parameters[name]
            master = at_stage_0.get(id(parameter))
            tensor = _gather(parameter) if master is None else master
        if everywhere:
            state[name] = tensor.detach().clone()
        elif dist.is_main():
            state[name] = tensor.detach().to("cpu", copy=True)
    return state


def _gather(parameter: nn.Parameter) -> Tensor:
    """One parameter whole and in fp32: from the slices of its master, or as it is if it is frozen."""
    full: Tensor | None = safe_get_full_fp32_param(parameter)
    if full is not None:
        return full
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().float().clone()


def _pairs_at_stage_0(engine: Any) -> list[tuple[Tensor, Tensor]]:
    """(working, fp32 master) of each trained parameter at ZeRO 0; in fp32 both are the same tensor."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() > 0:
        return []
    if not hasattr(optimizer, "fp32_groups"):
        return [(parameter, parameter) for group in optimizer.param_groups for parameter in group["params"]]
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return [pair for working, masters in groups for pair in zip(working, masters, strict=True)]
