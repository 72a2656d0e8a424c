"""Ledger of lost samples: `ledger.jsonl`, one row for each sample that an epoch could not deliver.

A row: shard, key, reason, epoch, step (global batch). A run that is stopped reads a stretch of batches again when it
continues, and every validation reads the same samples again: what stands in the file already is not written twice.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Ledger:
    """Appends to one file; all ranks may share it. Without a path nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: set[tuple[str, str, int]] | None = None  # None: not read yet

    def add(self, rows: list[Row]) -> None:
        """Append those rows that are new, each in a single write, one process at a time."""
        if self.path is None or not rows:
            return
        if self._known is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._known = {_identity(row) for row in read(self.path)}
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            with suppress(OSError):  # a file system without locks: a reader may meet an empty line, and passes over it
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            cut_off = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # a writer was killed in the middle
            for row in rows:
                if _identity(row) not in self._known:
                    self._known.add(_identity(row))
                    os.write(descriptor, f"{chr(10) * cut_off}{json.dumps(row)}\n".encode())
                    cut_off = False
        finally:
            os.close(descriptor)


def read(path: Path) -> list[Row]:
    """The rows of a ledger, none where there is no file; a row that a killed writer left half is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _identity(row: Row) -> tuple[str, str, int]:
    return row["shard"], row["key"], row["epoch"]
