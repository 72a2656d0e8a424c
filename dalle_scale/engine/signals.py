"""Requests from outside to stop a run: SIGTERM (job schedulers, the launcher) and SIGUSR1 (time limits)."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class StopSignals:
    """Inside the `with` block the signals only set `received`; the loop looks at it between steps."""

    received: bool = False

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
