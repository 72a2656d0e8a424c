"""CSV, TSV, JSONL and parquet tables as rows of (image file, caption), from any row on.

A parquet file is entered at the row group that a row lies in; its columns that are not needed are not read. Text files
are read once from end to end: that finds a line that is no row before any work is done, counts the rows, and notes the
byte at which every 1024th row starts.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dalle_scale import log
from dalle_scale.curation.items import Lost, Options, Row, checked_caption, pick, printable, read_file
from dalle_scale.curation.shard_writer import write_table
from dalle_scale.data.decode import BadSample
from dalle_scale.types import UserError

TABLES = ("csv", "tsv", "jsonl", "parquet")
_STRIDE = 1024  # rows between two noted places
_BATCH = 256  # rows of a parquet file in memory
_MAX_LINE_BYTES = 64 << 20
_METADATA = b"dalle_scale"


@dataclass(frozen=True)
class ParquetTable:
    """A parquet file."""

    path: Path
    options: Options
    num_rows: int

    @staticmethod
    def open(path: Path, options: Options) -> ParquetTable:
        """Look at the file's footer. Raises UserError if it has none."""
        try:
            return ParquetTable(path, options, int(pq.read_metadata(path).num_rows))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a parquet file: {error}") from None

    def rows(self, start: int, stop: int) -> Iterator[Row | Lost]:
        """Rows `start` .. `stop` - 1; a few at a time in memory."""
        names = _open_parquet(self.path).schema_arrow.names
        for number, columns in enumerate(self._read(start, stop), start=start):
            yield _row(self.path, number, columns, names, self.options)

    def _read(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        file = _open_parquet(self.path)
        needed = {*self.options.image_columns, *self.options.caption_columns, *self.options.other_columns, "key"}
        columns = [name for name in file.schema_arrow.names if name in needed]
        at = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if at < stop and at + size > start:
                if not columns:
                    yield from [{}] * (min(stop, at + size) - max(start, at))
                batches = file.iter_batches(_BATCH, row_groups=[group], columns=columns, use_threads=False)
                first = at
                for batch in batches if columns else ():
                    if first >= stop:
                        break
                    low, high = max(start - first, 0), min(stop - first, len(batch))
                    if low < high:
                        yield from batch.slice(low, high - low).to_pylist()
                    first += len(batch)
            at += size


@dataclass(frozen=True)
class TextTable:
    """A CSV, TSV or JSONL file."""

    path: Path
    options: Options
    num_rows: int
    header: tuple[str, ...]  # () for JSONL
    places: Path  # parquet file: where every 1024th row starts, in bytes

    @staticmethod
    def open(path: Path, options: Options, places: Path) -> TextTable:
        """Read the table from end to end, unless `places` says that this was done.

        Raises:
            UserError: a line is no row.
        """
        if not places.exists():
            _note_places(path, places)
        document = json.loads(pq.read_schema(places).metadata[_METADATA])
        return TextTable(path, options, document["rows"], tuple(document["header"]), places)

    def rows(self, start: int, stop: int) -> Iterator[Row | Lost]:
        """Rows `start` .. `stop` - 1."""
        if start >= stop:
            return
        place, skipped = divmod(start, _STRIDE)
        offset = pq.read_table(self.places, use_threads=False)["offset"][place].as_py()
        with self.path.open("rb") as file:
            records = Records(str(self.path), file, offset, self.header)
            for number, columns in zip(range(start, stop), islice(records, skipped, None), strict=False):
                yield _row(self.path, number, columns, list(columns), self.options)


class Records:
    """Rows of an opened CSV, TSV or JSONL file as dictionaries. Raises UserError where it is not one."""

    def __init__(self, name: str, file: BinaryIO, start: int = 0, header: tuple[str, ...] | None = None) -> None:
        """start: byte at which a row starts; header: the columns' names, None to read them from the first line."""
        self.position = start  # byte at which the next row starts
        self._name = name
        self._file = file
        self._done = 0
        file.seek(start)
        self._delimiter = "\t" if name.endswith(".tsv") else ","
        self.header = self._read_header() if header is None else header

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            for columns in self._parsed():
                self._done += 1
                yield columns
        except (ValueError, TypeError, csv.Error) as error:
            raise self._error(error) from None

    def _parsed(self) -> Iterator[dict[str, Any]]:
        if self._name.endswith(".jsonl"):
            return (dict(json.loads(line)) for line in self._lines() if line.strip())
        return csv.DictReader(self._lines(), self.header, restkey="(more)", delimiter=self._delimiter)

    def _read_header(self) -> tuple[str, ...]:
        if self._name.endswith(".jsonl"):
            return ()
        try:
            return tuple(next(csv.reader(self._lines(), delimiter=self._delimiter), ()))
        except (ValueError, csv.Error) as error:
            raise self._error(error) from None

    def _lines(self) -> Iterator[str]:
        """The lines, with `position` behind the one that was given last. One at a time: csv asks for no more than a
        row."""
        while line := self._file.readline(_MAX_LINE_BYTES):
            if len(line) == _MAX_LINE_BYTES:
                raise ValueError(f"a line is longer than {_MAX_LINE_BYTES} bytes")
            text = line.decode("utf-8-sig" if self.position == 0 else "utf-8")
            self.position += len(line)
            yield text

    def _error(self, error: Exception) -> UserError:
        return UserError(f"{self._name}: not a table of rows in UTF-8: after row {self._done}: {error}")


def _note_places(path: Path, places: Path) -> None:
    """Read the whole table and write where every 1024th row starts."""
    offsets = []
    with path.open("rb") as file:
        records = Records(str(path), file)
        start, rows = records.position, 0
        for rows, _ in enumerate(log.progress(records, f"read {path.name}", "rows"), start=1):
            if rows % _STRIDE == 1:
                offsets.append(start)
            start = records.position
    document = json.dumps({"rows": rows, "header": records.header}).encode()
    table = pa.table({"offset": np.array(offsets, np.int64)}).replace_schema_metadata({_METADATA: document})
    write_table(table, places)


@lru_cache(maxsize=4)
def _open_parquet(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(path)


def _row(path: Path, number: int, columns: dict[str, Any], names: list[str], options: Options) -> Row | Lost:
    """A row of a table, named by the key column, else by the path, else by its number."""
    image = pick(columns, options.image_columns)
    name = printable(str(columns.get("key") or (image if isinstance(image, str) else number)))
    try:
        caption = pick(columns, options.caption_columns)
        if caption is None:
            raise BadSample(f"no caption: the columns are {', '.join(names)}; see --caption-column")
        caption = checked_caption(caption)
        read = _reader(path, columns, image, names, options)
    except BadSample as error:
        return Lost(number, str(path), name, printable(str(error)))
    others = {column: columns[column] for column in options.other_columns if column in columns}
    return Row(number, str(path), name, caption, others, read)


def _reader(path: Path, columns: dict[str, Any], image: Any, names: list[str], options: Options) -> Callable[[], bytes]:
    """Return the function that reads the image of one row."""
    if isinstance(image, dict):  # Hugging Face's image column
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return partial(bytes, image)
    if not isinstance(image, str):
        raise BadSample(f"no image: the columns are {', '.join(names)}; see --image-column")
    if "://" in image:
        return partial(_read_downloaded, path, str(columns.get("key")), image)
    return partial(read_file, (options.root or path.parent) / image)


def _read_downloaded(path: Path, key: str, url: str) -> bytes:
    """An image of img2dataset's "files" output: NNNNN.parquet beside NNNNN/<key>.jpg."""
    places = [path.with_suffix("") / f"{key}.{kind}" for kind in ("jpg", "png", "webp")]
    place = next((file for file in places if file.is_file()), None)
    if place is None:
        raise BadSample(f"not downloaded: {url}")
    return read_file(place)
