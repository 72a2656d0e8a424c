"""launch/doctor.py names the rank that is missing, different, slow or stuck."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp
from support.processes import HANG_SECONDS, ROOT, Launch, free_port, in_ranks

from dalle_scale.cluster import diagnostics, probes
from dalle_scale.types import UserError

HOST = socket.gethostname()


def rank_of_a_cluster(rank: int, folder: str, world_size: int, port: int, case: str, timeout_seconds: float) -> None:
    """One rank, which writes what it was told, and its errors to a file. The last is odd. Speeds are real, and this
    machine may be busy."""
    errors = os.open(f"{folder}/{rank}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    probes.LINK_BYTES, probes.ROUNDS, probes.SHARED_SECONDS = 2**16, 3, 0.5
    run, told = Path(folder) / "run", {}
    if rank == world_size - 1:
        if case == "absent":
            return
        if case == "old":
            versions = probes.versions
            probes.versions = lambda: versions() | {"torch": "1.13"}
            os.environ["NCCL_ALGO"] = "Tree"
        if case == "slow":
            slow_down("multiply")
        if case == "elsewhere":
            run = Path(folder) / "own"
            measure = probes.measure_clock
            probes.measure_clock = lambda: measure() + 100
        if case == "stuck":
            probes.first_sum = lambda: time.sleep(1000)
    if case == "slow":
        slow_down("exchange", None if rank == world_size - 1 else world_size - 1)
    try:
        report = diagnostics.examine(run, timeout_seconds, 0.001)
        told = {"defects": report.defects, "table": diagnostics.table(report)} if report else {}
    except UserError as error:
        told = {"error": str(error)}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(told))
    os._exit(0)


def slow_down(name: str, peer: int | None = None) -> None:
    """Let a probe say that it took longer, of a link only where it leads to `peer`; both ends of a link say so. By far
    more than the share that is asked for, whatever this machine is: nobody waits so long."""
    probe = getattr(probes, name)

    def slow(*arguments: Any) -> float:
        return probe(*arguments) + (1e6 if peer in (None, arguments[-1]) else 0)

    setattr(probes, name, slow)


def cluster(folder: Path, world_size: int, case: str, timeout_seconds: float = HANG_SECONDS) -> list[dict[str, Any]]:
    """What each rank was told."""
    arguments = (str(folder), world_size, free_port(), case, timeout_seconds)
    in_ranks(rank_of_a_cluster, *arguments, ranks=world_size)
    paths = [folder / f"{rank}.json" for rank in range(world_size)]
    return [json.loads(path.read_text()) if path.exists() else {} for path in paths]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (
            "old",
            [
                f"rank 2 on {HOST}: NCCL_ALGO is 'Tree', elsewhere 'unset'",
                f"rank 2 on {HOST}: torch is '1.13', elsewhere",
            ],
        ),
        ("slow", [f"rank 2 on {HOST}: slow arithmetic: ", f"rank 2 on {HOST}: slow links: "]),
        (
            "elsewhere",
            [
                f"rank 0 on {HOST}: does not see in ",
                f"rank 1 on {HOST}: does not see in ",
                f"rank 2 on {HOST}: does not see in ",
                f"rank 2 on {HOST}: its clock is +",
            ],
        ),
    ],
)
def test_the_odd_rank_is_named(tmp_path: Path, case: str, expected: list[str]) -> None:
    told = cluster(tmp_path, 3, case)
    assert len(told[0]["defects"]) == len(expected), told[0]
    for line, beginning in zip(told[0]["defects"], expected, strict=True):
        assert line.startswith(beginning)
    assert told[0]["table"].count(HOST[:16]) == 3 and "nan" not in told[0]["table"]
    assert told[1:] == [{}, {}] and not list(tmp_path.glob("*/doctor_*"))


def test_who_does_not_arrive_is_named_on_all_others(tmp_path: Path) -> None:
    told = cluster(tmp_path, 3, "absent", timeout_seconds=8)
    for one in told[:2]:
        assert one["error"].startswith(f"rank 2 of 3 did not arrive within 8 s; there are ranks 0, 1 on {HOST}: ")


def test_who_gets_stuck_is_named(tmp_path: Path) -> None:
    with pytest.raises(mp.ProcessExitedException) as ended:
        cluster(tmp_path, 2, "stuck", timeout_seconds=8)
    assert ended.value.exit_code == 3
    assert "error: an all-reduce did not end in 8 s: " in (tmp_path / "0.err").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("speeds", "hosts", "expected"),
    [
        # one machine: the rank with two slow links, a slow link between two good ranks, and too few to tell
        ({(0, 1): 9, (1, 2): 8, (2, 3): 1, (3, 0): 1}, "aaaa", ["rank 3 on a: slow links: 1 GB/s at best"]),
        ({(0, 1): 9, (1, 2): 1, (2, 3): 8, (3, 0): 9}, "aaaa", ["between rank 1 on a and rank 2 on a: a slow link"]),
        ({(0, 1): 9, (1, 2): 1, (2, 0): 1}, "aaa", ["rank 2 on a: slow links"]),
        ({(0, 1): 9}, "aa", []),
        # links between machines are slower than those inside, as they must be; machine c is slower than the others
        ({(0, 1): 90, (1, 2): 9, (2, 3): 80, (3, 4): 2, (4, 5): 99, (5, 0): 2}, "aabbcc", ["host c: slow links"]),
        ({(0, 1): 90, (1, 2): 9, (2, 3): 80, (3, 4): 9, (4, 5): 99, (5, 0): 9}, "aabbcc", []),
    ],
)
def test_links_are_compared_with_their_like(
    speeds: dict[diagnostics.Link, float], hosts: str, expected: list[str]
) -> None:
    lines = diagnostics.judge_links(speeds, list(hosts), 0.5)
    assert len(lines) == len(expected)
    for line, beginning in zip(lines, expected, strict=True):
        assert line.startswith(beginning) and "below 0.5 x the median of " in line


def test_most_ranks_are_right_and_among_equals_rank_0() -> None:
    said = [{"torch": "2"}, {"torch": "1"}, {"torch": "2"}, {}]
    assert diagnostics.compare(said, list("abcd")) == [
        "rank 1 on b: torch is '1', elsewhere '2'",
        "rank 3 on d: torch is 'unset', elsewhere '2'",
    ]
    assert diagnostics.compare([{"a": "x"}, {"a": "y"}], list("ab")) == ["rank 1 on b: a is 'y', elsewhere 'x'"]


def test_the_program(launch: Launch, tmp_path: Path) -> None:
    program = ROOT / "launch" / "doctor.py"
    done = launch(program, "--run", str(tmp_path / "run"), "--slow-below", "0.001", processes=3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all is well: 3 ranks" in done.stdout and done.stdout.count(HOST[:16]) == 3
    (tmp_path / "file").touch()
    done = launch(program, "--run", str(tmp_path / "file"), "--slow-below", "0.001", processes=2)
    assert done.returncode == 3, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    problem = f"cannot write to {tmp_path}/file: Not a directory"
    assert lines == [f"error: rank {rank} on {HOST}: {problem}" for rank in range(2)]


def test_the_source_is_that_of_the_whole_library() -> None:
    digest = hashlib.sha256()
    for path in sorted((ROOT / "dalle_scale").rglob("*.py")):
        digest.update(path.relative_to(ROOT / "dalle_scale").as_posix().encode() + path.read_bytes())
    assert probes.versions()["dalle_scale"] == f"source {digest.hexdigest()[:8]}"
