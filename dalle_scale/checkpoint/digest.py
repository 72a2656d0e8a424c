"""Digest of the weights that a result was made with."""

from __future__ import annotations

import hashlib
from pathlib import Path


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
