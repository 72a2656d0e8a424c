"""Sums over the ranks of one host through memory that they share, for CPUs.

gloo sends them through sockets, which takes milliseconds for the gradients of a net whose step takes 30. Here each rank
copies its values into a part of its own, all wait for each other, each sums one section over all parts, in the order of
the ranks, and after another wait all read the result. Operations use two buffers in turn: who writes into one again has
met every rank at the operation between, so nobody reads there any more.

Counters are plain 64-bit stores and loads, which only processors of the x86 family keep in order with the values.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import secrets
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress

import torch
import torch.distributed
from torch import Tensor

_SHM = "/dev/shm"
_PART_BYTES = 1 << 20  # of one rank in one buffer
_SMALL_BYTES = 1 << 12  # up to here every rank sums everything, which saves a wait
_LINE = 8  # counters lie a cache line apart, in 64-bit numbers
_EAGER_SECONDS = 0.002  # of waiting without sleeping: a rank that is computing is soon there
_PAUSE_SECONDS = 0.0001
_LOOK_SECONDS = 1.0  # between looks whether who is waited for is alive


def size_bytes(world_size: int) -> int:
    """Bytes that all ranks together share."""
    return world_size * (_LINE * 8 + 2 * _PART_BYTES)


def share(rank: int, world_size: int) -> SharedMemory | None:
    """The memory of all ranks; None where they are not all on one host of the x86 family with room for it. Collective,
    over torch's process group."""
    path, file = "", -1
    with suppress(OSError):
        if rank == 0 and platform.machine() in ("x86_64", "AMD64"):
            file, path = tempfile.mkstemp(prefix=f"dalle_scale_{secrets.token_hex(8)}_", dir=_SHM)
            os.posix_fallocate(file, 0, size_bytes(world_size))  # else a full file system kills whoever writes
    named = [path]
    torch.distributed.broadcast_object_list(named)
    with suppress(OSError):
        if rank > 0 and named[0]:
            file = os.open(named[0], os.O_RDWR)
    whole = file >= 0 and os.fstat(file).st_size >= size_bytes(world_size)
    memory = SharedMemory(file, rank, world_size) if whole else None
    ready = torch.tensor(int(memory is not None))
    torch.distributed.all_reduce(ready)
    if path:
        os.unlink(path)
    return memory if ready == world_size else None


class SharedMemory:
    """All-reduce over all ranks, which are on one host."""

    def __init__(self, file: int, rank: int, world_size: int) -> None:
        """file: descriptor of the shared file, of `size_bytes(world_size)`; kept open."""
        self.rank, self.world_size = rank, world_size
        self._file = file
        fcntl.lockf(file, fcntl.LOCK_EX, 1, rank)  # held as long as this process lives
        memory = torch.frombuffer(mmap.mmap(file, size_bytes(world_size)), dtype=torch.uint8)
        counters, parts = memory.split([world_size * _LINE * 8, 2 * world_size * _PART_BYTES])
        self._arrived = counters.view(torch.int64).view(world_size, _LINE)[:, 0].numpy()
        self._buffers = parts.view(2, world_size, _PART_BYTES)
        self._operations = 0

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> None:
        """Replace `tensor` by its "sum" or "max" over the ranks, equal to the bit on all of them.

        Raises:
            RuntimeError: another rank has ended.
        """
        flat = tensor.detach().contiguous().view(-1)
        for chunk in flat.split(_PART_BYTES // tensor.element_size()):
            self._reduce(chunk, torch.add if op == "sum" else torch.maximum)
        if flat.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(flat.view_as(tensor))

    def _reduce(self, chunk: Tensor, combine: Callable[..., Tensor]) -> None:
        """All-reduce of at most a part's bytes."""
        parts = self._buffers[self._operations % 2].view(chunk.dtype)[:, : len(chunk)]
        self._operations += 1
        parts[self.rank].copy_(chunk)
        self._meet()
        if chunk.nbytes <= _SMALL_BYTES:
            _combined(parts, combine, out=chunk)
            return
        own = parts.chunk(self.world_size, dim=1)
        if self.rank < len(own):
            _combined(own[self.rank], combine, out=own[self.rank][0])
        self._meet()
        chunk.copy_(parts[0])

    def _meet(self) -> None:
        """Wait until every rank has come here."""
        self._arrived[self.rank] += 1
        mine, started = self._arrived[self.rank], time.monotonic()
        looked = started
        while (self._arrived < mine).any():
            os.sched_yield()
            now = time.monotonic()
            if now - started > _EAGER_SECONDS:
                time.sleep(_PAUSE_SECONDS)
            if now - looked > _LOOK_SECONDS:
                looked = now
                self._look((self._arrived < mine).nonzero()[0].tolist())

    def _look(self, ranks: list[int]) -> None:
        """Raise if one of these ranks has ended: its lock is free then."""
        for rank in ranks:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
            except OSError:
                continue
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)  # for the others who look
            raise RuntimeError(f"rank {rank} has ended while rank {self.rank} waits for it")


def _combined(parts: Tensor, combine: Callable[..., Tensor], out: Tensor) -> None:
    """parts[0] (+) parts[1] (+) …, in this order."""
    combine(parts[0], parts[1], out=out)
    for part in parts[2:]:
        combine(out, part, out=out)
