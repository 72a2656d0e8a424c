"""One side of ranks.py: launch/train.py, whose steps wait for their turn.

    deepspeed benchmarks/ranks_side.py SOCKET STEPS config.yaml key=value …

Each rank connects to SOCKET. A turn begins when something arrives there, and takes STEPS steps; rank 0 then sends how
many seconds they took.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

from dalle_scale import dist, log, train
from dalle_scale.types import Batch

PROGRAM = Path(__file__).resolve().parents[1] / "launch" / "train.py"


class Trainer(train.Trainer):
    """The loop of every training, in turns."""

    connection: Connection
    steps: int
    began = 0.0

    def _update(self, micro_batches: list[Batch]) -> None:
        if self.done % self.steps == 0:
            self.connection.recv()
            self.began = time.perf_counter()
        super()._update(micro_batches)
        if self.done % self.steps == 0 and dist.is_main():
            self.connection.send(time.perf_counter() - self.began)


def main() -> None:
    """Train as the command line says."""
    rest = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]  # the launcher's
    Trainer.connection, Trainer.steps = Client(rest[0]), int(rest[1])
    train.Trainer = Trainer  # type: ignore[misc]  # launch/train.py takes it from there
    sys.argv = [str(PROGRAM), *rest[2:]]
    spec = importlib.util.spec_from_file_location("train_program", PROGRAM)
    assert spec is not None and spec.loader is not None
    program: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    program.main()


if __name__ == "__main__":
    log.guarded(main)
