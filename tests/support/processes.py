"""Programs under test: where they lie, their environment, the launcher, ranks, and how long a hang takes."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing

ROOT = Path(__file__).parents[2]


TESTS = ROOT / "tests"


Launch = Callable[..., subprocess.CompletedProcess[str]]


HANG_SECONDS = 1500  # above what anything takes on a slow and busy machine; pytest's own limit is above this one


def environment(*folders: Path) -> dict[str, str]:
    """For programs under test: as many threads as pytest was given, one by default; modules in `folders` and stages
    below tests/ can be found."""
    paths = [*map(str, folders), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": threads, "DS_ACCELERATOR": "cpu"}


def run_until(count: int, pattern: str, line: list[str]) -> None:
    """Run a program that is killed when `count` files with such paths have their names and one of its processes is
    about to rename a file."""
    fatal = {"FATAL_PATTERN": pattern, "FATAL_COUNT": str(count)}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": HANG_SECONDS}
    done = subprocess.run(line, env=environment(TESTS / "support" / "fatal") | fatal, **quiet)
    assert done.returncode == -signal.SIGKILL, "ended by itself"


def command(script: Path, *arguments: str, processes: int = 1) -> list[str]:
    """A command line of the deepspeed launcher, on a port of its own."""
    launcher = Path(sys.executable).with_name("deepspeed")
    options = ["-q", f"--num_gpus={processes}", f"--master_port={free_port()}"]
    return [str(launcher), *options, str(script), *map(str, arguments)]


def short_command(script: Path, *arguments: str, processes: int) -> list[str]:
    """What that line starts on this machine: the part of the launcher that starts the ranks and looks after them. The
    part before it imports torch for two seconds to read its options."""
    hosts = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(processes))}).encode()).decode()
    options = [f"--world_info={hosts}", f"--master_port={free_port()}", "--quiet"]
    return [sys.executable, "-m", "deepspeed.launcher.launch", *options, str(script), *map(str, arguments)]


def free_port() -> int:
    """A port that will still be free when the launcher takes it, seconds later: below those that connections get."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def in_ranks(function: Callable[..., None], *arguments: Any, ranks: int = 2) -> None:
    """function(rank, *arguments) in a process for each rank. They fork from one that has imported what takes seconds,
    and whose standard output and environment are those of the first call."""
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["dalle_scale.train", "dalle_scale.sampling.sampler"]
    )
    torch.multiprocessing.start_processes(function, arguments, nprocs=ranks, start_method="forkserver")
