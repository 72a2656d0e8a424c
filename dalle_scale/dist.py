"""Rank, world size and the few collectives that the program needs, with a single-process fallback.

Never imports deepspeed: process groups are torch's, whoever started them. Imports torch, which takes a second, only
where it has work for it: without it this process has joined no group, and many tools do no mathematics.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_host_group: Any = None  # gloo, made when first needed
_shared_memory: Any = None  # faster than gloo, where all ranks are on one host


def use_shared_memory(memory: Any) -> None:
    """Sum tensors on the CPU through an `engine.shared_memory.SharedMemory` of all ranks from now on."""
    global _shared_memory
    _shared_memory = memory


def shared_memory() -> Any:
    """The `engine.shared_memory.SharedMemory` in use, or None."""
    return _shared_memory


def _shared_group() -> Any:
    """torch.distributed, if the process group exists."""
    module = sys.modules.get("torch.distributed")
    return module if module and module.is_available() and module.is_initialized() else None


def rank() -> int:
    """This process's number among all of them; from the launcher's environment before the group exists."""
    group = _shared_group()
    return int(group.get_rank() if group else os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes of the job."""
    group = _shared_group()
    return int(group.get_world_size() if group else os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine: the GPU it owns."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_joined() -> bool:
    """Whether the process group exists."""
    return _shared_group() is not None


def is_main() -> bool:
    """Whether this process speaks for the job (console, metrics, ledger)."""
    return rank() == 0


def device() -> torch.device:
    """The device that this process computes on."""
    import torch

    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def barrier() -> None:
    """Wait for all ranks."""
    if group := _shared_group():
        group.barrier()


def join() -> None:
    """Join the ranks of a program that does not train, if there are several. They may wait for the slowest for days."""
    if world_size() > 1 and not is_joined():
        import torch.distributed

        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))


def leave() -> None:
    """Wait for all ranks and end the process group: gloo's threads abort a process whose interpreter goes first."""
    if group := _shared_group():
        gc.collect()  # what still holds the group keeps its threads
        group.barrier()  # until all are here, each says by its lock on the shared memory that it lives
        use_shared_memory(None)
        group.destroy_process_group()


def all_reduce(tensor: Tensor, op: str = "sum") -> Tensor:
    """Reduce `tensor` over all ranks in place ("sum", "max", "mean") and return it."""
    group = _shared_group()
    if group and world_size() > 1:
        if _shared_memory is not None and tensor.device.type == "cpu":
            _shared_memory.all_reduce(tensor, op)
            return tensor
        group.all_reduce(tensor, op=group.ReduceOp.MAX if op == "max" else group.ReduceOp.SUM)
        if op == "mean":
            tensor /= world_size()
    return tensor


def all_gather(rows: Tensor, tensor: Tensor) -> Tensor:
    """Write every rank's `tensor` into its row of `rows` [ranks, ...], both contiguous, and return these."""
    if group := _shared_group():
        group.all_gather_into_tensor(rows.view(-1), tensor.view(-1))
    else:
        rows.copy_(tensor)
    return rows


def broadcast(tensor: Tensor, source: int = 0) -> Tensor:
    """Give every rank the values of rank `source`, in place."""
    group = _shared_group()
    if group and world_size() > 1:
        group.broadcast(tensor, src=source)
    return tensor


def seed_everything(seed: int, step: int) -> None:
    """Seed torch's global generators from (seed, step), equally on all ranks: a resumed run needs no saved state."""
    import torch

    number = (seed * 1_000_003 + step) % (1 << 63)
    torch.default_generator.manual_seed(number)  # torch.manual_seed takes a millisecond, and this runs in every step
    if device().type == "cuda":
        torch.cuda.manual_seed(number)


def sum_on_host(values: Sequence[float]) -> list[float]:
    """Sum each of a few numbers over all ranks without touching the device: what the host decides on in every step."""
    global _host_group
    group = _shared_group()
    if not group or world_size() == 1:
        return list(values)
    import torch

    tensor = torch.tensor(values, dtype=torch.float64)
    if _shared_memory is not None:
        return all_reduce(tensor).tolist()
    if _host_group is None:
        _host_group = group.new_group(backend="gloo")
    group.all_reduce(tensor, group=_host_group)
    return tensor.tolist()
