"""launch/slurm.sbatch with stand-ins for srun and scontrol: two "nodes" on this host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.processes import HANG_SECONDS, ROOT, environment
from support.runs import metrics, toy_run, write_config

from dalle_scale.checkpoint import resume

SCRIPT = ROOT / "launch" / "slurm.sbatch"
# Both names are this host's, and DeepSpeed wants two. Like the true one, srun passes SIGUSR1 on, ends all
# with one, and ends with the highest exit code
SRUN = """#!/bin/bash
set -m
while [[ $1 == --* ]]; do shift; done
for id in 0 1; do SLURM_NODEID=$id "$@" & done
trap 'for pid in $(jobs -p); do kill -USR1 -- -$pid; done' USR1
code=0
for pid in $(jobs -p); do
    wait $pid; one=$?
    while kill -0 $pid 2>/dev/null; do wait $pid; one=$?; done
    if [[ $one != 0 ]]; then for other in $(jobs -p); do kill -- -$other 2>/dev/null; done; fi
    code=$((one > code ? one : code))
done
exit $code
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf 'localhost\\n127.0.0.1\\n'; else echo "$@" >>scontrol.txt; fi
"""


def slurm(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """The batch script as Slurm would start it, in `folder`."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[0-1]", "SLOTS": "1", "PATH": path}
    output = (folder / "output").open("a")
    options = {"cwd": folder, "env": environment() | job | variables, "stdout": output, "stderr": output}
    return subprocess.Popen(["bash", str(SCRIPT), *arguments], text=True, **options)


def requeued(folder: Path) -> int:
    path = folder / "scontrol.txt"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def test_at_the_time_limit_it_saves_and_is_queued_again(toy_data: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path / "c.yaml", toy_run(toy_data, run, steps=1_000_000))
    train = [str(ROOT / "launch" / "train.py"), str(config)]
    job = slurm(tmp_path, *train)
    until = time.monotonic() + HANG_SECONDS
    while not (run / "metrics.jsonl").is_file() or len(metrics(run)) < 3:
        assert job.poll() is None and time.monotonic() < until, (tmp_path / "output").read_text()[-3000:]
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=HANG_SECONDS) == 0, (tmp_path / "output").read_text()[-3000:]
    (checkpoint,) = resume.committed(run)
    assert (tmp_path / "scontrol.txt").read_text() == f"requeue {os.getpid()}\n"
    assert not list(tmp_path.glob("hosts-*"))

    last = checkpoint.step + 2
    assert slurm(tmp_path, *train, f"steps={last}").wait(timeout=HANG_SECONDS) == 0
    assert f"resumes from {checkpoint.folder}" in (tmp_path / "output").read_text()
    assert metrics(run)[-1]["step"] == last and requeued(tmp_path) == 1
    assert "rank 1 of 2" in (run / "logs" / "rank_00001.log").read_text()


@pytest.mark.parametrize(("code", "restarts", "expected"), [(1, "0", 1), (1, "5", 0), (2, "0", 0), (3, "0", 0)])
def test_a_dead_rank_is_tried_again_and_a_mistake_is_not(
    tmp_path: Path, code: int, restarts: str, expected: int
) -> None:
    (tmp_path / "bin").mkdir()
    launcher = tmp_path / "bin" / "deepspeed"
    launcher.write_text(f"#!/bin/bash\n[[ $SLURM_NODEID == 0 ]] || exec sleep 100\nexit {code}\n")
    launcher.chmod(0o755)
    assert slurm(tmp_path, "program.py", SLURM_RESTART_COUNT=restarts).wait(timeout=HANG_SECONDS) == code
    assert requeued(tmp_path) == expected
