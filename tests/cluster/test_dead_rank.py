"""Logs of the ranks, and the end of a job whose rank dies: named, quick, and to be resumed from."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import HANG_SECONDS, ROOT, TESTS, command, environment, free_port
from support.runs import metrics, toy_run, write_config

from dalle_scale import rank_log
from dalle_scale.checkpoint import resume


def start_ranks(run: Path, what: str, world_size: int) -> list[subprocess.Popen[str]]:
    """The ranks of mortal.py, without a launcher."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
    line = [sys.executable, str(TESTS / "support" / "mortal.py"), str(run), what]
    return [
        subprocess.Popen(
            line, env=environment() | shared | {"RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(world_size)
    ]  # fmt: skip


def log_of(run: Path, rank: int) -> str:
    path = run / "logs" / f"rank_{rank:05d}.log"
    return path.read_text() if path.is_file() else ""


def wait_for(condition: Callable[[], object], timeout_seconds: float = HANG_SECONDS) -> None:
    end = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def test_a_log_has_what_its_rank_prints(tmp_path: Path) -> None:
    """Of Python, C and children, over two runs; the console has it as before, with the bar."""
    for _ in range(2):
        outputs = [process.communicate(timeout=HANG_SECONDS)[0] for process in start_ranks(tmp_path, "quiet", 2)]
    lines = log_of(tmp_path, 1).splitlines()
    for expected in ("one of rank 1", "one from C", "one of a child"):
        assert lines.count(expected) == 2 and expected in outputs[1]
    assert sum("50/50" in line for line in lines) == 2 and not any("20/50" in line for line in lines)
    assert "20/50" in outputs[1]
    heads = [line for line in lines if re.match(r"# \d{4}-.*, pid \d+, rank 1 of 2: .*mortal.py .* quiet$", line)]
    assert len(heads) == 2 and sum(line.endswith("ended with exit code 0") for line in lines) == 2
    assert "a line of rank 0" in outputs[0] + log_of(tmp_path, 0) and "a line of rank 0" not in log_of(tmp_path, 1)
    assert not list((tmp_path / "logs").glob("death_*"))


@pytest.mark.parametrize("what", ["sums", "hang"])
def test_who_was_killed_is_named_once(tmp_path: Path, what: str) -> None:
    """Also where the others hang, as they may in NCCL."""
    processes = start_ranks(tmp_path, what, 3)
    wait_for(lambda: all("one of a child" in log_of(tmp_path, rank) for rank in range(3)))
    processes[1].kill()
    outputs = [process.communicate(timeout=HANG_SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, -9, 1]
    told = re.findall(r"error: (rank .*\n(?:    .*\n)*)", outputs[0] + outputs[2])
    assert len(told) == 1
    assert (
        told[0].startswith("rank 1 (host ") and f", pid {processes[1].pid}) was killed by signal 9 (Killed)" in told[0]
    )
    assert f"{tmp_path}/logs/rank_00001.log" in told[0] and "    one of rank 1\n" in told[0]
    assert "Traceback" not in outputs[0] + outputs[2]
    if what == "sums":  # what the others saw of it is kept
        assert "Traceback" in log_of(tmp_path, 0) and "Traceback" in log_of(tmp_path, 2)


def test_who_raised_is_named_and_its_exit_code_kept(tmp_path: Path) -> None:
    processes = start_ranks(tmp_path, "raise", 2)
    outputs = [process.communicate(timeout=HANG_SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert outputs[1].count("ValueError: one rank is unlike the others") == 1
    assert f"pid {processes[1].pid}) ended with exit code 1; the end of" in outputs[0]
    assert "    ValueError: one rank is unlike the others\n" in outputs[0]


def test_a_finished_rank_and_another_process_of_its_number_are_no_deaths(tmp_path: Path) -> None:
    """A rank that has said goodbye is not mourned, and a process id that is in use again is not its old owner."""
    log = rank_log.RankLog.__new__(rank_log.RankLog)
    log.folder = tmp_path
    gone = subprocess.Popen(["true"])
    gone.wait()
    log._neighbours = [rank_log.Peer(1, "here", gone.pid, started=1)]
    assert [death.how for death in log._failures()] == ["is gone; the launcher has its exit code"]
    for code in (0, 2):
        (tmp_path / "rank_00001.log").write_text(f"words\n{rank_log._last_line(gone.pid, code)}\nlate words of C\n")
        assert [death.exit_code for death in log._failures()] == [code] * (code > 0)
    log._neighbours = [rank_log.Peer(2, "here", os.getpid(), started=1)]
    assert len(log._failures()) == 1


def test_training_ends_and_goes_on(toy_data: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = toy_run(toy_data, run, steps=1_000_000, log={"every": 1, "save_every": 5})
    line = command(ROOT / "launch" / "train.py", str(write_config(tmp_path / "c.yaml", tree)), processes=2)
    options = {"env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(line, **options)
    wait_for(lambda: resume.committed(run) or process.poll() is not None)
    pid = int(re.findall(r"pid (\d+), rank 1 of 2", log_of(run, 1))[-1])
    os.kill(pid, signal.SIGKILL)
    output = process.communicate(timeout=HANG_SECONDS)[0]
    assert process.returncode != 0
    # In one of some thirty deaths the launcher asks first how rank 1 ended: then it is the one to say
    assert f"pid {pid}) was killed by signal 9" in output or (f"pid {pid}) is gone" in output and "= -9" in output)
    assert f"the end of {run}/logs/rank_00001.log:\n" in output and "Traceback" not in output

    saved = resume.committed(run)[-1].step
    done = subprocess.run([*line, f"steps={saved + 2}"], **options, timeout=HANG_SECONDS)
    assert done.returncode == 0 and f"resumes from {run}/checkpoints/{saved:08d}" in done.stdout, done.stdout[-3000:]
    assert metrics(run)[-1]["step"] == saved + 2 and log_of(run, 1).count("rank 1 of 2: ") == 2
