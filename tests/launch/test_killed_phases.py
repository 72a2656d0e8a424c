"""kill -9 of one rank in each phase of a step: the job ends, says who died, and nothing of the run is lost."""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from support.processes import HANG_SECONDS, ROOT, TESTS, command, environment, short_command
from support.runs import metrics, write_config, write_images

from dalle_scale.checkpoint import resume

STEPS, SAVE_EVERY = 8, 2
DEATHS = {"forward": (1, 5), "reduce": (0, 5), "step": (1, 5), "save": (1, 6), "commit": (0, 6)}  # rank, step
SAVED = 4  # steps, before each of these deaths


@dataclass(frozen=True)
class End:
    """What was there once the launcher had ended."""

    exit_code: int
    output: str
    pid: int  # of the rank that was killed
    left: list[str]  # processes that have not ended with it
    saved: list[int]  # steps of committed checkpoints
    lines: int  # of the log of losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the config of the shipped tiny VAE over images made here, for two ranks at ZeRO 2."""
    folder = tmp_path_factory.mktemp("killed")
    for split, count in (("train", 30), ("valid", 13)):
        write_images(folder / "shards" / split, count, size=32, seed=count)
    text = (ROOT / "configs" / "tiny" / "vae.yaml").read_text().replace("runs/tiny/", f"{folder}/")
    tree = yaml.safe_load(text) | {"steps": STEPS, "engine": {"zero": 2, "dtype": "fp32"}}
    tree["log"] = {"every": 1, "valid_every": STEPS, "valid_samples": 13, "save_every": SAVE_EVERY}
    write_config(folder / "vae.yaml", tree)
    return folder


def arguments(folder: Path, name: str) -> list[str]:
    """Of launch/train.py, the same with the fault and without."""
    return [str(folder / "vae.yaml"), f"run={folder / name}"]


def killed(folder: Path, phase: str) -> End:
    """Run into the fault."""
    (rank, step), run, note = DEATHS[phase], folder / phase, folder / f"{phase}.note"
    fault = [phase, str(rank), str(step), str(note)]
    line = command(TESTS / "support" / "killed.py", *fault, *arguments(folder, phase), processes=2)
    mark = {"KILLED_MARK": str(note)}  # which all processes below inherit
    with subprocess.Popen(
        line, env=environment() | mark, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        output = process.communicate(timeout=HANG_SECONDS)[0]
    assert note.is_file(), output[-3000:]
    pid = int(note.read_text())
    left = psutil.wait_procs(marked(mark), timeout=HANG_SECONDS)[1]
    return End(
        exit_code=process.returncode,
        output=output,
        pid=pid,
        left=[str(process) for process in left],
        saved=[checkpoint.step for checkpoint in resume.committed(run)],
        lines=len(metrics(run)),
    )


def marked(mark: dict[str, str]) -> Iterator[psutil.Process]:
    """Processes whose environment has the mark."""
    for process in psutil.process_iter():
        try:
            if mark.items() <= process.environ().items():
                yield process
        except psutil.Error:  # ended meanwhile, or not ours to look at
            pass


@pytest.fixture(scope="module")
def end_of(folder: Path) -> Callable[[str], End]:
    """Runs into the fault of a phase when first asked for: each test starts its own launcher, in its own time limit."""
    return functools.cache(lambda phase: killed(folder, phase))


@pytest.fixture(scope="module")
def resumed(folder: Path, end_of: Callable[[str], End]) -> str:
    """The same commands without the fault, and a run `whole` that nobody disturbed: the console of them all."""
    for phase in DEATHS:
        end_of(phase)
    todo = folder / "todo.json"
    todo.write_text(json.dumps([arguments(folder, name) for name in ("whole", *DEATHS)]))
    line = short_command(TESTS / "support" / "many_runs.py", str(todo), processes=2)
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("phase", DEATHS)
def test_the_job_ends_and_names_the_dead(folder: Path, end_of: Callable[[str], End], phase: str) -> None:
    end, rank = end_of(phase), DEATHS[phase][0]
    assert end.exit_code != 0 and not end.left
    assert f"error: rank {rank} (host " in end.output, end.output[-3000:]
    # In one of some thirty deaths the launcher asks first how the rank ended: then it is the one to say
    by_launcher = f"pid {end.pid}) is gone" in end.output and "= -9" in end.output
    assert f"pid {end.pid}) was killed by signal 9 (Killed)" in end.output or by_launcher
    assert f"the end of {folder / phase}/logs/rank_{rank:05d}.log:\n" in end.output
    assert end.saved == [SAVED - SAVE_EVERY, SAVED]


@pytest.mark.parametrize("phase", DEATHS)
def test_nothing_is_lost(folder: Path, end_of: Callable[[str], End], resumed: str, phase: str) -> None:
    """Losses and export are, bit by bit, those of the run that nobody disturbed."""
    run, whole = folder / phase, folder / "whole"
    assert f"{run}: resumes from {run}/checkpoints/{SAVED:08d}" in resumed
    want, got = metrics(whole), metrics(run)
    assert len(want) == STEPS + 1 and all("train/loss" in line or "valid/loss" in line for line in want)
    written = end_of(phase).lines
    before, after = got[:written], got[written:]
    assert before == want[: len(before)] and before[-1]["step"] >= SAVED
    assert after == [line for line in want if line["step"] > SAVED]
    name = Path("export", "model.safetensors")
    assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert [checkpoint.step for checkpoint in resume.committed(run)] == [STEPS - SAVE_EVERY, STEPS]
    assert not [path for path in (run / "checkpoints").iterdir() if not (path / "COMMIT").is_file()]
