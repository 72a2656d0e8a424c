"""Shared helpers: a toy data set, the real launcher with a time limit, many runs in one launch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import torch.multiprocessing
from support.marks import marks_of, refuse_processes
from support.processes import HANG_SECONDS, TESTS, Launch, environment, short_command
from support.runs import write_images

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
    "launch/test_train.py", "engine/test_vqgan_engines.py", "engine/test_mixed.py", "benchmarks/test_gpu_benchmark.py",
    "engine/test_nodes.py", "smoke/test_readme.py", "launch/test_killed_phases.py", "smoke/test_demo.py",
    "data/test_exactly_once.py", "cluster/test_dead_rank.py", "curation/test_build.py", "launch/test_doctor.py",
    "engine/test_reshard.py", "golden/test_golden.py", "engine/test_engine.py", "curation/test_fetch.py",
    "benchmarks/test_scale.py", "launch/test_slurm.py",
)  # fmt: skip

# Tests that compare numbers which processors, kernels and thread counts round otherwise: marked `numerics`
NUMERICS = (
    "checkpoint/test_resume.py", "engine/", "evaluation/test_frechet.py", "evaluation/test_pixel_bits.py",
    "evaluation/test_ssim.py", "models/", "nn/", "stages/",
)  # fmt: skip

# Tests that take more than about 5 s or start processes through the library, by how their names begin: marked `slow`
SLOW = (
    "benchmarks/test_fault_accounting.py::test_the_project_under", "benchmarks/test_gpu_benchmark.py",
    "curation/test_build.py::test_a_killed_worker", "curation/test_build.py::test_any_number_of_workers",
    "curation/test_build.py::test_images_that_end_their", "curation/test_fetch.py::test_a_host_that_never",
    "cluster/test_plan.py::test_nothing_fixes", "data/test_cache.py::test_a_killed_process",
    "data/test_cache.py::test_after_a_fork", "data/test_cache.py::test_one_who_waited",
    "data/test_cache.py::test_processes_at_once", "data/test_exactly_once.py", "data/test_pipeline.py",
    "data/test_pool.py", "data/test_remote.py::test_batches_are_those",
    "data_tools/test_describe_shards.py::test_workers",
    "data_tools/test_download.py", "engine/test_leave.py", "golden/", "launch/test_fidelity_inception.py",
    "launch/test_steps.py", "smoke/",
)  # fmt: skip


def pytest_configure() -> None:
    """Not when a rank imports this file, which has such variables of its own."""
    for name in [name for name in os.environ if name.upper().startswith(FOREIGN)]:
        del os.environ[name]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their files and by the processes that they start. The files that take longest come first, so
    that all workers end together."""
    places = {item: item.path.relative_to(TESTS).as_posix() for item in items}
    for item, place in places.items():
        if place.startswith(NUMERICS):
            item.add_marker("numerics")
        if f"{place}::{item.name}".startswith(SLOW):
            item.add_marker("slow")
        for mark in marks_of(item):
            item.add_marker(mark)
    items.sort(key=lambda item: LONGEST.index(places[item]) if places[item] in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def _processes_are_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test without a mark starts no process, so that `make quick` is what it says."""
    with pytest.MonkeyPatch.context() as patch:
        if not any(request.node.get_closest_marker(mark) for mark in ("slow", "distributed", "long")):
            refuse_processes(patch)
        yield


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """launch(script, *arguments, processes=1): the deepspeed launcher's second part, outside the repository."""

    def run(script: Path, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
        line = short_command(script, *arguments, processes=processes)
        limits: dict[str, Any] = {"timeout": HANG_SECONDS, "cwd": tmp_path, "env": environment()}
        return subprocess.run(line, capture_output=True, text=True, **limits)

    return run


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
    """`data:` section: 50 training and 13 held-out images of 8 x 8."""
    folder = tmp_path_factory.mktemp("toy_data")
    return {
        "train": str(write_images(folder / "train", 50)),
        "valid": str(write_images(folder / "valid", 13, seed=1)),
    }
