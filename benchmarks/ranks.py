"""Training steps of the demo's nets on one host: two processes, and one with two threads, beside one of one thread.

    python benchmarks/ranks.py

Each side is a real training through deepspeed's launcher, with its own reading (ranks_side.py). The sides take turns
of some steps each, round after round, while the others wait; a ratio is that of two turns of one round, and what is
printed its median with the lowest and the highest. "apart" is two trainings at once, with half the batch each, that
know nothing of each other: what the cores can do at best. Writes benchmarks/results/ranks.json.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from multiprocessing.connection import Listener, wait
from pathlib import Path
from typing import Any

import yaml
from environment import describe

from dalle_scale import log
from dalle_scale.programs import Programs
from dalle_scale.types import UserError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PROGRAMS = Programs(ROOT)
RESULT = HERE / "results" / "ranks.json"
SIDES = {  # (trainings at once, processes of each, threads of each)
    "1 process": (1, 1, 1),
    "2 processes": (1, 2, 1),
    "1 process, 2 threads": (1, 1, 2),
    "2 processes, apart": (2, 1, 1),
}
STEPS = {"dvae": 100, "dalle": 100, "clip": 30}  # of a turn: some four seconds, beside which waking up is short
TRAIN_SAMPLES = 2048


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed turns of each side")
    parser.add_argument("--nets", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        nets = {net: summary(measure(folder, net, args.rounds), STEPS[net]) for net in args.nets}
    result = {"nets": nets, "rounds": args.rounds, **describe()}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    log.say(table(nets))


def prepare(folder: Path) -> None:
    """What the demo trains on, in little: shards, text tokenizer, an untrained image tokenizer and its codes."""
    sys.path.insert(0, str(ROOT / "launch"))
    import demo

    before = Path.cwd()
    os.chdir(folder)  # the demo writes below the current folder
    steps = demo.steps(demo.Size(train_samples=TRAIN_SAMPLES, prompts=4, dvae_steps=1))
    PROGRAMS.run({name: steps[name] for name in ("shards", "text_tokenizer", "dvae", "encode", "encode_valid")})
    os.chdir(before)


def measure(folder: Path, net: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each side's turns; the first, which allocates, is left out."""
    batch = yaml.safe_load((ROOT / f"configs/demo/{net}.yaml").read_text())["global_batch_size"]
    with ExitStack() as stack:
        sides: dict[str, list[Training]] = {side: [] for side in SIDES}
        for side, (count, processes, threads) in SIDES.items():
            for index in range(count):
                settings = [f"steps={(rounds + 1) * STEPS[net]}", f"global_batch_size={batch // count}"]
                place = folder / net / f"{side} {index}"
                sides[side].append(stack.enter_context(Training(folder, net, place, processes, threads, settings)))
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in log.progress(range(rounds + 1), net, "rounds", rounds + 1):
            for side, trainings in sides.items():
                for training in trainings:
                    training.begin()
                seconds[side].append(max(training.seconds() for training in trainings))
    return {side: found[1:] for side, found in seconds.items()}


class Training:
    """A training on what lies below `data` that waits for its turns, with a folder of its own, `place`."""

    def __init__(self, data: Path, net: str, place: Path, processes: int, threads: int, settings: list[str]) -> None:
        place.mkdir(parents=True)
        address = str(place / "turns")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "-q", f"--num_gpus={processes}"]
        program = [str(HERE / "ranks_side.py"), address, str(STEPS[net]), str(ROOT / f"configs/demo/{net}.yaml")]
        settings = [f"run={place / 'run'}", "log.preview_every=0", "log.valid_every=0", *settings]
        line = [*launcher, f"--master_port={port}", *program, *settings]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
        self._output = place / "output"
        with Listener(address) as listener, self._output.open("wb") as output:
            self._process = subprocess.Popen(line, cwd=data, env=environment, stdout=output, stderr=output)
            self._ranks = [listener.accept() for _ in range(processes)]

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def begin(self) -> None:
        """Let it take a turn.

        Raises:
            UserError: it has ended.
        """
        try:
            for rank in self._ranks:
                rank.send(None)
        except OSError:
            raise UserError(f"a training has ended: {self._output.read_text(errors='replace')[-2000:]}") from None

    def seconds(self) -> float:
        """Of the turn that it takes, once it is over."""
        [answer] = wait(self._ranks)[:1]
        return float(answer.recv())


def summary(seconds: dict[str, list[float]], steps: int) -> dict[str, Any]:
    """Milliseconds of a step of each side, and how many times as fast as one process of one thread it is."""
    [plain, *_] = SIDES
    rows = {}
    for side, found in seconds.items():
        ratios = [alone / own for alone, own in zip(seconds[plain], found, strict=True)]
        rows[side] = {
            "step_milliseconds": round(1000 * statistics.median(found) / steps, 2),
            "times_as_fast": round(statistics.median(ratios), 2),
            "lowest": round(min(ratios), 2),
            "highest": round(max(ratios), 2),
        }
    return rows


def table(nets: dict[str, Any]) -> str:
    """What there is to see."""
    lines = [f"{'net':>6} {'side':>22} {'ms a step':>10} {'times as fast':>22}"]
    for net, rows in nets.items():
        for side, row in rows.items():
            times = f"{row['times_as_fast']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
            lines.append(f"{net:>6} {side:>22} {row['step_milliseconds']:>10.2f} {times:>22}")
    return "\n".join(lines)


if __name__ == "__main__":
    log.guarded(main)
