"""Manifest of a data set: `manifest.parquet`, one row a shard, and for each shard `index/<number>.parquet`, one row a
sample. The only way into the data.

A row of the manifest: `url` (a file below the folder, another path, or a remote address), `size_bytes`, `sha256`,
`samples`, and name and sha256 of the shard's index. Its metadata holds one JSON document: the names of the members and
`info`, a free dictionary that says what they are. A row of an index: `key`, and for each member extension
`<ext>.offset`, `<ext>.length` and `<ext>.crc32` (null where the sample has no such member). Offsets are bytes from the
start of the tar, so a sample is read without looking at any tar header.

Opening costs what the shards cost, not what the samples cost: an index is read when one of its samples is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dalle_scale.types import UserError

NAME = "manifest.parquet"
INDEX = "index"
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")  # members that hold an encoded image
_FIELDS = {"offset": pa.int64(), "length": pa.int64(), "crc32": pa.uint32()}
_SHARD = {"url": pa.string(), "size_bytes": pa.int64(), "sha256": pa.string(), "samples": pa.int64()}
_MANIFEST = {**_SHARD, "index": pa.string(), "index_sha256": pa.string()}
_METADATA = b"dalle_scale"
_OPEN_INDICES = 64  # of 10,000 samples with three members each: some 50 MB


@dataclass(frozen=True)
class ShardFile:
    """One tar of the data set."""

    url: str
    size_bytes: int
    sha256: str
    samples: int
    index: str  # file name
    index_sha256: str

    @property
    def is_remote(self) -> bool:
        """Whether it has to be fetched before it can be read."""
        return "://" in self.url


class Entry(NamedTuple):
    """Position of one member of one sample in its shard, in bytes."""

    offset: int
    length: int
    crc32: int


@dataclass(frozen=True)
class Index:
    """The samples of one shard, n of them."""

    keys: pa.ChunkedArray  # [n] strings
    members: dict[str, tuple[npt.NDArray[Any], ...]]  # offset (-1 = the sample has none), length, crc32: [n] each

    def entry(self, row: int, name: str) -> Entry | None:
        """The member `name` of a sample, None if it has none."""
        columns = self.members.get(name)
        if columns is None or (offset := columns[0].item(row)) < 0:
            return None
        return Entry(offset, columns[1].item(row), columns[2].item(row))


class Manifest:
    """An opened data set of N samples, numbered through all shards in order."""

    def __init__(self, folder: Path, table: pa.Table, members: tuple[str, ...], info: dict[str, Any]) -> None:
        self.folder = folder
        self.members = members  # names that occur
        self.info = info
        self._table = table
        self.starts: npt.NDArray[np.int64] = np.concatenate([[0], np.cumsum(table["samples"].to_numpy())])  # [S + 1]
        self.digest = _digest(table, info)  # sha256 (hex) of what the data set holds, wherever it lies
        self._indices: OrderedDict[int, Index] = OrderedDict()

    @staticmethod
    def open(folder: str | Path) -> Manifest:
        """Read `folder/manifest.parquet` and check that every local shard is there in its full size.

        Raises:
            UserError: no manifest, or a shard is missing or has another size.
        """
        folder = Path(folder)
        manifest = Manifest(folder, *read_table(folder / NAME))
        columns = (manifest._table[name].to_pylist() for name in ("url", "size_bytes"))
        for url, size_bytes in zip(*columns, strict=True):
            if "://" not in url:
                _check_file(folder / url, size_bytes)
        return manifest

    @property
    def num_samples(self) -> int:
        """N."""
        return int(self.starts[-1])

    @property
    def num_shards(self) -> int:
        """S."""
        return len(self.starts) - 1

    @property
    def shards(self) -> list[ShardFile]:
        """All shards. Made anew at each call."""
        return [self.shard(number) for number in range(self.num_shards)]

    @property
    def holds_images(self) -> bool:
        """Whether there are members that can be decoded to images."""
        return any(name in self.members for name in IMAGES)

    @property
    def has_remote_shards(self) -> bool:
        """Whether some shards have to be fetched before they can be read."""
        return any("://" in url for url in self._table["url"].to_pylist())

    def largest_shards_bytes(self, count: int) -> int:
        """Size of the `count` largest shards together."""
        return int(np.sort(self._table["size_bytes"].to_numpy())[::-1][:count].sum())

    def shard(self, number: int) -> ShardFile:
        """Shard number `number`."""
        return ShardFile(**{name: self._table[name][number].as_py() for name in _MANIFEST})

    def samples(self, shard: int) -> range:
        """The samples of one shard."""
        return range(int(self.starts[shard]), int(self.starts[shard + 1]))

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard, row in its index) of one sample."""
        shard = int(self.starts.searchsorted(sample, side="right")) - 1
        return shard, sample - self.starts.item(shard)

    def entry(self, sample: int, name: str) -> Entry | None:
        """Position of the member `name` of one sample in its shard, None if it has none."""
        shard, row = self.locate(sample)
        return self.index(shard).entry(row, name)

    def key(self, sample: int) -> str:
        """The key of one sample."""
        shard, row = self.locate(sample)
        return str(self.index(shard).keys[row].as_py())

    def shard_url(self, sample: int) -> str:
        """Address of the tar that holds one sample."""
        url = str(self._table["url"][self.locate(sample)[0]].as_py())
        return url if "://" in url else str(self.folder / url)

    def index(self, shard: int) -> Index:
        """The samples of one shard; those used last stay in memory.

        Raises:
            UserError: the index file is missing or not the one that the manifest was made with.
        """
        index = self._indices.get(shard)
        if index is None:
            index = _read_index(self.folder / INDEX, self.shard(shard))
            if len(self._indices) >= _OPEN_INDICES:
                self._indices.popitem(last=False)
            self._indices[shard] = index
        self._indices.move_to_end(shard)
        return index


def index_path(folder: str | Path, number: int) -> Path:
    """Path of the index of shard `number`; it exists if and only if the shard is finished."""
    return Path(folder) / INDEX / f"{number:06d}.parquet"


def index_table(
    url: str, size_bytes: int, sha256: str, keys: list[str], members: dict[str, list[tuple[int, int, int] | None]]
) -> pa.Table:
    """The index of one finished shard, with the shard's own row of the manifest as metadata.

    Args:
        members: for each extension a list as long as `keys` of (offset, length, crc32), or None where absent.
    """
    columns: dict[str, pa.Array] = {"key": pa.array(keys, pa.string())}
    for name, entries in sorted(members.items()):
        for position, (field, dtype) in enumerate(_FIELDS.items()):
            values = [None if entry is None else entry[position] for entry in entries]
            columns[f"{name}.{field}"] = pa.array(values, dtype)
    row = {"url": url, "size_bytes": size_bytes, "sha256": sha256, "samples": len(keys)}
    return pa.table(columns).replace_schema_metadata({_METADATA: json.dumps(row).encode()})


def manifest_table(folder: Path, info: dict[str, Any]) -> pa.Table:
    """The manifest of all shards whose indices lie below `folder`."""
    rows = []
    members: set[str] = set()
    for path in sorted((folder / INDEX).glob("*.parquet")):
        table = pq.read_table(path, use_threads=False)
        index = _to_index(table)
        row = json.loads(table.schema.metadata[_METADATA])
        rows.append({**row, "index": path.name, "index_sha256": _index_digest(index)})
        members |= index.members.keys()
    document = {"info": info, "members": sorted(members)}
    table = pa.Table.from_pylist(rows, pa.schema(_MANIFEST))
    return table.replace_schema_metadata({_METADATA: json.dumps(document, sort_keys=True).encode()})


def read_table(path: Path) -> tuple[pa.Table, tuple[str, ...], dict[str, Any]]:
    """Table, member names and info of a manifest file."""
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; a data set is a folder written by data_tools/build_shards.py, or made of existing "
            "tars by data_tools/index_shards.py"
        )
    try:
        table = pq.read_table(path, use_threads=False)
        document = json.loads(table.schema.metadata[_METADATA])
        table = table.select([*_MANIFEST]).combine_chunks()
        return table, tuple(document["members"]), document["info"]
    except (pa.ArrowException, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not a manifest of this program, or damaged; build the shards again") from None


def _check_file(path: Path, size_bytes: int) -> None:
    try:
        found = os.stat(path).st_size
    except OSError:
        raise UserError(f"{path}: this shard is missing; copy it back or build the shards again") from None
    if found != size_bytes:
        raise UserError(
            f"{path}: this shard has {found} bytes, the manifest says {size_bytes}; "
            "copy it again or build the shards again"
        )


def _read_index(folder: Path, shard: ShardFile) -> Index:
    path = folder / shard.index
    if not path.is_file():
        raise UserError(f"{path}: this shard's index is missing; copy it back or index the shards again")
    try:
        index = _to_index(pq.read_table(path, use_threads=False))
    except (pa.ArrowException, OSError, KeyError):
        index = None
    if index is None or _index_digest(index) != shard.index_sha256:
        raise UserError(f"{path}: not the index that the manifest was made with; copy it again or index again")
    return index


def _to_index(table: pa.Table) -> Index:
    names = [name.removesuffix(".offset") for name in table.column_names if name.endswith(".offset")]
    absent = {"offset": -1, "length": 0, "crc32": 0}
    members = {
        name: tuple(table[f"{name}.{field}"].fill_null(absent[field]).to_numpy() for field in _FIELDS) for name in names
    }
    return Index(table["key"], members)


def _index_digest(index: Index) -> str:
    """sha256 of an index's content: not of the file, which also says where the shard lies."""
    sha = hashlib.sha256("\n".join(index.keys.to_pylist()).encode())
    for name, columns in sorted(index.members.items()):
        sha.update(f"\n{name}\n".encode())
        for column, kind in zip(columns, ("<i8", "<i8", "<u4"), strict=True):
            sha.update(column.astype(kind, copy=False).tobytes())
    return sha.hexdigest()


def _digest(table: pa.Table, info: dict[str, Any]) -> str:
    """sha256 of info and of every shard's content and index: the same wherever the shards lie."""
    sha = hashlib.sha256(json.dumps(info, sort_keys=True).encode())
    for name in ("size_bytes", "sha256", "samples", "index_sha256"):
        sha.update(json.dumps(table[name].to_pylist()).encode())
    return sha.hexdigest()
