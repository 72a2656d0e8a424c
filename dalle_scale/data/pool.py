"""A supervised pool of processes that read batches.

Global batches are pure functions of their number, so a process that dies, or hangs, is replaced and its batches are
asked for again, now reading row by row. Where the same row ends two processes, that sample is the cause: the batch is
read without it, and it goes into the ledger like any other bad one.
"""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import reduction
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from dalle_scale.data.processes import forkserver, keep_memory
from dalle_scale.types import UserError

AHEAD = 2  # batches asked of each process beyond those that were used
PATIENCE_SECONDS = 1800.0  # without a row done, a process counts as hanging; above what fetching a shard may take
MAX_DEATHS = 5  # in a row, without a batch read or a sample left out between them
_TICK_SECONDS = 5.0
_ALIGNMENT = 64  # bytes, of an array in shared memory
NO_ROW = -1


@dataclass(frozen=True)
class RetryMode:
    """Mode of reading a batch that has ended a process."""

    skip: dict[int, str]  # row -> why it must not be read
    at_row: Callable[[int], None]  # to be called with each row before it is read, one after the other


class BatchReader(Protocol):
    """Work of the processes. It is pickled to them."""

    def read(self, number: int, retry_mode: RetryMode | None) -> Any:
        """This rank's part of global batch `number`."""
        ...


@dataclass
class _Worker:
    """One process as the pool sees it."""

    process: Any
    pipe: Connection
    place: Any  # shared [2]: batch and row that it is at
    asked: deque[int] = field(default_factory=deque)
    seen: tuple[int, int] = (NO_ROW, NO_ROW)
    seen_at: float = field(default_factory=time.monotonic)

    def is_hanging(self) -> bool:
        """Whether it has had work for long and is where it was."""
        now, at = time.monotonic(), (self.place[0], self.place[1])
        if at != self.seen or not self.asked:
            self.seen, self.seen_at = at, now
        return now - self.seen_at > PATIENCE_SECONDS


class Pool:
    """`workers` processes that run `reader`. Use as a context; `batches` may be called once."""

    def __init__(self, reader: BatchReader, workers: int, preload: tuple[str, ...]) -> None:
        """preload: modules that the processes start with."""
        self._reader = reader
        self._context = forkserver(*preload)
        self._skip: dict[int, dict[int, str]] = {}  # batch that has ended a process -> row -> why not to read it
        self._suspects: set[tuple[int, int]] = set()
        self._failures = 0
        self._results: dict[int, Any] = {}
        self._workers = [self._start() for _ in range(workers)]

    def batches(self, start: int, stop: int) -> Iterator[Any]:
        """Yield the reader's results of batches `start` .. `stop` - 1, in order.

        Raises:
            UserError: as the reader's, or processes die again and again.
        """
        issued = start
        for number in range(start, stop):
            while issued < min(stop, number + AHEAD * len(self._workers)):
                self._ask(min(self._workers, key=lambda worker: len(worker.asked)), issued)
                issued += 1
            while number not in self._results:
                self._listen()
            yield self._results.pop(number)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *unused: object) -> None:
        for worker in self._workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(timeout=5)
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()
            worker.process.close()

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        place = self._context.RawArray("q", [NO_ROW, NO_ROW])
        process = self._context.Process(target=_serve, args=(self._reader, theirs, place), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours, place)

    def _ask(self, worker: _Worker, number: int) -> None:
        worker.asked.append(number)
        with suppress(OSError):  # it has died; `_listen` finds out
            worker.pipe.send((number, self._skip.get(number)))

    def _listen(self) -> None:
        """Take in what has come, and replace who has died."""
        ready = wait([worker.pipe for worker in self._workers], timeout=_TICK_SECONDS)
        for position, worker in enumerate(self._workers):
            try:
                if worker.pipe in ready:
                    kind, value = _receive(worker.pipe)
                    if kind == "error":
                        raise UserError(value)
                    assert kind == "rows", f"a process that reads data failed:\n{value}"
                    self._results[worker.asked.popleft()] = value
                    self._failures = 0
                elif worker.is_hanging():
                    worker.process.kill()
                    raise EOFError
            except (EOFError, OSError):  # the pipe is closed
                self._workers[position] = self._replace(worker)

    def _replace(self, worker: _Worker) -> _Worker:
        """A new process with the batches of one that has died."""
        worker.pipe.close()
        worker.process.join()
        code = worker.process.exitcode
        self._failures += 1
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if self._failures > MAX_DEATHS:
            raise UserError(
                f"data.workers: a process that reads data died {self._failures} times in a row ({how}); "
                "is there enough memory for data.workers processes?"
            )
        number, row = worker.place[0], worker.place[1]
        if worker.asked and worker.asked[0] == number:
            skip = self._skip.setdefault(number, {})
            if row != NO_ROW and (number, row) in self._suspects:
                skip[row] = f"ended the process that read it: {how}"
                self._failures = 0
            self._suspects.add((number, row))
        worker.process.close()
        new = self._start()
        for number in worker.asked:
            self._ask(new, number)
        return new


def _serve(reader: BatchReader, pipe: Connection, place: Any) -> None:
    """The life of a process: batches in the order in which they are asked for, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    keep_memory()

    def at_row(row: int) -> None:
        place[1] = row

    with suppress(EOFError, ConnectionError):  # the process that asks is gone
        while True:
            number, skip = pipe.recv()
            place[0], place[1] = number, NO_ROW
            retry_mode = None if skip is None else RetryMode(skip, at_row)
            try:
                message = ("rows", reader.read(number, retry_mode))
            except UserError as error:
                message = ("error", str(error))
            except Exception:
                message = ("failure", traceback.format_exc())
            place[1] = NO_ROW
            _send(pipe, message)


def _send(pipe: Connection, message: tuple[str, Any]) -> None:
    """Put a message into the pipe, its arrays as nameless shared memory: it can be received even when this process is
    gone, and nothing is left when nobody does."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    file = os.memfd_create("rows")
    try:
        spans, end = [], 0
        for buffer in buffers:
            view = buffer.raw()
            os.pwrite(file, view, end)
            spans.append((end, len(view)))
            end += -(-len(view) // _ALIGNMENT) * _ALIGNMENT
        os.ftruncate(file, end)
        pipe.send((data, spans, end))
        reduction.send_handle(pipe, file, os.getppid())
    finally:
        os.close(file)


def _receive(pipe: Connection) -> tuple[str, Any]:
    """A message from `_send`; its arrays lie in the shared memory, which ends with them."""
    data, spans, end = pipe.recv()
    file = reduction.recv_handle(pipe)
    try:
        memory = memoryview(mmap.mmap(file, end) if end else b"")
    finally:
        os.close(file)
    message: tuple[str, Any] = pickle.loads(data, buffers=[memory[at : at + size] for at, size in spans])
    return message
