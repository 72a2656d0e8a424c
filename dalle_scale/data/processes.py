"""The same function for many items in several processes, for programs that work through the shards of a data set.

Also how every process that works on data is set up.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from dalle_scale.types import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 64 << 20
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_processes(function: Callable[[_Item], _Result], items: Sequence[_Item], workers: int) -> Iterator[_Result]:
    """`function` of each item, in the order of the items; with one worker in this process.

    Args:
        function: at the top level of a module, so that a process finds it.

    Raises:
        UserError: as the function, or a process was killed.
    """
    if workers <= 1 or len(items) <= 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(min(workers, len(items)), forkserver(function.__module__), set_up) as pool:
        try:
            yield from pool.map(function, items)
        except BrokenProcessPool:
            raise UserError(
                f"a process was killed, perhaps for lack of memory; run again with fewer than {workers} --workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def forkserver(*modules: str) -> Any:
    """Return a fork server: a process without threads or connections, which imports the modules once for all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *modules])  # "__main__" alone is passed over by Python 3.11
    return context


def set_up() -> None:
    """Set up a process: it ends when the one that started it does, however that may be."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started it decides
    threading.Thread(target=_follow_parent, daemon=True).start()
    keep_memory()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def keep_memory() -> None:
    """Let glibc keep what is freed: it would give each image's memory back, and the next would find every page of its
    own cold, which takes longer than the arithmetic on it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 4 * _KEPT_BYTES)
