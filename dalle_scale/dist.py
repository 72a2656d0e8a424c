"""Rank, world size and the few collectives that the program needs, with a single-process fallback.

Never imports deepspeed: process groups are torch's, whoever started them.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence

import torch
import torch.distributed as torch_dist
from torch import Tensor

_host_group: torch_dist.ProcessGroup | None = None  # gloo, made when first needed


def rank() -> int:
    """This process's number among all of them; from the launcher's environment before the group exists."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes of the job."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine: the GPU it owns."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_joined() -> bool:
    """Whether the process group exists."""
    return torch_dist.is_initialized()


def is_main() -> bool:
    """Whether this process speaks for the job (console, metrics, ledger)."""
    return rank() == 0


def device() -> torch.device:
    """The device that this process computes on."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def barrier() -> None:
    """Wait for all ranks."""
    if torch_dist.is_initialized():
        torch_dist.barrier()


def leave() -> None:
    """Wait for all ranks and end the process group: gloo's threads abort a process whose interpreter goes first."""
    if torch_dist.is_initialized():
        gc.collect()  # what still holds the group keeps its threads
        torch_dist.barrier()
        torch_dist.destroy_process_group()


def all_reduce(tensor: Tensor, op: str = "sum") -> Tensor:
    """Reduce `tensor` over all ranks in place ("sum", "max", "mean") and return it."""
    if torch_dist.is_initialized() and world_size() > 1:
        ops = {"sum": torch_dist.ReduceOp.SUM, "mean": torch_dist.ReduceOp.SUM, "max": torch_dist.ReduceOp.MAX}
        torch_dist.all_reduce(tensor, op=ops[op])
        if op == "mean":
            tensor /= world_size()
    return tensor


def broadcast(tensor: Tensor, source: int = 0) -> Tensor:
    """Give every rank the values of rank `source`, in place."""
    if torch_dist.is_initialized() and world_size() > 1:
        torch_dist.broadcast(tensor, src=source)
    return tensor


def seed_everything(seed: int, step: int) -> None:
    """Seed torch's global generators from (seed, step), equally on all ranks: a resumed run needs no saved state."""
    number = (seed * 1_000_003 + step) % (1 << 63)
    torch.default_generator.manual_seed(number)  # torch.manual_seed takes a millisecond, and this runs in every update
    if device().type == "cuda":
        torch.cuda.manual_seed(number)


def sum_on_host(values: Sequence[float]) -> list[float]:
    """Sum each of a few numbers over all ranks without touching the device: what the host decides on in every step."""
    global _host_group
    if world_size() == 1 or not torch_dist.is_initialized():
        return list(values)
    if _host_group is None:
        _host_group = torch_dist.new_group(backend="gloo")
    tensor = torch.tensor(values, dtype=torch.float64)
    torch_dist.all_reduce(tensor, group=_host_group)
    return tensor.tolist()
