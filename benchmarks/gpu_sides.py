"""Comparisons on a GPU whose sides (gpu_side.py) work in turn; a side that cannot be measured says why."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_clock
import torch
from autoencoders import DALLE_PYTORCH, DALLE_PYTORCH_NEEDS
from diffusion import PACKAGES as DIFFUSION
from environment import peer
from sides import Sides

from dalle_scale import log

OURS = "ours"
ENVIRONMENTS = Path("runs/benchmarks/environments")  # where `environment.peer` makes them


@dataclass(frozen=True)
class Peer:
    """A package that may have to be installed."""

    module: str  # that its sides import
    environment: str
    requirements: tuple[str, ...]


PEERS = {
    "dalle-pytorch": Peer("dalle_pytorch", "dalle_pytorch", (DALLE_PYTORCH, *DALLE_PYTORCH_NEEDS)),
    "gpt2": Peer("transformers", "", ()),
    "diffusers": Peer("diffusers", "diffusion", DIFFUSION),
    "denoising-diffusion-pytorch": Peer("denoising_diffusion_pytorch", "diffusion", DIFFUSION),
}


class NotMeasured(Exception):
    """Why."""


def compare(
    asked: dict[str, dict[str, Any]], work: int, unit: str, repetitions: int, install: bool, device: torch.device
) -> dict[str, Any]:
    """A row for each side. The rows of peers say how many times as fast ours was, median of the repetitions.

    Args:
        asked: name of the row -> what gpu_side.py asks for, without the device. "ours" is one of them.
        work: what a step of any side gets through, in `unit`.
        install: whether peers that are not there are installed.
    """
    commands: dict[str, list[str]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, side in asked.items():
        try:
            program = [python(side["side"], install), str(Path(__file__).with_name("gpu_side.py"))]
            commands[name] = [*program, json.dumps({**side, "device": str(device)})]
        except NotMeasured as why:
            rows[name] = {"not_measured": str(why)}
    with Sides(commands) as sides:
        rows |= _measure(sides, list(commands), repetitions)
    for row in rows.values():
        if "seconds" in row:
            row[f"{unit}_per_second"] = round(work / row["seconds"], 1)
    return {name: rows[name] for name in asked}


def python(side: str, install: bool) -> str:
    """The Python that has what a side needs: this one, or that of an environment of the peer's own.

    Raises:
        NotMeasured: there is none.
    """
    needed = PEERS.get(side)
    if needed is None or importlib.util.find_spec(needed.module) is not None:
        return sys.executable
    ready = (ENVIRONMENTS / needed.environment / "ready").exists()
    if not needed.requirements or not (install or ready):
        raise NotMeasured(f"{needed.module} is not installed here")
    try:
        return str(peer(needed.environment, "--no-deps", *needed.requirements))
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotMeasured(f"{needed.module} could not be installed: {' '.join(str(error).split())[-200:]}") from error


def _measure(sides: Sides, names: list[str], repetitions: int) -> dict[str, dict[str, Any]]:
    """Steps in turn, of the sides that work, after steps that are not counted."""
    rows: dict[str, dict[str, Any]] = {name: {} for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}

    def ask(name: str, what: str) -> Any:
        """None where the side has failed, now or before."""
        if name not in times:
            return None
        try:
            answer = sides.ask(name, what)
        except (OSError, json.JSONDecodeError) as error:
            answer = {"error": f"its process has ended: {error}"}
        if isinstance(answer, dict):
            rows[name] = {"not_measured": answer["error"]}
            del times[name]
            return None
        return answer

    for name in names:
        parameters = ask(name, "parameters")
        if name in times:
            rows[name]["parameters"] = parameters
    for repetition in log.progress(range(repetitions + gpu_clock.WARM_UP), "measure", "rounds"):
        for name in names:
            took = ask(name, "step")
            if took is not None and repetition >= gpu_clock.WARM_UP:
                times[name].append(took)
    for name in names:
        peak = ask(name, "memory")
        if name in times:
            rows[name] |= {"peak_bytes": peak, **gpu_clock.spread(times[name])}
    for name in times.keys() - {OURS} if OURS in times else ():
        ratios = [theirs / ours for ours, theirs in zip(times[OURS], times[name], strict=True)]
        rows[name]["ours_times_as_fast"] = round(statistics.median(ratios), 2)
        rows[name]["ours_times_as_fast_lowest"] = round(min(ratios), 2)
    return rows
