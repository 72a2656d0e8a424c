"""Shared helpers: a toy data set, the real launcher with a time limit, many runs in one launch."""

from __future__ import annotations

import io
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
Launch = Callable[..., subprocess.CompletedProcess[str]]


def environment() -> dict[str, str]:
    """For programs under test: one thread each, stages below tests/ can be found."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def command(script: Path, *arguments: str, processes: int = 1) -> list[str]:
    """A command line of the deepspeed launcher, on a port of its own."""
    launcher = Path(sys.executable).with_name("deepspeed")
    options = ["-q", f"--num_gpus={processes}", f"--master_port={free_port()}"]
    return [str(launcher), *options, str(script), *map(str, arguments)]


def free_port() -> int:
    """A port that will still be free when the launcher takes it, seconds later: below those that connections get."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """launch(script, *arguments, processes=1, timeout_seconds=240): the deepspeed launcher, outside the repository."""

    def run(
        script: Path, *arguments: str, processes: int = 1, timeout_seconds: float = 240
    ) -> subprocess.CompletedProcess[str]:
        line = command(script, *arguments, processes=processes)
        limits: dict[str, Any] = {"timeout": timeout_seconds, "cwd": tmp_path, "env": environment()}
        return subprocess.run(line, capture_output=True, text=True, **limits)

    return run


def write_images(folder: Path, count: int, size: int = 8, seed: int = 0) -> Path:
    """A data set of `count` captioned noise pictures in shards of 20."""
    from dalle_scale.data.shards import ShardWriter

    draw = np.random.default_rng(seed)
    with ShardWriter(folder, samples_per_shard=20) as writer:
        for index in range(count):
            file = io.BytesIO()
            base = draw.integers(0, 256, 3, dtype=np.uint8)
            noise = draw.integers(0, 40, (size, size, 3), dtype=np.uint8)
            Image.fromarray((base // 2 + noise).astype(np.uint8)).save(file, "png")
            writer.add(f"{index:05d}", {"png": file.getvalue(), "txt": f"picture number {index}".encode()})
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch with one thread, in which sums have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`data:` section: 50 training and 13 held-out pictures of 8 x 8."""
    folder = tmp_path_factory.mktemp("toy_data")
    return {
        "train": str(write_images(folder / "train", 50)),
        "valid": str(write_images(folder / "valid", 13, seed=1)),
    }


def write_config(path: Path, tree: dict[str, Any], **changes: Any) -> Path:
    """A run's YAML; `changes` replace top-level keys."""
    path.write_text(yaml.safe_dump({**tree, **changes}, sort_keys=False))
    return path


def toy_run(data: dict[str, str], run: Path, **changes: Any) -> dict[str, Any]:
    """Configuration tree of a short run of the toy stage."""
    tree = {
        "stage": "toys.autoencoder",
        "run": str(run),
        "updates": 8,
        "batch_samples": 8,
        "data": data,
        "optim": {"model": {"lr": 0.003, "weight_decay": 0.1, "clip_norm": 0.5, "ema_decay": 0.8}},
        "engine": {"dtype": "fp32"},  # not what this machine is fastest with
        "log": {"every": 1},
    }
    return {**tree, **changes}


def metrics(run: Path) -> list[dict[str, float]]:
    """Lines of a run's metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocks = ("time_seconds", "samples_per_second")
    return [{key: value for key, value in line.items() if key not in clocks} for line in lines]
