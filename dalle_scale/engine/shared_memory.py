"""Memory of all ranks together: each writes its values, and reads their mean or what all have written.

Ranks that compute on the CPUs of one host share it. gloo sends through sockets, which takes milliseconds for the
gradients of a net whose step takes 30; here each rank writes into a part of its own, all wait for each other, each sums
one section over all parts, in the order of the ranks, and after another wait all read the result. Elsewhere it is an
ordinary tensor that the process group works on.

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
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol

import torch
import torch.distributed
from torch import Tensor

from dalle_scale import dist

_SHM = "/dev/shm"
_PART_BYTES = 1 << 20  # of one rank, for tensors of any size, which go through it piece by piece
_SMALL_BYTES = 1 << 12  # up to here every rank sums everything, which saves a wait
_LINE = 8  # counters lie a cache line apart, in 64-bit numbers
_EAGER_SECONDS = 0.002  # of waiting without sleeping: a rank that is computing is soon there
_PAUSE_SECONDS = 0.0001
_LOOK_SECONDS = 1.0  # between looks whether who is waited for is alive


class Room(Protocol):
    """Kept fp32 memory. One collective after the other: all ranks write into `mine`, then read in a `with` block."""

    def mine(self, elements: int) -> Tensor:
        """[elements] to write into; holds anything."""

    def mean(self, elements: int) -> AbstractContextManager[Tensor]:
        """The mean of what the ranks have written, [elements], equal to the bit on all of them."""

    def gathered(self, elements: int) -> AbstractContextManager[Tensor]:
        """Values that each rank has written, [ranks, elements]."""


def room(elements: int) -> Room:
    """A room for up to so many numbers of each rank, where this rank computes. Collective."""
    shares = dist.shared_memory() is not None
    return (share(dist.rank(), dist.world_size(), 4 * elements) if shares else None) or GroupRoom(elements)


class GroupRoom:
    """A room whose collectives are the process group's."""

    def __init__(self, elements: int) -> None:
        self._mine = torch.empty(elements, device=dist.device())
        self._gathered = self._mine.new_empty(0)

    def mine(self, elements: int) -> Tensor:
        """See Room."""
        return self._mine[:elements]

    @contextmanager
    def mean(self, elements: int) -> Iterator[Tensor]:
        """See Room."""
        yield dist.all_reduce(self._mine[:elements], "mean")

    @contextmanager
    def gathered(self, elements: int) -> Iterator[Tensor]:
        """See Room."""
        self._gathered.resize_(dist.world_size(), elements)
        yield dist.all_gather(self._gathered, self._mine[:elements])


def size_bytes(world_size: int, part_bytes: int = _PART_BYTES) -> int:
    """Bytes that all ranks together share."""
    return world_size * (_LINE * 8 + _whole_lines(part_bytes))


def _whole_lines(part_bytes: int) -> int:
    line_bytes = _LINE * 8
    return -(-part_bytes // line_bytes) * line_bytes


def share(rank: int, world_size: int, part_bytes: int = _PART_BYTES) -> SharedMemory | None:
    """Memory of all ranks, `part_bytes` each; None where they are not all on one host of the x86 family with room for
    it. Collective, over torch's process group."""
    path, file, size = "", -1, size_bytes(world_size, part_bytes)
    with suppress(OSError):
        if rank == 0 and platform.machine() in ("x86_64", "AMD64"):
            file, path = tempfile.mkstemp(prefix=f"dalle_scale_{secrets.token_hex(8)}_", dir=_SHM)
            os.posix_fallocate(file, 0, size)  # else a full file system kills whoever writes
    named, memory = [path], None
    try:
        torch.distributed.broadcast_object_list(named)
        with suppress(OSError):
            if rank > 0 and named[0]:
                file = os.open(named[0], os.O_RDWR)
        if file >= 0 and os.fstat(file).st_size >= size:
            memory = SharedMemory(file, rank, world_size, part_bytes)
        ready = torch.tensor(int(memory is not None))
        torch.distributed.all_reduce(ready)
    finally:
        if path:
            os.unlink(path)
        if file >= 0 and memory is None:
            os.close(file)
    return memory if ready == world_size else None


class SharedMemory:
    """A room of ranks that are on one host, and all-reduce of their tensors through it.

    Every method raises RuntimeError where another rank has ended.
    """

    def __init__(self, file: int, rank: int, world_size: int, part_bytes: int = _PART_BYTES) -> None:
        """file: descriptor of the shared file, of `size_bytes(world_size, part_bytes)`; closed with this object."""
        self.rank, self.world_size, self.part_bytes = rank, world_size, part_bytes
        self._file = file
        weakref.finalize(self, os.close, file)
        fcntl.lockf(file, fcntl.LOCK_EX, 1, rank)  # held as long as this process lives
        size = size_bytes(world_size, part_bytes)
        memory = torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)
        counters, parts = memory.split([world_size * _LINE * 8, size - world_size * _LINE * 8])
        self._arrived = counters.view(torch.int64).view(world_size, _LINE)[:, 0].numpy()
        self._parts = parts.view(world_size, -1)

    def mine(self, elements: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """See Room. Waits while another rank reads what was there."""
        self._wait()
        own: Tensor = self._parts.view(dtype)[self.rank, :elements]
        return own

    def mean(self, elements: int) -> AbstractContextManager[Tensor]:
        """See Room."""
        return self._reduced(elements, "mean", torch.float32)

    @contextmanager
    def gathered(self, elements: int) -> Iterator[Tensor]:
        """See Room."""
        self._meet()
        yield self._parts.view(torch.float32)[:, :elements]
        self._arrive()

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> None:
        """Replace `tensor` by its "sum", "mean" or "max" over the ranks, equal to the bit on all of them."""
        flat = tensor.detach().contiguous().view(-1)
        for chunk in flat.split(self.part_bytes // tensor.element_size()):
            self.mine(len(chunk), chunk.dtype).copy_(chunk)
            with self._reduced(len(chunk), op, chunk.dtype) as result:
                chunk.copy_(result)
        if flat.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(flat.view_as(tensor))

    @contextmanager
    def _reduced(self, elements: int, op: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """Reduction of the values of all ranks."""
        parts = self._parts.view(dtype)[:, :elements]
        self._meet()
        if elements * dtype.itemsize <= _SMALL_BYTES:
            yield _combined(parts, op, out=torch.empty(elements, dtype=dtype))
        else:
            sections = parts.chunk(self.world_size, dim=1)
            if self.rank < len(sections):
                _combined(sections[self.rank], op, out=sections[self.rank][0])
            self._meet()
            yield parts[0]
        self._arrive()

    def _meet(self) -> None:
        """Wait until every rank has come here."""
        self._arrive()
        self._wait()

    def _arrive(self) -> None:
        self._arrived[self.rank] += 1

    def _wait(self) -> None:
        """Until every rank has arrived as often as this one."""
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
            if self._arrived[rank] >= self._arrived[self.rank]:  # it came, and left at once
                continue
            raise RuntimeError(f"rank {rank} has ended while rank {self.rank} waits for it")


def _combined(parts: Tensor, op: str, out: Tensor) -> Tensor:
    """parts[0] (+) parts[1] (+) …, in this order."""
    combine = torch.maximum if op == "max" else torch.add
    combine(parts[0], parts[1], out=out)
    for part in parts[2:]:
        combine(out, part, out=out)
    return out.div_(len(parts)) if op == "mean" else out
