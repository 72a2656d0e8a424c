"""The master weights of a DeepSpeed engine (fp32, with adamw16 bf16), however ZeRO spreads them over ranks.

The attributes read here are DeepSpeed's own (0.19); tests compare what they give at every stage with plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from dalle_scale import dist


class Partition(NamedTuple):
    """Partition of one parameter, at any stage: rank r holds the numbers r * size - base up to
    (r + 1) * size - base of it, flattened."""

    shape: tuple[int, ...]
    base: int  # numbers before the parameter in what is cut as one
    size: int  # numbers a rank

    def local_range(self, rank: int) -> tuple[int, int]:
        """The first number that a rank holds, and the one after its last: equal where it holds none."""
        numel = math.prod(self.shape)
        start, stop = (min(max(0, edge * self.size - self.base), numel) for edge in (rank, rank + 1))
        return start, stop

    def holder(self, number: int) -> int:
        """The rank that holds a number."""
        return (self.base + number) // self.size


class Shard(NamedTuple):
    """This rank's part of one parameter, which may be empty."""

    name: str
    partition: Partition
    at: int  # where it begins in the tensor that holds it


def owned(engine: Any) -> list[Tensor]:
    """The weights that this rank steps, as live tensors: whole at ZeRO 0, a flat slice a group at 1 to 3."""
    return [tensor.data for tensor in keys(engine)]


def keys(engine: Any) -> list[Tensor]:
    """The same as the tensors under which the optimizer keeps their states."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if stage in (1, 2):
        return list(optimizer.single_partition_of_fp32_groups)
    return [master for _, master in _pairs_at_stage_0(engine)]


def states(engine: Any) -> Any:
    """State of the optimizer: `keys` -> name -> tensor or number. Nothing of a tensor before its first step."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer).state


def place(engine: Any) -> int:
    """This rank's number among those that share the weights: in its node; 0 at ZeRO 0, where each has all."""
    if engine.zero_optimization_stage() == 0:
        return 0
    return int(engine.mpu.get_data_parallel_rank()) if engine.mpu is not None else dist.rank()


def pieces(engine: Any) -> list[list[Shard]]:
    """Contents of each tensor of `owned`: all parameters of its group, also those of which this rank holds nothing."""
    stage, optimizer, rank = engine.zero_optimization_stage(), engine.optimizer, place(engine)
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    found: list[list[Shard]] = []
    if stage == 0:
        for parameter, _ in _pairs_at_stage_0(engine):
            found.append([Shard(names[id(parameter)], Partition(tuple(parameter.shape), 0, parameter.numel()), 0)])
    elif stage == 3:  # parameters are cut one by one
        for group in optimizer.fp16_groups:
            found.append([])
            at = 0
            for parameter in group:
                size = parameter.ds_tensor.ds_numel
                found[-1].append(Shard(names[id(parameter)], Partition(tuple(parameter.ds_shape), 0, size), at))
                at += size
    else:  # laid out one after the other, then cut
        layouts = zip(optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, strict=True)
        for (group, bases), size in zip(layouts, optimizer.partition_size, strict=True):
            found.append([])
            for parameter, base in zip(group, bases, strict=True):
                partition = Partition(tuple(parameter.shape), base, size)
                found[-1].append(Shard(names[id(parameter)], partition, max(0, base - rank * size)))
    return found


@torch.no_grad()
def clear_padding(engine: Any) -> None:
    """Zeros where a rank's slice of a parameter is longer than what is left of it. At ZeRO 3 DeepSpeed leaves there
    what the memory held before, which need not be finite."""
    if engine.zero_optimization_stage() == 3:
        for tensor, group in zip(owned(engine), pieces(engine), strict=True):
            for piece in group:
                start, stop = piece.partition.local_range(place(engine))
                tensor[piece.at + stop - start : piece.at + piece.partition.size] = 0


@torch.no_grad()
def publish(engine: Any) -> None:
    """Give the working weights the values of the fp32 master weights, after these were set. Collective."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        for working, master in _pairs_at_stage_0(engine):
            working.data.copy_(master.data)
    elif stage == 3:
        optimizer.checkpoint_event_prologue()
        for index in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()


@contextmanager
def untrained(engine: Any) -> Iterator[dict[str, Tensor]]:
    """The rest of the module's `state_dict`: buffers and frozen parameters, whole and live. At ZeRO 3 frozen parameters
    are gathered, and what the first of the ranks writes into them is kept. Collective."""
    module: nn.Module = engine.module
    frozen = {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = {name: tensor for name, tensor in module.state_dict().items() if name not in parameters}
    with deepspeed.zero.GatheredParameters(list(frozen.values()), modifier_rank=0):
        yield buffers | {name: parameter.data for name, parameter in frozen.items()}


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
