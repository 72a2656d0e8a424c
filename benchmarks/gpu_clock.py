"""Clocks, matrix rate, memory, and where and when: what all measurements of gpu.py share."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from environment import PACKAGES, ROOT

from dalle_scale import io, log
from dalle_scale.programs import Programs
from dalle_scale.types import UserError

WARM_UP = 2  # calls that are not counted: they compile kernels and fill the allocator
RATE_REPETITIONS = 10
RATE_SIZE = {"cuda": 8192, "cpu": 256}  # rows and columns of the matrices whose product gives the rate


def open_device(name: str) -> torch.device:
    """The device to measure on, which is also the engine's. To be called before the engine is imported.

    Raises:
        UserError: there is no such device here.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda, but PyTorch finds no GPU here; take --device cpu with --toy")
    os.environ["DS_ACCELERATOR"] = name
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes until the device has done what it was given."""
    synchronise(device)
    began = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - began


def synchronise(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def repeated(call: Callable[[], Any], device: torch.device, repetitions: int) -> list[float]:
    """Seconds of each call, after `WARM_UP` others."""
    for _ in range(WARM_UP):
        call()
    return [seconds(call, device) for _ in range(repetitions)]


def spread(times: list[float]) -> dict[str, float]:
    """Median, lowest and highest, seconds."""
    return {
        "seconds": round(statistics.median(times), 5),
        "seconds_lowest": round(min(times), 5),
        "seconds_highest": round(max(times), 5),
    }


def matrix_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """Floating-point operations a second of a product of two large square matrices of normal numbers; the median."""
    size = RATE_SIZE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    times = repeated(lambda: torch.mm(left, right, out=out), device, RATE_REPETITIONS)
    return 2.0 * size**3 / statistics.median(times)


# ---- memory ----


def forget_peak(device: torch.device) -> None:
    """Let the allocator's peak begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes of tensors since `forget_peak`; None on CPUs, whose allocator does not count."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def device_gib(device: torch.device) -> float:
    """Memory of the GPU, or of the machine, GiB."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def release(device: torch.device) -> None:
    """Give back the memory of an engine that nobody holds any more, before the next is made."""
    gc.unfreeze()  # build.build hides what it has made from the collector
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- results ----


class Report:
    """Where a result goes: a file if there is one to write, and the console."""

    def __init__(self, path: Path | None, device: torch.device) -> None:
        self._path, self._about = path, described(device)

    @property
    def image(self) -> Path | None:
        """Where an image of the result goes."""
        return self._path.with_suffix(".png") if self._path else None

    def write(self, result: dict[str, Any], last: bool = True) -> None:
        """Write; print if it is the `last`. What is there before a time limit strikes is kept."""
        text = json.dumps({**result, **self._about}, indent=1)
        if self._path is not None:
            io.write(self._path, text + "\n")
        if last:
            log.say(text)


def described(device: torch.device) -> dict[str, Any]:
    """Command, hardware, versions, commit and date, as `environment.describe` has them, and the GPU.

    A GPU machine may hold a copy of the project without its history and without packages that are not needed here.
    """
    versions = {name: _version(name) for name in (*PACKAGES, "triton", "transformers")}
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
    return {
        "command": Programs(ROOT).typed(["python", *sys.argv]),
        "hardware": _hardware(device),
        "versions": {"python": platform.python_version(), **versions},
        "commit": _commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {device_gib(device):.0f} GiB; {os.cpu_count()} CPU cores"
    return f"{os.cpu_count()} CPU cores"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"
