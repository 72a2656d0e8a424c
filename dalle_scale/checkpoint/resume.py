"""Checkpoints: everything that a run needs to continue as if it had never stopped.

    <run>/checkpoints/00001000/
        state.json      step, world size, config, stream, schedules
        <net>/          weights, their average and the optimizer's states, a file for each rank (engine/state.py)
        COMMIT          written last: names and sizes of all files

A folder without COMMIT does not exist for this module. Nothing is written in place: the ranks fill a temporary folder,
which is renamed when all of them are done. The folder must lie on a file system that all ranks see.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dalle_scale import dist, io
from dalle_scale.config import RunConfig
from dalle_scale.types import UserError

FORMAT = "dalle_scale checkpoint 3"
FREE = (  # what a resumed run may have otherwise; the stream's state tells whether the data are the same
    "run",
    "steps",
    "log",
    "data.train",
    "data.valid",
    "data.workers",
    "data.threads",
    "data.cache",
    "data.cache_gib",
    "data.max_bad_share",
    "engine.micro_batch_size",
    "engine.activation_checkpointing",
    "engine.nodes",
    "engine.zero",
)


class Part(Protocol):
    """State that is saved for each net."""

    schedule: Any

    def save(self, folder: Path) -> None:
        """Write this rank's files below `folder`. Collective."""

    def load(self, folder: Path) -> None:
        """Read them back. Collective."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    folder: Path
    step: int  # steps done
    world_size: int
    config: dict[str, Any]  # RunConfig as a plain tree
    stream: dict[str, Any]
    schedules: dict[str, dict[str, Any]]


def save(run: Path, step: int, config: RunConfig, parts: Mapping[str, Part], stream: dict[str, Any], keep: int) -> None:
    """Save after `step` steps, then delete all but the newest `keep` checkpoints. All ranks call it.

    Args:
        run: the run's folder.
        step: steps done.
        config: resolved configuration.
        parts: net name -> its engine and schedule.
        stream: state of the data stream at the next batch.
        keep: checkpoints to keep, this one included.
    """
    final = run / "checkpoints" / f"{step:08d}"
    temporary = io.unfinished(final)
    if dist.is_main():
        for leftover in final.parent.glob(".*"):
            if not (leftover / "COMMIT").exists():
                shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    dist.barrier()
    schedules = {name: part.schedule.state() for name, part in parts.items()}
    for part in parts.values():
        part.save(temporary)
    dist.barrier()
    if dist.local_rank() == 0:
        io.sync(temporary)  # each machine forces its own writes to the disk
    dist.barrier()
    if dist.is_main():
        state = {
            "format": FORMAT,
            "step": step,
            "world_size": dist.world_size(),
            "config": config.model_dump(mode="json"),
            "stream": stream,
            "schedules": schedules,
        }
        io.write_json(temporary / "state.json", state)
        _commit(temporary, final)
        for old in committed(run)[:-keep]:
            (old.folder / "COMMIT").unlink()  # first, so that a deletion cut short leaves no half checkpoint behind
            shutil.rmtree(old.folder)
    dist.barrier()


def committed(run: Path) -> list[Checkpoint]:
    """The run's committed checkpoints, oldest first, whatever their folders are called."""
    folders = [marker.parent for marker in sorted((run / "checkpoints").glob("*/COMMIT"))]
    return sorted((_open(folder) for folder in folders), key=lambda checkpoint: checkpoint.step)


def find(run: Path, resume: str) -> Checkpoint | None:
    """The checkpoint to continue from, None for a fresh start.

    Args:
        run: the run's folder.
        resume: "auto" (the newest, if there is one), "no" (there must be none), or the folder of one checkpoint.

    Raises:
        UserError: "no" in a run that has checkpoints, a path that is no checkpoint, or one that would fork the run.
    """
    existing = committed(run)
    if resume == "auto":
        return read(existing[-1].folder) if existing else None
    if resume == "no":
        if existing:
            raise UserError(
                f"--resume no: {run} holds a run with {existing[-1].step} steps; "
                f"take another run=... or delete the folder"
            )
        return None
    chosen = read(Path(resume))
    newer = [checkpoint for checkpoint in existing if checkpoint.step > chosen.step]
    if newer:
        raise UserError(
            f"--resume {resume}: {run} continues to step {newer[-1].step}; "
            f"take another run=... or delete the later checkpoints"
        )
    return chosen


def read(folder: Path) -> Checkpoint:
    """Open a checkpoint and check that it is whole.

    Raises:
        UserError: not a committed checkpoint, written by another version, or damaged.
    """
    marker = folder / "COMMIT"
    if not marker.is_file():
        raise UserError(f"{folder}: not a committed checkpoint (no file COMMIT)")
    for name, size_bytes in json.loads(marker.read_text(encoding="utf-8")).items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size_bytes:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
            raise UserError(f"{file}: damaged checkpoint ({found}, {size_bytes} bytes were saved); delete {folder}")
    return _open(folder)


def check(checkpoint: Checkpoint, config: RunConfig, world_size: int) -> None:
    """Refuse a checkpoint that this run cannot continue.

    Raises:
        UserError: another architecture, optimizer, batch or precision; with compressed gradients also another number of
            ranks in a machine or ZeRO stage.
    """
    for key, saved, wanted in _differences(checkpoint.config, config.model_dump(mode="json")):
        if (key, wanted) == ("engine.dtype", "auto"):
            continue  # it stays what it was
        if not any(key == free or key.startswith(free + ".") for free in FREE):
            raise UserError(
                f"{checkpoint.folder}: saved with {key}={_shown(saved)}, this run has {_shown(wanted)}; "
                f"set it back, or start another run=..."
            )
    before, now = checkpoint.config["engine"], config.engine
    ranks_before, ranks_now = checkpoint.world_size // before["nodes"], world_size // now.nodes
    if now.compression_rank and (ranks_before, before["zero"]) != (ranks_now, now.zero):
        raise UserError(
            f"{checkpoint.folder}: saved at engine.zero={before['zero']} by {ranks_before} processes in each of "
            f"engine.nodes, this run has engine.zero={now.zero} and {ranks_now}; what engine.compression_rank has "
            f"left behind fits no others: set them back, or start another run=..."
        )
    if checkpoint.step > config.steps:
        raise UserError(f"{checkpoint.folder}: has {checkpoint.step} steps, more than steps={config.steps}")


def load(checkpoint: Checkpoint, parts: Mapping[str, Part]) -> None:
    """Put engines, averages and schedules into the saved state. All ranks call it, after `check`."""
    for name, part in parts.items():
        part.load(checkpoint.folder)
        part.schedule.load(checkpoint.schedules[name])


def _open(folder: Path) -> Checkpoint:
    """Content of state.json."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state.pop("format") != FORMAT:
        raise UserError(
            f"{folder}: written by another version of dalle_scale; end the run with that version, or start anew "
            "with another run=..."
        )
    return Checkpoint(folder=folder, **state)


def _commit(temporary: Path, final: Path) -> None:
    """Give the finished folder its name, then the marker."""
    files = {str(p.relative_to(temporary)): p.stat().st_size for p in sorted(temporary.rglob("*")) if p.is_file()}
    io.publish(temporary, final)
    io.write_json(final / "COMMIT", files)


def _differences(saved: Any, wanted: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, saved value, wanted value) of every leaf that differs between two plain trees."""
    if not (isinstance(saved, dict) and isinstance(wanted, dict)):
        return [] if saved == wanted else [(prefix, saved, wanted)]
    found = []
    for key in [*wanted, *(key for key in saved if key not in wanted)]:
        inner = f"{prefix}.{key}" if prefix else key
        found += _differences(saved.get(key), wanted.get(key), inner)
    return found


def _shown(value: Any) -> str:
    return "(default)" if value is None else repr(value)
