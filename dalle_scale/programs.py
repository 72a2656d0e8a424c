"""Programs of a checkout run one after the other: each shown as one would type it, and timed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dalle_scale.types import UserError

Command = list[str]


def processes() -> int:
    """Number of processes for a small net here: two where there are two GPUs or, without a GPU, two CPU cores.

    On two cores they are faster than one process, also than one of two threads (benchmarks/ranks.py).
    """
    return min(2, torch.cuda.device_count() or len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class Programs:
    """The programs below the folder `root` of a checkout, named relative to it."""

    root: Path

    def python(self, program: str, *arguments: str) -> Command:
        """A command that runs a program in one process."""
        return [sys.executable, str(self.root / program), *arguments]

    def deepspeed(self, program: str, *arguments: str) -> Command:
        """A command that runs it through the launcher, in `processes()` on this machine."""
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        return [launcher, "-q", "--num_gpus", str(processes()), str(self.root / program), *arguments]

    def typed(self, command: Command) -> str:
        """The command as one would type it in the project's folder."""
        return shlex.join([Path(command[0]).name, *(part.removeprefix(f"{self.root}/") for part in command[1:])])

    def run(self, commands: Mapping[str, Command]) -> dict[str, float]:
        """Run the commands in their order; what they print stays visible.

        Args:
            commands: name of the step -> command.

        Returns:
            Seconds of each step, and their sum as "total".

        Raises:
            UserError: a step failed; the later ones were not started.
        """
        seconds: dict[str, float] = {}
        for number, (name, command) in enumerate(commands.items(), start=1):
            print(f"\n[{number}/{len(commands)}] {name}\n$ {self.typed(command)}", flush=True)
            start = time.perf_counter()
            code = subprocess.run(command).returncode
            if code:
                raise UserError(f"the step '{name}' failed with exit code {code}; its output stands above")
            seconds[name] = round(time.perf_counter() - start, 1)
        return {**seconds, "total": round(sum(seconds.values()), 1)}
