"""Sums through shared memory against numpy's, with a thread for each rank; and what happens when a rank has died."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from support.processes import HANG_SECONDS, environment
from torch import Tensor

from dalle_scale.engine import shared_memory
from dalle_scale.engine.shared_memory import SharedMemory

PART = shared_memory._PART_BYTES
SMALL = shared_memory._SMALL_BYTES


@contextmanager
def shared_file(world_size: int, part_bytes: int = PART) -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, shared_memory.size_bytes(world_size, part_bytes))
        yield file.fileno()


def on_all_ranks(world_size: int, work: Callable[[SharedMemory], Tensor], part_bytes: int = PART) -> list[Tensor]:
    """What `work` returns on each rank."""
    with shared_file(world_size, part_bytes) as file, ThreadPoolExecutor(world_size) as pool:
        ranks = [SharedMemory(os.dup(file), rank, world_size, part_bytes) for rank in range(world_size)]
        return list(pool.map(work, ranks))


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(-1000, 1000, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize(
    ("op", "dtype"),
    [(op, dtype) for op in ("sum", "max") for dtype in (torch.float32, torch.float64, torch.int64, torch.int32)]
    + [("mean", dtype) for dtype in (torch.float32, torch.float64)],
)
@pytest.mark.parametrize("count", [0, 1, 7, SMALL // 8, SMALL // 4 + 1, PART // 8 + 3, PART // 2 + 1])
def test_against_numpy(world_size: int, op: str, dtype: torch.dtype, count: int) -> None:
    """Whole numbers, so that sums are exact in any order; counts on both sides of each border."""

    def work(memory: SharedMemory) -> Tensor:
        tensor = values(memory.rank, (count,), dtype)
        memory.all_reduce(tensor, op)
        return tensor

    combine = np.maximum if op == "max" else np.add
    want = combine.reduce([values(rank, (count,), dtype).numpy() for rank in range(world_size)])
    if op == "mean":
        want = want / want.dtype.type(world_size)
    for tensor in on_all_ranks(world_size, work):
        assert tensor.dtype == dtype and np.array_equal(tensor.numpy(), want)


def test_all_ranks_have_the_same_bits() -> None:
    """Of fp32 and bf16 numbers whose sum depends on the order."""
    for dtype in (torch.float32, torch.bfloat16):
        for count in (100, 100_000):

            def work(memory: SharedMemory, count: int = count, dtype: torch.dtype = dtype) -> Tensor:
                generator = torch.Generator().manual_seed(memory.rank)
                tensor = (torch.randn(count, generator=generator) * 10.0**memory.rank).to(dtype)
                memory.all_reduce(tensor)
                return tensor

            first, *others = on_all_ranks(5, work)
            assert first.isfinite().all() and first.any() and all(torch.equal(other, first) for other in others)


def test_many_operations_in_a_row_do_not_meet() -> None:
    """Small and large in turn, one rank always late and another always early."""

    def work(memory: SharedMemory) -> Tensor:
        results = []
        for step in range(60):
            if step % 3 == memory.rank:
                torch.randn(200, 200) @ torch.randn(200, 200)  # late
            tensor = values(memory.rank, (1 + 5000 * (step % 2),), torch.int64, seed=step)
            memory.all_reduce(tensor)
            results.append(tensor)
        return torch.cat(results)

    want = [
        sum(values(rank, (1 + 5000 * (step % 2),), torch.int64, seed=step) for rank in range(3)) for step in range(60)
    ]
    for result in on_all_ranks(3, work):
        assert torch.equal(result, torch.cat(want))


@pytest.mark.parametrize("elements", [5, 3000, 100_003])
def test_a_room_is_read_before_it_is_written_again(elements: int) -> None:
    """Ranks that read slowly, or write early, see what belongs to their turn."""

    def part(rank: int, turn: int) -> Tensor:
        return values(rank, (elements,), torch.float32, seed=turn)

    def work(memory: SharedMemory) -> Tensor:
        right = []
        for turn in range(40):
            memory.mine(elements).copy_(part(memory.rank, turn))
            collective = memory.gathered if turn % 2 else memory.mean
            with collective(elements) as found:
                if turn % 3 == memory.rank:
                    torch.randn(200, 200) @ torch.randn(200, 200)  # late
                parts = torch.stack([part(rank, turn) for rank in range(3)])
                right.append(torch.equal(found, parts if turn % 2 else parts.sum(0) / 3))
        return torch.tensor(right)

    assert all(right.all() and len(right) == 40 for right in on_all_ranks(3, work, part_bytes=4 * elements))


def test_tensors_that_are_not_contiguous() -> None:
    def work(memory: SharedMemory) -> Tensor:
        tensor = values(memory.rank, (40, 50), torch.float32).T
        memory.all_reduce(tensor)
        return tensor

    want = sum(values(rank, (40, 50), torch.float32).T for rank in range(2))
    assert all(torch.equal(result, want) for result in on_all_ranks(2, work))


def test_a_room_that_is_gone_holds_no_file() -> None:
    def opened(file: int) -> int:
        """How often this process has it open."""
        found = []
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # that of the listing itself
                found.append(os.path.samestat(os.fstat(int(name)), os.fstat(file)))
        return sum(found)

    with shared_file(1) as file:
        rows = SharedMemory(os.dup(file), 0, 1)._parts
        gc.collect()
        assert opened(file) == 2 and not rows.any()  # what is mapped holds it too
        del rows
        gc.collect()
        assert opened(file) == 1


ALONE = """
import os, sys, torch.distributed
from dalle_scale.engine import shared_memory
shared_memory._SHM = sys.argv[1]
store = f"file://{sys.argv[1]}/store"
torch.distributed.init_process_group("gloo", rank=int(sys.argv[2]), world_size=2, init_method=store)
if sys.argv[2] == "0":
    shared_memory.share(0, 2)
"""


def test_no_file_stays_of_ranks_that_did_not_come(tmp_path: Path) -> None:
    """One of them ends before it shares."""
    line = [sys.executable, "-c", ALONE, str(tmp_path)]
    ranks = [subprocess.Popen([*line, str(rank)], stderr=subprocess.PIPE, env=environment()) for rank in range(2)]
    for rank in ranks:
        rank.communicate(timeout=HANG_SECONDS)
    assert [rank.returncode for rank in ranks] == [1, 0]
    assert not list(tmp_path.glob("dalle_scale_*"))


DIES = """
import os, sys
from dalle_scale.engine.shared_memory import SharedMemory
import torch
memory = SharedMemory(int(sys.argv[1]), 1, 2)
print("ready", flush=True)
memory.all_reduce(torch.ones(3))
os.kill(os.getpid(), 9)
"""


def test_who_waits_for_the_dead_is_told() -> None:
    with shared_file(2) as file:
        process = subprocess.Popen([sys.executable, "-c", DIES, str(file)], pass_fds=[file], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        memory = SharedMemory(os.dup(file), 0, 2)
        tensor = torch.ones(3)
        memory.all_reduce(tensor)
        assert tensor.tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match="rank 1 has ended while rank 0 waits"):
            memory.all_reduce(tensor)
        assert process.wait(timeout=60) == -9


def test_who_came_and_left_at_once_has_not_died() -> None:
    with shared_file(2) as file:
        memory = SharedMemory(os.dup(file), 0, 2)  # of rank 1 nobody holds the lock
        memory._arrive()
        with pytest.raises(RuntimeError, match="rank 1 has ended"):
            memory._look([1])
        memory._arrived[1] += 1
        memory._look([1])
