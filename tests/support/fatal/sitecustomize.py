"""Imported by every Python process of a program under test that conftest.fatal has prepared: kills the program's first
process at the moment when enough files have their names and one more is about to get its own.

So it dies at the same place of its work on any machine, which a test that watches from outside could not bring about.
"""

import os
import signal
import sys
from glob import glob

PATTERN, COUNT = os.environ["FATAL_PATTERN"], int(os.environ["FATAL_COUNT"])
FIRST = int(os.environ.setdefault("FATAL_PROCESS", str(os.getpid())))  # workers inherit it


def _look(event: str, arguments: tuple[object, ...]) -> None:
    if event == "os.rename" and len(glob(PATTERN)) >= COUNT:
        os.kill(FIRST, signal.SIGKILL)
        os._exit(1)  # in a worker


sys.addaudithook(_look)
