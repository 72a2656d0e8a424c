"""One side of a comparison, in a process of its own so that its memory is known and a peer's packages stay apart.

Reads lines and answers each in JSON. What a side can do is timed: (seconds of the clock, seconds of the processor).
"memory" is answered with the most bytes that anything has taken beyond what was there before.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import torch
from torch import nn


def quiet() -> TextIO:
    """Where answers go. What a library prints goes to stderr from here on, so that it does not come between."""
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    return answers


def serve(answers: TextIO, net: nn.Module, actions: dict[str, Callable[[], Any]]) -> None:
    """Answer until the input ends; "parameters" with how many `net` has."""
    before_bytes = _peak_bytes()
    for line in sys.stdin:
        asked = line.strip()
        answer: Any
        if asked == "parameters":
            answer = sum(parameter.numel() for parameter in net.parameters())
        elif asked == "memory":
            answer = _peak_bytes() - before_bytes
        else:
            answer = timed(actions[asked])
        print(json.dumps(answer), file=answers, flush=True)


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """How long a call takes: (seconds, seconds of the processor, which other programs on the machine do not change)."""
    started, used = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - started, time.process_time() - used


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
