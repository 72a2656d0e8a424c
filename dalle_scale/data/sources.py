"""Captioned images as people have them: folders, tars and tables, all read as rows of (image file, caption).

Reading is lazy: a row costs its name until it is loaded. Nothing is unpacked to disk, no link is followed inside a tar,
nothing is fetched from the network, and no file above a size limit is read.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dalle_scale.data.reader import BadSample
from dalle_scale.types import UserError

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "jp2", "j2k", "ico", "ppm", "tga")
CAPTION_FILES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv", "captions.tsv")
TABLES = ("csv", "tsv", "jsonl", "parquet")
IMAGE_COLUMNS = ("path", "file", "file_name", "filename", "image_path", "image", "jpg", "png", "webp", "url")
CAPTION_COLUMNS = ("caption", "text", "prompt", "TEXT", "alt_text", "title")
MAX_BYTES = 256 << 20  # of one input file


@dataclass(frozen=True)
class Item:
    """One row of the input. `load` gives the image file and the caption, or raises BadSample."""

    name: str
    load: Callable[[], tuple[bytes, str]]


@dataclass(frozen=True)
class Options:
    """What the command line says about reading."""

    image_columns: tuple[str, ...] = IMAGE_COLUMNS
    caption_columns: tuple[str, ...] = CAPTION_COLUMNS
    root: Path | None = None
    caption_template: str | None = None


def expand(sources: Iterable[Path]) -> Iterator[Path]:
    """The sources, with a folder of tars as those tars."""
    for path in sources:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        tars = sorted(path.glob("*.tar")) if path.is_dir() else []
        yield from tars or [path]


def read_source(path: Path, options: Options) -> tuple[int, Iterator[Item]]:
    """Number of rows of one source, and the rows; no image is read before its row's `load`."""
    if path.is_dir() or path.suffix == ".tar":
        items = list(tree_items(*(open_folder(path) if path.is_dir() else open_tar(path)), options))
        return len(items), iter(items)
    if path.suffix[1:] in TABLES:
        return count_rows(path), table_items(path, options)
    raise UserError(f"{path}: not a source; give a folder, a .tar, or a table ({', '.join(TABLES)})")


# --- folders and tars: names, and a function that reads one of them ---------------------------------------------------

Reads = dict[str, Callable[[], bytes]]


def open_folder(path: Path) -> tuple[Reads, list[Item]]:
    """The files below a folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): partial(read_file, file) for file in files}, []


def open_tar(path: Path) -> tuple[Reads, list[Item]]:
    """The files in a tar, and items for what cannot be read. Nothing is unpacked to disk, links are not followed."""
    reads: Reads = {}
    bad: list[Item] = []
    try:
        tar = tarfile.open(path, "r:")  # noqa: SIM115 (closed below)
    except tarfile.TarError as error:
        raise UserError(f"{path}: not an uncompressed tar: {error}") from None
    with tar:
        try:
            for member in tar:
                if not member.isreg() or member.issparse():
                    if not member.isdir():
                        bad.append(failing(member.name, "not a regular file"))
                    continue
                name = str(PurePosixPath(member.name))  # "./x.jpg" is "x.jpg"
                if name in reads:
                    bad.append(failing(name, "name comes twice"))
                else:
                    reads[name] = partial(read_span, path, member.offset_data, member.size)
            # tarfile ends without a word at a damaged header; a sound archive ends in blocks of zeros
            sound = read_span(path, tar.offset, tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
        except (tarfile.TarError, BadSample):
            sound = False
        if not sound:
            bad.append(failing(path.name, f"tar is damaged or cut off: nothing is read from byte {tar.offset} on"))
    return reads, bad


def read_file(path: Path) -> bytes:
    """A whole file. Raises BadSample if it is too large or cannot be read."""
    try:
        return read_span(path, 0, path.stat().st_size)
    except OSError as error:
        raise BadSample(f"cannot read: {error.strerror}") from None


def read_span(path: Path, offset: int, size: int) -> bytes:
    """Part of a file. Raises BadSample if it is too large or the file ends before."""
    if size > MAX_BYTES:
        raise BadSample(f"too large: {size} bytes, the limit is {MAX_BYTES}")
    with path.open("rb") as file:
        data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise BadSample(f"cut off: {len(data)} of {size} bytes")
    return data


def tree_items(reads: Reads, bad: list[Item], options: Options) -> Iterator[Item]:
    """Rows of a folder or tar: its images with their captions, and captions whose image is missing."""
    captions_file = next((name for name in CAPTION_FILES if name in reads), None)
    captions = read_captions(captions_file, reads[captions_file], options) if captions_file else {}
    images = [name for name in reads if PurePosixPath(name).suffix[1:].lower() in IMAGES]
    for name in images:
        for caption in captions.pop(name, [None]):
            yield Item(name, partial(load_from_tree, reads, name, caption, options))
    stems = {PurePosixPath(name).with_suffix("") for name in images}
    texts = [name for name in reads if name.endswith(".txt") and PurePosixPath(name).with_suffix("") not in stems]
    yield from (failing(name, "no image") for name in [*texts, *captions])
    yield from bad


def load_from_tree(reads: Reads, name: str, caption: Any, options: Options) -> tuple[bytes, str]:
    """One image and its caption: from the captions file, x.txt, x.json or the template."""
    stem = str(PurePosixPath(name).with_suffix(""))
    if caption is None and f"{stem}.txt" in reads:
        caption = to_text(reads[f"{stem}.txt"]())
    if caption is None and f"{stem}.json" in reads:
        try:
            caption = pick(dict(json.loads(reads[f"{stem}.json"]())), options.caption_columns)
        except (ValueError, TypeError):
            raise BadSample("no caption: the .json is not an object") from None
    if caption is None and options.caption_template:
        folder = PurePosixPath(name).parent.name
        caption = options.caption_template.replace("{folder}", folder.replace("_", " "))
    return reads[name](), checked_caption(caption)


def read_captions(name: str, read: Callable[[], bytes], options: Options) -> dict[str, list[Any]]:
    """File name -> its captions, from a captions file inside a folder or tar."""
    captions: dict[str, list[Any]] = {}
    try:
        lines = io.StringIO(to_text(read()), newline="")
    except BadSample as error:
        raise UserError(f"{name}: cannot read the captions: {error}") from None
    for row in read_rows(name, lines):
        file = pick(row, options.image_columns)
        if not isinstance(file, str):
            raise UserError(f"{name}: a row names no file; its columns are {', '.join(row)}; see --image-column")
        captions.setdefault(str(PurePosixPath(file)), []).append(pick(row, options.caption_columns))
    return captions


# --- tables -----------------------------------------------------------------------------------------------------------


def table_items(path: Path, options: Options) -> Iterator[Item]:
    """Rows of a table. An item is named by the key column, else by the path, else by its number."""
    for number, row in enumerate(table_rows(path)):
        image = pick(row, options.image_columns)
        name = str(row.get("key") or (image if isinstance(image, str) else number))
        yield Item(name, partial(load_from_table, path, row, options))


def table_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows, a few at a time in memory."""
    if path.suffix == ".parquet":
        for batch in pq.ParquetFile(path).iter_batches(batch_size=256):
            yield from batch.to_pylist()
        return
    with path.open(encoding="utf-8-sig", newline="") as lines:
        yield from read_rows(str(path), lines)


def count_rows(path: Path) -> int:
    """Number of rows of a table."""
    if path.suffix != ".parquet":
        return sum(1 for _ in table_rows(path))
    try:
        return int(pq.read_metadata(path).num_rows)
    except pa.ArrowException as error:
        raise UserError(f"{path}: not a parquet file: {error}") from None


def load_from_table(path: Path, row: dict[str, Any], options: Options) -> tuple[bytes, str]:
    """The image and caption of one row."""
    caption = pick(row, options.caption_columns)
    if caption is None:
        raise BadSample(f"no caption: the columns are {', '.join(row)}; see --caption-column")
    caption = checked_caption(caption)
    image = pick(row, options.image_columns)
    if isinstance(image, dict):  # Hugging Face's image column
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image, caption
    if not isinstance(image, str):
        raise BadSample(f"no image: the columns are {', '.join(row)}; see --image-column")
    if "://" not in image:
        return read_file((options.root or path.parent) / image), caption
    # img2dataset's "files" output: NNNNN.parquet beside NNNNN/<key>.jpg
    places = [path.with_suffix("") / f"{row.get('key')}.{kind}" for kind in ("jpg", "png", "webp")]
    place = next((file for file in places if file.is_file()), None)
    if place is None:
        raise BadSample(f"not downloaded: {image}")
    return read_file(place), caption


def read_rows(name: str, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL, CSV or TSV file; raises UserError where it is not one."""
    try:
        if name.endswith(".jsonl"):
            yield from (dict(json.loads(line)) for line in lines if line.strip())
        else:
            yield from csv.DictReader(lines, restkey="(more)", delimiter="\t" if name.endswith(".tsv") else ",")
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{name}: not a table of rows in UTF-8: {error}") from None


def pick(row: dict[str, Any], columns: Iterable[str]) -> Any:
    """The first of the columns that has a value."""
    return next((row[column] for column in columns if row.get(column) is not None), None)


def checked_caption(caption: Any) -> str:
    """The caption, if it is a text."""
    if not isinstance(caption, str):
        raise BadSample("no caption" if caption is None else f"no caption: {type(caption).__name__} is no text")
    return caption


def to_text(data: bytes) -> str:
    """UTF-8 or nothing."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BadSample("caption is not UTF-8") from None


def failing(name: str, reason: str) -> Item:
    """A row that is known to be bad."""

    def load() -> tuple[bytes, str]:
        raise BadSample(reason)

    return Item(name, load)
