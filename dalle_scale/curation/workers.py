"""Chunks of work in several processes; nothing is left running or half locked when any of them is killed.

A worker may die of what it reads: then `WorkerDied` says which rows it may have been, and `cause_of_death` tries them.

Whoever works below a folder holds a lock there, worker processes included. A new run needs the folder for itself alone
when it starts, so it waits until the last process of a run that was killed is gone; that takes a moment, since workers
watch their parent.
"""

from __future__ import annotations

import fcntl
import os
import signal
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

# (a chunk's number, to be called with each row before its content is looked at) -> how many rows more are done, again
# and again
Task = Callable[[int, Callable[[int], None]], Iterator[int]]
_PATIENCE_SECONDS = 5.0  # for the processes of a killed run to go
_TICK_SECONDS = 0.25
_NO_ROW = -1

_state: dict[str, Any] = {}  # of a worker process


class WorkerDied(UserError):
    """A worker process has ended. `rows`: what it and the others were looking at."""

    def __init__(self, rows: list[int], workers: int) -> None:
        super().__init__(
            "a worker process was killed, perhaps for want of memory; the same command resumes where it stopped; "
            f"--workers {max(1, workers // 2)} takes less"
        )
        self.rows = rows


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder.

    Raises:
        UserError: another run is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _lock_file(folder).open("a", encoding="utf-8") as file:
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
        task: picklable; with one worker it runs in this process.

    Raises:
        WorkerDied: a process was killed. The others stop at their next row.
        UserError: as the task's, with the same consequence.
    """
    if workers <= 1 or not chunks:
        for chunk in chunks:
            yield from task(chunk, lambda row: None)
        return
    context = forkserver("dalle_scale.curation.chunks")
    done, stop, rows = context.Value("q", 0), context.Event(), context.RawArray("q", [_NO_ROW] * (max(chunks) + 1))
    shared = (task, done, stop, rows, _lock_file(folder))
    with ProcessPoolExecutor(min(workers, len(chunks)), context, _start, shared) as pool:
        try:
            futures = {pool.submit(_work, chunk) for chunk in chunks}
            yield from _watch(futures, done)
        except BrokenProcessPool:
            raise WorkerDied(sorted(row for row in rows if row != _NO_ROW), workers) from None
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def cause_of_failure(function: Callable[..., object], *arguments: Any) -> str:
    """Call a function of a module in a process of its own. Returns how that process died, "" if it did not."""
    process = forkserver("dalle_scale.curation.chunks").Process(target=_alone, args=(function, *arguments))
    process.start()
    process.join()
    code = process.exitcode
    process.close()
    return f"{signal.Signals(-code).name}" if code < 0 else f"exit code {code}" if code else ""


def _alone(function: Callable[..., object], *arguments: Any) -> None:
    set_up()
    function(*arguments)


def _watch(futures: set[Future[None]], done: Any) -> Iterator[int]:
    """Yield the counts of the workers, until all is done or one of them fails."""
    counted = 0
    while futures:
        finished, futures = wait(futures, _TICK_SECONDS, FIRST_EXCEPTION)
        for future in finished:
            future.result()
        now = done.value
        yield now - counted
        counted = now


def _start(task: Task, done: Any, stop: Any, rows: Any, lock_file: Path) -> None:
    """Set up a worker process."""
    set_up()
    file = lock_file.open("a", encoding="utf-8")
    if not _lock(file, fcntl.LOCK_SH):
        os._exit(1)  # started by a run that is dead by now
    _state.update(task=task, done=done, stop=stop, rows=rows, file=file)


def _work(chunk: int) -> None:
    def at_row(row: int) -> None:
        _state["rows"][chunk] = row

    for count in _state["task"](chunk, at_row):
        with _state["done"].get_lock():
            _state["done"].value += count
        if _state["stop"].is_set():
            return
    at_row(_NO_ROW)


def _lock_file(folder: Path) -> Path:
    return folder / "lock"


def _lock(file: IO[str], kind: int) -> bool:
    """Take a lock, or say that somebody else has it. A file system without locks is reported once and trusted."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if kind == fcntl.LOCK_EX:
            log.say(f"{file.name}: no locks on this file system ({error.strerror}); start no second run on this folder")
    return True
