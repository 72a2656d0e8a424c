"""Facts and measurements of a rank, for `doctor`: facts, a sum, a shared folder, clocks, arithmetic, links."""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import shutil
import socket
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as torch_dist
from torch import Tensor

from dalle_scale import dist

PACKAGES = ("torch", "deepspeed", "numpy", "pydantic", "safetensors", "pyarrow", "pillow", "sentencepiece")
VARIABLES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "OMP_", "FI_", "UCX_", "DS_ACCELERATOR", "LD_LIBRARY_PATH", "PYTHONPATH")
LINK_BYTES = 16 * 2**20
ROUNDS = 5  # of each probe; the best counts, because other work can only make it slower
SHARED_SECONDS = 10.0  # in which a file must be seen by the others: network file systems remember that it was not there


@dataclass(frozen=True)
class Facts:
    """Facts about a rank."""

    rank: int
    host: str
    device: str
    free_bytes: int  # of the device
    total_bytes: int
    environment: dict[str, str]  # versions and environment variables, which must not differ


def facts_of_this_rank() -> Facts:
    """Allocates nothing."""
    device = dist.device()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        free, total = torch.cuda.mem_get_info(device)
    else:
        name = f"cpu, {len(os.sched_getaffinity(0))} cores"
        page = os.sysconf("SC_PAGE_SIZE")
        free, total = page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")
    variables = {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}
    return Facts(dist.rank(), socket.gethostname(), name, free, total, versions() | variables)


def versions() -> dict[str, str]:
    """Python, packages, the CUDA that torch was built for, and a digest of this library's own source."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    folder, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found | {"dalle_scale": f"source {digest.hexdigest()[:8]}"}


def measure_clock() -> float:
    """Seconds that this rank's clock is ahead of rank 0's, good to the latency of the network. A collective."""
    ahead = torch.zeros(1, dtype=torch.float64)
    for rank in range(1, dist.world_size()):
        if dist.rank() == rank:  # rank 0 answers with its time
            readings = []
            for _ in range(ROUNDS):
                began, answer = time.time(), torch.zeros(1, dtype=torch.float64)
                torch_dist.send(answer, 0)
                torch_dist.recv(answer, 0)
                ended = time.time()
                readings.append((ended - began, (began + ended) / 2 - answer.item()))
            ahead[0] = min(readings)[1]
        elif dist.is_main():
            for _ in range(ROUNDS):
                torch_dist.recv(torch.zeros(1, dtype=torch.float64), rank)
                torch_dist.send(torch.tensor([time.time()], dtype=torch.float64), rank)
    return ahead.item()


def measure_gflops() -> float:
    """Speed of matrix products: fp32 on one core, or bf16 on a GPU."""
    on_gpu = dist.device().type == "cuda"
    side = 8192 if on_gpu else 512
    matrix = torch.ones(side, side, device=dist.device(), dtype=torch.bfloat16 if on_gpu else torch.float32)
    return 2e-9 * side**3 / min(multiply(matrix) for _ in range(ROUNDS))


def multiply(matrix: Tensor) -> float:
    """Seconds for the square of a matrix."""
    began = _now()
    torch.mm(matrix, matrix)
    return _now() - began


def measure_link() -> tuple[float, float] | None:
    """Bandwidth (1e9 bytes a second) and latency (seconds) to the next rank. Links that share no rank are measured at a
    time; with one rank there is none, and with two there is one, which is rank 0's. A collective."""
    world_size, me = dist.world_size(), dist.rank()
    num_links = world_size if world_size > 2 else world_size - 1
    found = None
    for turn in range(3):  # even, odd, and the last of an odd ring
        torch_dist.all_reduce(torch.zeros(1))  # a barrier, on the host
        for first in range(num_links):
            second = (first + 1) % world_size
            if me in (first, second) and turn == (2 if first == world_size - 1 and first % 2 == 0 else first % 2):
                peer = second if me == first else first
                few, many = (torch.zeros(n, dtype=torch.uint8, device=dist.device()) for n in (1, LINK_BYTES))
                latency, seconds = (min(exchange(x, peer) for _ in range(ROUNDS + 1)) for x in (few, many))
                if me == first:
                    found = (2e-9 * LINK_BYTES / seconds, latency / 2)
    return found


def exchange(tensor: Tensor, peer: int) -> float:
    """Seconds for a tensor to go to another rank and come back, or the other way about on that rank."""
    began = _now()
    steps = (torch_dist.send, torch_dist.recv) if dist.rank() < peer else (torch_dist.recv, torch_dist.send)
    for step in steps:
        step(tensor, peer)
    return _now() - began


def _now() -> float:
    if dist.device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def first_sum() -> float:
    """The sum of all rank numbers, counted from 1."""
    return dist.all_reduce(torch.tensor([dist.rank() + 1.0], device=dist.device())).item()


def share(run: Path) -> str:
    """Write a file, look for those of all ranks: what is wrong, or "". A collective."""
    token = torch.tensor([secrets.randbits(62)])
    dist.broadcast(token)
    folder, problem = run / f"doctor_{token.item():x}", ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / str(dist.rank())).write_text(str(dist.rank()), encoding="utf-8")
    except OSError as error:
        problem = f"cannot write to {run}: {error.strerror}"
    torch_dist.all_reduce(torch.zeros(1))
    until = time.monotonic() + SHARED_SECONDS
    everyone = {str(rank) for rank in range(dist.world_size())}
    while not problem and (unseen := everyone - {path.name for path in folder.iterdir()}):
        if time.monotonic() > until:
            names = ", ".join(sorted(unseen, key=int)[:8])
            problem = f"does not see in {run} what was written by rank {names}: it must be one folder for all"
        time.sleep(0.05)
    torch_dist.all_reduce(torch.zeros(1))
    shutil.rmtree(folder, ignore_errors=True)
    return problem
