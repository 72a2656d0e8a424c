"""Captioned images as people have them: folders, tars and tables, all read as rows of (image file, caption).

Folders and tars are listed once; the listing, a parquet file, says where the parts of each row lie, so a process can
start at any row. Nothing is unpacked to disk and no link is followed inside a tar. Tables are in tables.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dalle_scale import io, log
from dalle_scale.curation.items import (
    Lost,
    Options,
    Row,
    Source,
    checked_caption,
    pick,
    printable,
    read_file,
    read_span,
    to_text,
)
from dalle_scale.curation.tables import TABLES, ParquetTable, Records, TextTable
from dalle_scale.curation.tar import Tar, TarError
from dalle_scale.data.decode import BadSample
from dalle_scale.types import UserError

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "jp2", "j2k", "ico", "ppm", "tga")
CAPTION_FILES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv", "captions.tsv")
_LISTING_ROWS = 4096  # of a listing at once in memory
_PARTS = {"image": "", "text": ".txt", "json": ".json"}  # of a row of a folder or tar -> extension

Place = tuple[int, int]  # offset and size in the tar; a file of a folder is (0, -1)
Places = dict[str, Place]  # by name


@dataclass(frozen=True)
class Sources:
    """All sources as one sequence of rows. Is pickled to worker processes."""

    parts: tuple[Source, ...]
    starts: tuple[int, ...]  # [parts + 1]: number of the first row of each, and of all rows

    @staticmethod
    def open(paths: list[Path], folder: Path, options: Options) -> Sources:
        """Open the sources; what is found by listing or reading them from end to end is kept in `folder`.

        Raises:
            UserError: one of them cannot be read as what it is.
        """
        folder.mkdir(parents=True, exist_ok=True)
        listed = log.progress(enumerate(paths), "list", "sources", total=len(paths))
        parts = tuple(_open(path, folder / f"{number:06d}.parquet", options) for number, path in listed)
        return Sources(parts, tuple(accumulate((part.num_rows for part in parts), initial=0)))

    @property
    def num_rows(self) -> int:
        """Of all sources."""
        return self.starts[-1]

    def rows(self, start: int, stop: int) -> Iterator[Row | Lost]:
        """Rows `start` .. `stop` - 1 of all sources, in order."""
        for part in range(max(0, bisect_right(self.starts, start) - 1), len(self.parts)):
            first, behind = self.starts[part], self.starts[part + 1]
            if first >= stop:
                return
            for row in self.parts[part].rows(max(start - first, 0), min(stop, behind) - first):
                yield replace(row, number=row.number + first)


def expand(sources: Iterable[Path]) -> list[Path]:
    """The sources, with a folder of tars as those tars. Raises UserError if one is missing."""
    paths: list[Path] = []
    for path in sources:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        tars = sorted(path.glob("*.tar")) if path.is_dir() else []
        paths += tars or [path]
    return paths


def fingerprint(path: Path) -> dict[str, Any]:
    """Fingerprint that changes with a source: size and time of a file, a digest of names, sizes and times below a
    folder."""
    name = str(path.resolve())
    if not path.is_dir():
        status = path.stat()
        return {"path": name, "size_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    sha = hashlib.sha256()
    files = _walk(path)
    for file in files:
        status = (path / file).stat()
        sha.update(f"{status.st_size} {status.st_mtime_ns} ".encode() + os.fsencode(file) + b"\0")
    return {"path": name, "files": len(files), "sha256": sha.hexdigest()}


def _open(path: Path, listing: Path, options: Options) -> Source:
    if path.is_dir() or path.suffix == ".tar":
        if not listing.exists():
            places, bad = open_folder(path) if path.is_dir() else open_tar(path)
            _write_listing(listing, _listed(path, places, bad, options))
        return Tree(path, listing, options, int(pq.read_metadata(listing).num_rows))
    if path.suffix == ".parquet":
        return ParquetTable.open(path, options)
    if path.suffix[1:] in TABLES:
        return TextTable.open(path, options, listing)
    raise UserError(f"{path}: not a source; give a folder, a .tar, or a table ({', '.join(TABLES)})")


# --- folders and tars -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tree:
    """A folder or a tar."""

    path: Path
    listing: Path
    options: Options
    num_rows: int

    def rows(self, start: int, stop: int) -> Iterator[Row | Lost]:
        """Rows `start` .. `stop` - 1."""
        file = pq.ParquetFile(self.listing)
        for group in range(start // _LISTING_ROWS, -(-stop // _LISTING_ROWS)):
            first = group * _LISTING_ROWS
            low = max(start - first, 0)
            part = file.read_row_group(group, use_threads=False).slice(low, stop - first - low)
            for number, row in enumerate(part.to_pylist(), start=first + low):
                yield self._row(number, row)

    def _row(self, number: int, row: dict[str, Any]) -> Row | Lost:
        name, source = os.fsdecode(row["name"]), str(self.path)
        shown = printable(name)
        if row["reason"] is not None:
            return Lost(number, source, shown, row["reason"])
        try:
            caption, columns = self._describe(name, row)
        except BadSample as error:
            return Lost(number, source, shown, str(error))
        return Row(number, source, shown, caption, columns, _Reading(self.path, name, row["image"]))

    def _describe(self, name: str, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Caption and other columns: from the captions file, x.txt, x.json or the template."""
        stem = str(PurePosixPath(name).with_suffix(""))
        caption, columns = row["caption"], json.loads(row["columns"] or "{}")
        if caption is None and row["text"] is not None:
            caption = to_text(_Reading(self.path, f"{stem}.txt", row["text"])())
        if row["json"] is not None and (caption is None or self.options.other_columns):
            try:
                document = dict(json.loads(_Reading(self.path, f"{stem}.json", row["json"])()))
            except (ValueError, TypeError, RecursionError):
                raise BadSample("no caption: the .json is not an object") from None
            columns = _others(document, self.options) | columns
            if caption is None:
                caption = pick(document, self.options.caption_columns)
        if caption is None and self.options.caption_template:
            folder = PurePosixPath(name).parent.name
            caption = self.options.caption_template.replace("{folder}", folder.replace("_", " "))
        return checked_caption(caption), columns


@dataclass(frozen=True)
class _Reading:
    """Reads one part of a row when it is called; raises BadSample."""

    path: Path
    name: str
    place: dict[str, int]

    def __call__(self) -> bytes:
        if self.place["size"] < 0:
            return read_file(self.path / self.name)
        return read_span(self.path, self.place["offset"], self.place["size"])


def open_folder(path: Path) -> tuple[Places, list[tuple[str, str]]]:
    """The files below a folder."""
    return dict.fromkeys(_walk(path), (0, -1)), []


def open_tar(path: Path) -> tuple[Places, list[tuple[str, str]]]:
    """The files in a tar, and (name, reason) of what cannot be read. Links are not followed."""
    places: Places = {}
    bad: list[tuple[str, str]] = []
    with path.open("rb") as file:
        try:
            for member in Tar(file):
                name = str(PurePosixPath(member.name))  # "./x.jpg" is "x.jpg"
                if member.kind == "folder":
                    continue
                if member.kind != "file":
                    bad.append((name, "not a regular file"))
                elif name in places:
                    bad.append((name, "name comes twice"))
                else:
                    places[name] = (member.offset, member.size)
        except TarError as error:
            if error.offset == 0:
                raise UserError(f"{path}: not an uncompressed tar: {error}") from None
            bad.append((path.name, f"tar is damaged or cut off: {error}"))
    return places, bad


def _walk(path: Path) -> list[str]:
    """Names of the regular files below a folder, sorted; links to folders are not followed."""
    names = []
    for folder, _, files in os.walk(path):
        below = PurePosixPath(folder).relative_to(PurePosixPath(path))
        names += [str(below / file) for file in files if os.path.isfile(os.path.join(folder, file))]
    return sorted(names)


def _listed(path: Path, places: Places, bad: list[tuple[str, str]], options: Options) -> Iterator[dict[str, Any]]:
    """Rows of the listing: images with their captions, and captions whose image is missing."""
    file = next((name for name in CAPTION_FILES if name in places), None)
    captions = _read_captions(path, file, places[file], options) if file else {}
    images = [name for name in places if PurePosixPath(name).suffix[1:].lower() in IMAGES]
    for name in images:
        stem = str(PurePosixPath(name).with_suffix(""))
        row: dict[str, Any] = {"name": os.fsencode(name)}
        for part, suffix in _PARTS.items():
            place = places.get(stem + suffix if suffix else name)
            row[part] = place and {"offset": place[0], "size": place[1]}
        for extra in captions.pop(name, [{}]):
            yield row | extra
    stems = {PurePosixPath(name).with_suffix("") for name in images}
    texts = [name for name in places if name.endswith(".txt") and PurePosixPath(name).with_suffix("") not in stems]
    for name, reason in [*((name, "no image") for name in [*texts, *captions]), *bad]:
        yield {"name": printable(name).encode(), "reason": reason}


def _read_captions(path: Path, name: str, place: Place, options: Options) -> dict[str, list[dict[str, Any]]]:
    """File name -> what its rows of the listing hold, from a captions file inside a folder or tar."""
    captions: dict[str, list[dict[str, Any]]] = {}
    try:
        data = _Reading(path, name, {"offset": place[0], "size": place[1]})()
    except BadSample as error:
        raise UserError(f"{path}/{name}: cannot read the captions: {error}") from None
    for columns in Records(f"{path}/{name}", BytesIO(data)):
        file = pick(columns, options.image_columns)
        if not isinstance(file, str):
            raise UserError(f"{name}: a row names no file; its columns are {', '.join(columns)}; see --image-column")
        row: dict[str, Any] = {"columns": json.dumps(_others(columns, options))}
        caption = pick(columns, options.caption_columns)
        if caption is not None:
            try:
                row["caption"] = checked_caption(caption)
            except BadSample as error:
                row["reason"] = str(error)
        captions.setdefault(str(PurePosixPath(file)), []).append(row)
    return captions


def _write_listing(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write the rows, a part of them at a time."""
    place = pa.struct({"offset": pa.int64(), "size": pa.int64()})
    texts = {name: pa.string() for name in ("caption", "columns", "reason")}
    schema = pa.schema({"name": pa.binary(), **dict.fromkeys(_PARTS, place), **texts})
    with io.atomic(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        part: list[dict[str, Any]] = []
        for row in rows:
            part.append(row)
            if len(part) == _LISTING_ROWS:
                writer.write_table(pa.Table.from_pylist(part, schema))
                part = []
        writer.write_table(pa.Table.from_pylist(part, schema))


def _others(columns: dict[str, Any], options: Options) -> dict[str, Any]:
    return {name: columns[name] for name in options.other_columns if name in columns}
