"""Comparisons whose sides are processes of their own (side.py) that work in turn, repetition after repetition."""

from __future__ import annotations

import json
import statistics
import subprocess
from types import TracebackType
from typing import Any

from dalle_scale import log

Clocks = list[tuple[float, float]]  # (seconds of the clock, seconds of the processor) of each repetition


class Sides:
    """Programs that do one thing each, each in a process of its own: one line asks, one line of JSON answers."""

    def __init__(self, commands: dict[str, list[str]]) -> None:
        self._processes = {
            name: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for name, command in commands.items()
        }

    def __enter__(self) -> Sides:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self._processes.values():
            process.kill()

    def ask(self, name: str, what: str) -> Any:
        """What a side answers to a line."""
        process = self._processes[name]
        assert process.stdin is not None and process.stdout is not None
        print(what, file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    def measure(self, action: str, repetitions: int) -> dict[str, Clocks]:
        """What every side answers to an action, done in turn; one more before, which allocates, is left out."""
        answers: dict[str, Clocks] = {name: [] for name in self._processes}
        for name in answers:
            self.ask(name, action)
        for _ in log.progress(range(repetitions), action, "repetitions", repetitions):
            for name, row in answers.items():
                row.append(tuple(self.ask(name, action)))
        return answers


def compared(answers: dict[str, Clocks], peer: str) -> dict[str, dict[str, float]]:
    """Medians of each side, and of how many times as fast as `peer` it was in each repetition."""
    rows = {}
    for name, clocks in answers.items():
        pairs = zip(answers[peer], clocks, strict=True)
        times, times_by_processor = zip(*([b / a for b, a in zip(*pair, strict=True)] for pair in pairs), strict=True)
        walls, processor = zip(*clocks, strict=True)
        rows[name] = {
            "seconds": round(statistics.median(walls), 3),
            "processor_seconds": round(statistics.median(processor), 3),
            "times_as_fast": round(statistics.median(times), 2),
            "times_as_fast_by_processor_time": round(statistics.median(times_by_processor), 2),
            "times_as_fast_by_processor_time_lowest": round(min(times_by_processor), 2),
        }
    return rows
