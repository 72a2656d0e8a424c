"""Started by tests through the deepspeed launcher: launch/train.py, one of whose ranks is killed by SIGKILL.

killed.py <phase> <rank> <step> <note> <arguments of launch/train.py>

Updates are counted from 1. Before it dies the rank writes its process id into the file `note`.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from dalle_scale import dist, io

PROGRAM = Path(__file__).parents[2] / "launch" / "train.py"


class Fault:
    """The rank's death in one step. What it is put into does what it did before, but then."""

    def __init__(self, fatal_step: int, note: Path) -> None:
        self._fatal, self._note, self._now = fatal_step, note, 0
        self.after(dist, "seed_everything", self._look)

    def _look(self, seed: int, step: int) -> None:
        """The trainer seeds at the beginning of each step, which is the only time that tells its number."""
        self._now = step + 1

    def strike(self) -> None:
        """Die, if it is time."""
        if self._now == self._fatal:
            self._note.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)

    @staticmethod
    def after(owner: Any, name: str, action: Callable[..., None]) -> None:
        """Call `action` with the same arguments after each call of `owner.name`."""
        original = getattr(owner, name)

        def replaced(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            action(*args, **kwargs)
            return result

        setattr(owner, name, replaced)

    def before(self, owner: Any, name: str, fatal: Callable[..., bool]) -> None:
        """Die at a call of `owner.name` with arguments that are `fatal`, in its place."""
        original = getattr(owner, name)

        def replaced(*args: Any, **kwargs: Any) -> Any:
            if fatal(*args, **kwargs):
                self.strike()
            return original(*args, **kwargs)

        setattr(owner, name, replaced)


def forward(fault: Fault) -> None:
    """When the first module of the net is done with its part."""
    register_module_forward_hook(lambda module, *_: fault.strike() if module.training else None)


def reduce(fault: Fault) -> None:
    """When the others wait in the collective of the gradients, which is far larger than any other of a step."""
    fault.before(torch.distributed, "all_reduce", lambda tensor, *_, **__: tensor.numel() > 1000)


def step(fault: Fault) -> None:
    """When this rank has changed its part of the weights, and nobody else knows them."""
    register_optimizer_step_post_hook(lambda *_: fault.strike())


def save(fault: Fault) -> None:
    """When this rank has written its files of the checkpoint."""
    from dalle_scale.engine.trained_net import TrainedNet

    fault.after(TrainedNet, "save", lambda *_: fault.strike())


def commit(fault: Fault) -> None:
    """When the checkpoint has its name, and not yet the marker that makes it one."""
    fault.before(io, "write", lambda path, text: path.name == "COMMIT")


PHASES = {function.__name__: function for function in (forward, reduce, step, save, commit)}


def main() -> None:
    phase, rank, fatal_step, note, *arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    if dist.rank() == int(rank):
        PHASES[phase](Fault(int(fatal_step), Path(note)))
    sys.argv = [str(PROGRAM), *arguments]
    runpy.run_path(str(PROGRAM), run_name="__main__")


if __name__ == "__main__":
    main()
