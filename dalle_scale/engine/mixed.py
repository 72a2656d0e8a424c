"""16-bit matrices beside fp32 gains, biases and embeddings in one DeepSpeed engine, and no second copy of either.

DeepSpeed 0.19 gives a net one working type, and every ZeRO stage an fp32 (or bf16) master of what is 16 bits. The paper
has no fp32 master weights, and keeps in fp32 what 16 bits would harm (arXiv 2102.12092, App. D). So DeepSpeed sees an
fp32 net, which makes it leave every type as it is; and then

- gradients are reduced in buckets of their own type;
- each group of parameters is flat memory of its own type at ZeRO 3 too, where DeepSpeed has one buffer for all;
- what DeepSpeed holds as a master is made the weights' own memory.

The attributes used here are DeepSpeed's own; tests compare the results at every stage with plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.utils import defragment
from torch import Tensor


@contextmanager
def a_buffer_a_group() -> Iterator[None]:
    """While a ZeRO 3 engine is made: the flat memory of each group has the type of the group."""
    stage = stage3.DeepSpeedZeroOptimizer_Stage3
    kept = stage3.defragment, stage._set_fp16_partitioned_groups_flat
    stage3.defragment = lambda tensors: None
    stage._set_fp16_partitioned_groups_flat = _one_buffer_each
    try:
        yield
    finally:
        stage3.defragment, stage._set_fp16_partitioned_groups_flat = kept


def _one_buffer_each(optimizer: Any) -> None:
    groups: Sequence[Sequence[Any]] = optimizer.fp16_groups
    optimizer.fp16_partitioned_groups_flat += [defragment([p.ds_tensor for p in group]) for group in groups]


def finalize(engine: Any) -> None:
    """Finish the set-up of an engine once it is made."""
    _reduce_by_type(engine)
    _without_masters(engine)


def _reduce_by_type(engine: Any) -> None:
    """Gradients travel, are averaged and are kept in the type of their parameter."""
    optimizer, at_stage_3 = engine.optimizer, engine.zero_optimization_stage() == 3
    groups = optimizer.fp16_groups if at_stage_3 else optimizer.bit16_groups
    [bucket] = optimizer.ipg_buckets.values()
    kinds = {parameter.dtype for group in groups for parameter in group}
    optimizer.ipg_buckets = {kind: type(bucket)() for kind in sorted(kinds, key=str)}  # in one order on all ranks
    optimizer.get_param_comm_dtype = lambda parameter: parameter.dtype
    if at_stage_3:
        parts = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        optimizer.grad_partitions_flat_buffer = torch.empty(0)
        for group, flat in zip(groups, optimizer.fp16_partitioned_groups_flat, strict=True):
            sizes = [parameter.partition_numel() for parameter in group]
            gradients = torch.zeros_like(flat).split(sizes)
            parts.update({parameter.ds_id: part for parameter, part in zip(group, gradients, strict=True)})


def _without_masters(engine: Any) -> None:
    """The slices that the optimizer steps become the memory of the weights."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        masters, weights = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat
    else:
        masters, weights = optimizer.single_partition_of_fp32_groups, _own_slices(optimizer)
    for master, slice_ in zip(masters, weights, strict=True):
        master.data = slice_
    if engine.zero_optimization_stage() < 3:
        optimizer._link_all_hp_params()  # what DeepSpeed looks up of a parameter's master


def _own_slices(optimizer: Any) -> list[Tensor]:
    """This rank's slice of each group at ZeRO 1 and 2."""
    slices = optimizer.parallel_partitioned_bit16_groups
    ranks = [torch.distributed.get_rank(group) for group in optimizer.real_dp_process_group]
    return [parts[rank].data for parts, rank in zip(slices, ranks, strict=True)]
