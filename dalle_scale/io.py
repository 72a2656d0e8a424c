"""Folders that appear whole or not at all, also after a power cut."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(folder: Path) -> None:
    """Force every file and folder below `folder`, and `folder` itself, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def write(path: Path, content: str | bytes) -> None:
    """Write a small file that appears whole or not at all; text as UTF-8."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    _sync_one(temporary)
    temporary.rename(path)
    _sync_one(path.parent)


def publish(temporary: Path, folder: Path) -> None:
    """Give a finished `temporary` folder its final name, in place of what had that name.

    A folder cannot be renamed onto another: for an instant between two renames neither is there, never a mixture.
    """
    sync(temporary)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    _sync_one(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder` when the block ends without an exception."""
    folder = Path(os.path.abspath(folder))
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
