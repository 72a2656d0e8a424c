"""Chunks of work in several processes; nothing is left running or half locked when any of them is killed.

Whoever works below a folder holds a lock there, worker processes included. A new run needs the folder for itself alone
when it starts, so it waits until the last process of a run that was killed is gone; that takes a moment, since workers
watch their parent.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dalle_scale import log
from dalle_scale.data.processes import forkserver, set_up
from dalle_scale.types import UserError

Task = Callable[[int], Iterator[int]]  # a chunk's number -> how many rows more are done, again and again
_PATIENCE_SECONDS = 5.0  # for the processes of a killed run to go
_TICK_SECONDS = 0.25

_state: dict[str, Any] = {}  # of a worker process


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder.

    Raises:
        UserError: another run is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _lock_file(folder).open("a") as file:
        until = time.monotonic() + _PATIENCE_SECONDS
        # alone at first; then workers can join
        while not (_lock(file, fcntl.LOCK_EX) and _lock(file, fcntl.LOCK_SH)):
            if time.monotonic() > until:
                raise UserError(f"{folder}: another run is at work here; wait for it, or choose another folder")
            time.sleep(0.05)
        yield


def run(task: Task, chunks: list[int], workers: int, folder: Path) -> Iterator[int]:
    """Run `task` on each chunk, in any order; yields how many rows more are done. The caller holds the folder's lock.

    Args:
        task: picklable; with one worker, or one chunk, it runs in this process.

    Raises:
        UserError: as the task's, or a process died. The others stop at their next row.
    """
    workers = min(workers, len(chunks))
    if workers <= 1:
        for chunk in chunks:
            yield from task(chunk)
        return
    context = forkserver("dalle_scale.data.chunks")
    done, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(workers, context, _start, (task, done, stop, _lock_file(folder))) as pool:
        try:
            futures = {pool.submit(_work, chunk) for chunk in chunks}
            yield from _watch(futures, done)
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for want of memory; the same command goes on where this run "
                f"stopped; --workers {max(1, workers // 2)} takes less"
            ) from None
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _watch(futures: set[Future[None]], done: Any) -> Iterator[int]:
    """What the workers count, until all is done or one of them fails."""
    counted = 0
    while futures:
        finished, futures = wait(futures, _TICK_SECONDS, FIRST_EXCEPTION)
        for future in finished:
            future.result()
        now = done.value
        yield now - counted
        counted = now


def _start(task: Task, done: Any, stop: Any, lock_file: Path) -> None:
    """Set up a worker process."""
    set_up()
    file = lock_file.open("a")
    if not _lock(file, fcntl.LOCK_SH):
        os._exit(1)  # started by a run that is dead by now
    _state.update(task=task, done=done, stop=stop, file=file)


def _work(chunk: int) -> None:
    for count in _state["task"](chunk):
        with _state["done"].get_lock():
            _state["done"].value += count
        if _state["stop"].is_set():
            return


def _lock_file(folder: Path) -> Path:
    return folder / "lock"


def _lock(file: IO[str], kind: int) -> bool:
    """Take a lock, or say that somebody else has it. A file system without locks is said once and trusted."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if kind == fcntl.LOCK_EX:
            log.say(f"{file.name}: no locks on this file system ({error.strerror}); start no second run on this folder")
    return True
