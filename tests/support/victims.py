"""Runs data_tools/build_shards.py in processes that get killed, one for each line of JSON on standard input:

    {"arguments": [...], "step": 7}       killed just before its seventh change to the file system
    {"arguments": [...], "seconds": 0.2}  killed after that time

and answers whether it was, a line each. They are forked from this process, which has imported everything and has no
threads: a fork takes milliseconds, and is safe.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable

from support.sources import build_shards

from dalle_scale.types import UserError


def main() -> None:
    """Answer line by line."""
    os.fsync = lambda descriptor: (
        None
    )  # takes most of the time, and changes nothing unless the machine itself goes down
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            null = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(null, stream)
            if "step" in order:
                sys.addaudithook(killer(order["step"]))
            try:
                build_shards.main(order["arguments"])
            except UserError as error:  # the one before was killed in its last steps, which tidy up
                os._exit("holds a data set already" not in str(error))
            os._exit(0)
        if "seconds" in order:
            time.sleep(order["seconds"])
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or not os.WEXITSTATUS(status), "ended with an error of its own"
        print(json.dumps(os.WIFSIGNALED(status)), flush=True)


def killer(step: int) -> Callable[[str, tuple], None]:
    """An audit hook that kills its process before the `step`-th change to the file system."""
    steps = 0

    def count(event: str, details: tuple) -> None:
        nonlocal steps
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            steps += 1
            if steps == step:
                os.kill(os.getpid(), signal.SIGKILL)

    return count


if __name__ == "__main__":
    main()
