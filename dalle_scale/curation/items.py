"""Input rows, and how their parts are read: what sources.py (folders, tars) and tables.py have in common.

Nothing is unpacked to disk, nothing is fetched from the network, and no file above a size limit is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dalle_scale.data.decode import BadSample

IMAGE_COLUMNS = ("path", "file", "file_name", "filename", "image_path", "image", "jpg", "png", "webp", "url")
CAPTION_COLUMNS = ("caption", "text", "prompt", "TEXT", "alt_text", "title")
MAX_BYTES = 256 << 20  # of one input file


@dataclass(frozen=True)
class Options:
    """Options of reading."""

    image_columns: tuple[str, ...] = IMAGE_COLUMNS
    caption_columns: tuple[str, ...] = CAPTION_COLUMNS
    other_columns: tuple[str, ...] = ()  # that come as `Row.columns`
    root: Path | None = None
    caption_template: str | None = None


@dataclass(frozen=True)
class Row:
    """One input row whose caption is known and whose image is not read yet."""

    number: int  # from 0: in its source, or among all rows of all sources
    source: str  # path of the source
    name: str  # in its source; need not be unique
    caption: str
    columns: dict[str, Any]  # those of `Options.other_columns` that the row has
    read: Callable[[], bytes]  # gives the image's file, or raises BadSample


@dataclass(frozen=True)
class Lost:
    """One input row of which there is nothing to keep."""

    number: int
    source: str
    name: str
    reason: str


class Source(Protocol):
    """One source on the command line. Is pickled to worker processes."""

    @property
    def path(self) -> Path:
        """As it was given."""
        ...

    @property
    def num_rows(self) -> int:
        """Of this source."""
        ...

    def rows(self, start: int, stop: int) -> Iterator[Row | Lost]:
        """Rows `start` .. `stop` - 1, numbered in this source."""
        ...


def read_file(path: Path) -> bytes:
    """A whole file. Raises BadSample if it is too large or cannot be read."""
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise BadSample(f"cannot read: {getattr(error, 'strerror', error)}") from None
    return read_span(path, 0, size)


def read_span(path: Path, offset: int, size: int) -> bytes:
    """Part of a file. Raises BadSample if it is too large, cannot be read or the file ends before."""
    if size > MAX_BYTES:
        raise BadSample(f"too large: {size} bytes, the limit is {MAX_BYTES}")
    try:
        with path.open("rb") as file:
            data = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise BadSample(f"cannot read: {error.strerror}") from None
    if len(data) != size:
        raise BadSample(f"cut off: {len(data)} of {size} bytes")
    return data


def pick(row: dict[str, Any], columns: Iterable[str]) -> Any:
    """The first of the columns that has a value."""
    return next((row[column] for column in columns if row.get(column) is not None), None)


def checked_caption(caption: Any) -> str:
    """The caption, if it is a text. Raises BadSample."""
    if not isinstance(caption, str):
        raise BadSample("no caption" if caption is None else f"no caption: {type(caption).__name__} is no text")
    if printable(caption) != caption:
        raise BadSample("caption is not UTF-8")
    return caption


def to_text(data: bytes) -> str:
    """UTF-8 or nothing. Raises BadSample."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BadSample("caption is not UTF-8") from None


def printable(text: str) -> str:
    """The text with what UTF-8 cannot hold (half a surrogate pair, a stray byte of a file name) written as \\x.."""
    return text.encode("utf-8", "backslashreplace").decode()
