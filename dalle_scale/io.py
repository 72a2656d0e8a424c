"""Files and folders that appear whole or not at all, also after a power cut; and their digests."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sync(folder: Path) -> None:
    """Force every file and folder below `folder`, and `folder` itself, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def unfinished(path: Path) -> Path:
    """Return the temporary name of a file or folder that is being written."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; when the block ends without an exception, the file becomes `path`."""
    yield unfinished(path)
    publish_file(path)


def publish_file(path: Path) -> None:
    """Force the finished file `unfinished(path)` to the disk and give it its name."""
    _sync_one(unfinished(path))
    unfinished(path).replace(path)
    _sync_one(path.parent)


def write(path: Path, content: str | bytes) -> None:
    """Write a small file; text as UTF-8."""
    with atomic(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any, allow_nan: bool = True) -> None:
    """Write a value as an indented JSON file; in ASCII, so that any file name can stand in it."""
    write(path, json.dumps(value, indent=1, allow_nan=allow_nan) + "\n")


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as a JSON-lines file; texts stay readable."""
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def digest(path: Path) -> str:
    """sha256 (hex) of a file; of a folder, of the names and contents of all files in it."""
    if path.is_file():
        total = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
        return total.hexdigest()
    lines = sorted(
        f"{file.relative_to(path).as_posix()} {digest(file)}\n" for file in path.rglob("*") if file.is_file()
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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
    temporary = unfinished(folder)
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
