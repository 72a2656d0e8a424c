"""The work on one chunk of consecutive input rows, done by any process at any time with the same result.

`build_chunk` makes shards in the staging folder and accounts for each row; `finish_chunk` moves them to where they
stay, without the rows that repeat earlier ones and without gaps in the numbers of the shards. Each writes its table of
rows last: where that exists, the chunk is done.

A table of rows, `rows/<chunk>.parquet`, has one row an input row:
    row                  its number among all rows of all sources, from 0
    source, name         where it comes from
    status               "kept", or the reason why it is not
    key, split           of the sample, "train" or "valid"; null where there is none
    sha256               32 bytes, of the image's file as it was read; null where none was read
    perceptual_hash      of the image as it was decoded (`prepare.perceptual_hash`); null where it was not
    width, height        of the image before resizing, upright, in pixels
    caption_characters   length of the caption; null where there is none
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dalle_scale.curation.filters import Filters
from dalle_scale.curation.image_prepare import prepare
from dalle_scale.curation.items import Lost, Row
from dalle_scale.curation.shard_writer import Shard, shard_name, write_table
from dalle_scale.curation.sources import Sources
from dalle_scale.data.decode import BadSample
from dalle_scale.data.manifest import index_path
from dalle_scale.types import UserError

SPLITS = ("train", "valid")
KEPT = "kept"
SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "source": pa.string(),
        "name": pa.string(),
        "status": pa.string(),
        "key": pa.string(),
        "split": pa.string(),
        "sha256": pa.binary(32),
        "perceptual_hash": pa.uint64(),
        "width": pa.int32(),
        "height": pa.int32(),
        "caption_characters": pa.int32(),
    }
)
_KEY_CHARACTERS = 40  # of the name, in a key

# How the images of a chunk are read. Called once a chunk, in the process that works on it, with the rows that the
# rules on captions and columns left over, in order. Gives each of them back, once and in the same order, with the
# image's file or the reason why there is none. It may take rows ahead of what it gives back: as many as it likes to
# have under way at once. Must be picklable: a function of a module, or a frozen dataclass with `__call__`.
Fetch = Callable[[Iterator[Row]], Iterator[tuple[Row, "bytes | str"]]]


def fetch(rows: Iterator[Row]) -> Iterator[tuple[Row, bytes | str]]:
    """Read the images one after the other from where the sources say they are: the `Fetch` of local files."""
    for row in rows:
        try:
            yield row, row.read()
        except BadSample as error:
            yield row, str(error)


@dataclass(frozen=True)
class Recipe:
    """Settings of the data set to build."""

    size: int | None = None  # side of the stored squares in pixels; None = images as they are
    filters: Filters = field(default_factory=Filters)
    valid_share: float = 0.0
    samples_per_shard: int = 10_000  # rows of a chunk, so at most this many samples of a shard
    dedupe: str = "none"  # "none", "exact" or "near"
    near_bits: int = 4  # of 64 that may differ between near duplicates
    keep_columns: tuple[str, ...] = ()  # stored as the member "json" of each sample


@dataclass(frozen=True)
class Job:
    """The whole work. Is pickled to worker processes."""

    out: Path
    stage: Path
    sources: Sources
    recipe: Recipe
    fetch: Fetch

    @property
    def num_chunks(self) -> int:
        """Of all sources together."""
        return -(-self.sources.num_rows // self.recipe.samples_per_shard)

    def rows(self, chunk: int) -> range:
        """The rows of one chunk."""
        start = chunk * self.recipe.samples_per_shard
        return range(start, min(start + self.recipe.samples_per_shard, self.sources.num_rows))

    @property
    def fatal(self) -> Path:
        """JSON: row -> how it ends a process that looks at it."""
        return self.stage / "fatal.json"

    def fatal_rows(self) -> dict[int, str]:
        """Rows that are known to end a process."""
        found = json.loads(self.fatal.read_text(encoding="utf-8")) if self.fatal.exists() else {}
        return {int(row): how for row, how in found.items()}

    def staged(self, chunk: int) -> Path:
        """Table of rows of a chunk whose shards are built."""
        return self.stage / "rows" / f"{chunk:06d}.parquet"

    def finished(self, chunk: int) -> Path:
        """Table of rows of a chunk whose shards are in place."""
        return self.out / "rows" / f"{chunk:06d}.parquet"


@dataclass(frozen=True)
class Duplicates:
    """Duplicates that are known before chunks are finished."""

    numbers: dict[str, list[int]]  # split -> [chunks]: number of the chunk's shard, -1 where it has none
    table: Path | None  # parquet: the rows that go, the earlier ones that they repeat, and whether only nearly

    def of(self, rows: range) -> dict[int, str]:
        """Row -> reason, of those among `rows` that go."""
        if self.table is None:
            return {}
        inside = [("row", ">=", rows.start), ("row", "<", rows.stop)]
        found = pq.read_table(self.table, filters=inside, use_threads=False).to_pylist()
        return {row["row"]: f"{'near ' if row['near'] else ''}duplicate of {row['of']}" for row in found}


# --- first pass -------------------------------------------------------------------------------------------------------


def build_chunk(job: Job, chunk: int, at_row: Callable[[int], None]) -> Iterator[int]:
    """Build the shards of one chunk in the staging folder. Yields how many rows more are accounted for."""
    rows = job.rows(chunk)
    accounts: dict[int, dict[str, Any]] = {}
    shards: dict[str, Shard] = {}
    done, last = 0, -1
    for row, data in job.fetch(_wanted(job, rows, accounts)):
        assert row.number > last, f"row {row.number} was fetched after row {last}"
        last = row.number
        at_row(row.number)
        try:
            accounts[row.number] |= _add(job, shards, chunk, row, data)
        except BadSample as error:
            accounts[row.number]["status"] = str(error)
        yield len(accounts) - done
        done = len(accounts)
    yield len(accounts) - done
    for shard in shards.values():
        shard.close()
    assert all("status" in accounts[number] for number in rows), "each row is kept or has a reason"
    job.staged(chunk).parent.mkdir(exist_ok=True)
    write_table(pa.Table.from_pylist([accounts[number] for number in rows], SCHEMA), job.staged(chunk))


def try_row(job: Job, number: int) -> None:
    """Do with one row what `build_chunk` does, and write nothing. For a process that may end by it."""
    rows = (row for row in job.sources.rows(number, number + 1) if isinstance(row, Row))
    for _, data in job.fetch(rows):
        if not isinstance(data, str):
            with suppress(BadSample):
                prepare(data, job.recipe.size, job.recipe.filters.check_size)


def _wanted(job: Job, rows: range, accounts: dict[int, dict[str, Any]]) -> Iterator[Row]:
    """The rows that are worth reading; opens an account for every row."""
    fatal = job.fatal_rows()
    for row in job.sources.rows(rows.start, rows.stop):
        account = {"row": row.number, "source": row.source, "name": row.name}
        accounts[row.number] = account
        if isinstance(row, Lost):
            account["status"] = row.reason
            continue
        account["caption_characters"] = len(row.caption.strip())
        try:
            job.recipe.filters.check_row(row.caption, row.columns)
            if row.number in fatal:
                raise BadSample(f"ended the process that decoded it: {fatal[row.number]}")
        except BadSample as error:
            account["status"] = str(error)
        else:
            yield row


def _add(job: Job, shards: dict[str, Shard], chunk: int, row: Row, data: bytes | str) -> dict[str, Any]:
    """Make a row a sample of a shard. Returns the rest of its account; raises BadSample."""
    if isinstance(data, str):
        raise BadSample(data)
    account: dict[str, Any] = {"sha256": hashlib.sha256(data).digest()}
    try:
        image = prepare(data, job.recipe.size, job.recipe.filters.check_size)
    except BadSample as error:
        return account | {"status": str(error)}
    key = make_key(row)
    split = "valid" if share_of(row.name) < job.recipe.valid_share else "train"
    if split not in shards:
        shards[split] = Shard(job.stage / split, chunk)
    members = {image.kind: image.data, "txt": row.caption.strip().encode()}
    if job.recipe.keep_columns:
        members["json"] = to_json({name: row.columns.get(name) for name in job.recipe.keep_columns})
    shards[split].add(key, members)
    size = {"width": image.width, "height": image.height, "perceptual_hash": image.perceptual_hash}
    return account | size | {"status": KEPT, "key": key, "split": split}


def to_json(columns: dict[str, Any]) -> bytes:
    """Columns as JSON: what it has no word for becomes null (a number that is not finite) or text (a date)."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in columns.items()
    }
    return json.dumps(finite, default=str).encode()


def make_key(row: Row) -> str:
    """The row's number, which makes it unique, and the end of its name as far as keys may hold it."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.splitext(row.name)[0])[-_KEY_CHARACTERS:].strip("_-")
    return f"{row.number:09d}-{name}" if name else f"{row.number:09d}"


def share_of(name: str) -> float:
    """A number in [0, 1) that depends on the name without extension only: all captions of an image go to one side, and
    samples stay on theirs when the set grows."""
    stem = os.path.splitext(name)[0]
    return int.from_bytes(hashlib.blake2b(stem.encode(), digest_size=6).digest(), "big") / (1 << 48)


# --- second pass ------------------------------------------------------------------------------------------------------


def finish_chunk(job: Job, duplicates: Duplicates, chunk: int, at_row: Callable[[int], None]) -> Iterator[int]:
    """Put the shards of one chunk where they stay. Yields how many rows more are done."""
    rows, reasons = job.rows(chunk), duplicates.of(job.rows(chunk))
    table = pq.read_table(job.staged(chunk), use_threads=False)
    gone = {table["key"][number - rows.start].as_py() for number in reasons}
    for split in SPLITS:
        if duplicates.numbers[split][chunk] >= 0:
            _publish(job, split, chunk, duplicates.numbers[split][chunk], gone)
    if reasons:
        accounts = table.to_pylist()
        for number, reason in reasons.items():
            accounts[number - rows.start] |= {"status": reason, "key": None, "split": None}
        table = pa.Table.from_pylist(accounts, SCHEMA)
    job.finished(chunk).parent.mkdir(exist_ok=True)
    write_table(table, job.finished(chunk))
    yield len(rows)


def _publish(job: Job, split: str, chunk: int, number: int, gone: set[str]) -> None:
    """Move a shard, or copy it without the samples that are gone."""
    staged, index = job.stage / split / shard_name(chunk), index_path(job.stage / split, chunk)
    if not index.exists():  # an earlier try came this far
        return
    table = pq.read_table(index, use_threads=False)
    if number == chunk and gone.isdisjoint(table["key"].to_pylist()):
        final = index_path(job.out / split, number)
        final.parent.mkdir(parents=True, exist_ok=True)
        if staged.exists():
            staged.replace(job.out / split / staged.name)
        index.replace(final)
        return
    shard = Shard(job.out / split, number)
    for row in table.to_pylist():
        if row["key"] not in gone:
            shard.add(row["key"], _members(staged, row))
    shard.close()
    index.unlink()
    staged.unlink()


def _members(path: Path, row: dict[str, Any]) -> dict[str, bytes]:
    """The members of one sample, by a row of the index."""
    members = {}
    with path.open("rb") as file:
        for name in (column.removesuffix(".offset") for column in row if column.endswith(".offset")):
            if row[f"{name}.offset"] is not None:
                data = os.pread(file.fileno(), row[f"{name}.length"], row[f"{name}.offset"])
                if zlib.crc32(data) != row[f"{name}.crc32"]:
                    raise UserError(f"{path}: damaged since it was written; build again with --overwrite")
                members[name] = data
    return members
