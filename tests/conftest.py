"""Shared helpers: a toy data set, the real launcher with a time limit, many runs in one launch."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import torch.multiprocessing
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
Launch = Callable[..., subprocess.CompletedProcess[str]]


HANG_SECONDS = 1500  # above what anything takes on a slow and busy machine; pytest's own limit is above this one
# No limits of time, and the same examples in every run
hypothesis.settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tests")

# What starts with these tells programs of a job, a proxy or a terminal that the tests have nothing to do with
FOREIGN = (
    "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMI", "NCCL_", "GLOO_", "TORCHELASTIC_",
    "CUDA_VISIBLE_DEVICES", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "TQDM_", "COLUMNS", "FORCE_COLOR",
)  # fmt: skip

LONGEST = (
    "dist/test_train.py", "dist/test_vqgan_engines.py", "dist/test_mixed.py", "test_gpu_benchmark.py",
    "dist/test_machines.py", "smoke/test_readme.py", "dist/test_killed_phases.py", "smoke/test_demo.py",
    "data/test_exactly_once.py", "dist/test_dead_rank.py", "data/test_build.py", "dist/test_doctor.py",
    "dist/test_reshard.py", "golden/test_golden.py", "dist/test_engine.py", "data/test_fetch.py", "data/test_scale.py",
    "dist/test_slurm.py",
)  # fmt: skip

# Tests that compare numbers which processors, kernels and thread counts round otherwise: marked `numerics`
NUMERICS = (
    "engine/", "nn/", "stages/", "checkpoint/test_resume.py", "dist/test_adam16_zero.py", "dist/test_engine.py",
    "dist/test_machines.py", "dist/test_mixed.py", "dist/test_quantizer_ranks.py", "dist/test_reshard.py",
    "dist/test_siglip_ranks.py", "dist/test_vqgan_engines.py",
)  # fmt: skip


def pytest_configure() -> None:
    """Not when a rank imports this file, which has such variables of its own."""
    for name in [name for name in os.environ if name.upper().startswith(FOREIGN)]:
        del os.environ[name]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the numerical tests. The files that take longest come first, so that all workers end together."""
    places = {item: item.path.relative_to(TESTS).as_posix() for item in items}
    for item, place in places.items():
        if place.startswith(NUMERICS):
            item.add_marker("numerics")
    items.sort(key=lambda item: LONGEST.index(places[item]) if places[item] in LONGEST else len(LONGEST))


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
    done = subprocess.run(line, env=environment(TESTS / "fatal") | fatal, **quiet)
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


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """launch(script, *arguments, processes=1): the deepspeed launcher's second part, outside the repository."""

    def run(script: Path, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
        line = short_command(script, *arguments, processes=processes)
        limits: dict[str, Any] = {"timeout": HANG_SECONDS, "cwd": tmp_path, "env": environment()}
        return subprocess.run(line, capture_output=True, text=True, **limits)

    return run


def write_images(folder: Path, count: int, size: int = 8, seed: int = 0) -> Path:
    """A data set of `count` captioned noise pictures in shards of 20."""
    from dalle_scale.curation.shard_writer import ShardWriter

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
    """torch with one thread, here and in programs under test, in which sums have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
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
    path.write_text(yaml.safe_dump({**tree, **changes}, sort_keys=False), encoding="utf-8")
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
