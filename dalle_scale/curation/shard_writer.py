"""Write a data set: plain webdataset tars and their manifest, the same bytes on every run.

A sample is a key and its members (`{"png": ..., "txt": ...}`); the members of a sample lie side by side in the tar as
`<key>.<extension>`. A shard is written under another name, flushed to disk and renamed, then its index is written to
`index/`; the manifest is made from all indices at the end. So several processes can write shards of one data set, and
work that was cut off continues at the first shard without an index. No manifest = the data set is not finished.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tarfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dalle_scale import io
from dalle_scale.data import manifest
from dalle_scale.types import UserError

_KEY = re.compile(r"[A-Za-z0-9_-]{1,200}")
_EXTENSION = re.compile(r"[a-z0-9_]{1,32}")


class ShardWriter:
    """Writes a whole data set, one shard after the other.

    with ShardWriter("runs/data/train", info={"kind": "images"}) as writer:
        writer.add("000001", {"png": png_bytes, "txt": b"a red circle"})

    Without an exception the `with` block ends in a committed manifest.

    Raises:
        UserError: the folder already holds a finished data set and `overwrite` is not set; a key is malformed or
            comes twice; nothing was added.
    """

    def __init__(
        self,
        folder: str | Path,
        samples_per_shard: int = 10_000,
        info: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.num_samples = 0
        self._samples_per_shard = samples_per_shard
        self._info = info or {}
        self._keys: set[str] = set()
        self._num_shards = 0
        self._shard: Shard | None = None
        if (self.folder / manifest.NAME).exists() and not overwrite:
            raise UserError(
                f"{self.folder}: holds a data set already; delete it, choose another folder or overwrite it"
            )
        _clear(self.folder)

    def add(self, key: str, members: dict[str, bytes]) -> None:
        """Append one sample. Keys hold letters, digits, `_` and `-` (no dots: webdataset cuts names there)."""
        if key in self._keys:
            raise UserError(f"{self.folder}: key '{key}' comes twice; keys must be unique in a data set")
        if self._shard is None:
            self._shard = Shard(self.folder, self._num_shards)
        self._shard.add(key, members)
        self._keys.add(key)
        self.num_samples += 1
        if self._shard.num_samples == self._samples_per_shard:
            self._close_shard()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._shard is not None:
                self._shard.abandon()
            return
        self._close_shard()
        commit(self.folder, self._info)

    def _close_shard(self) -> None:
        """Finish the open shard, if there is one."""
        if self._shard is not None:
            self._shard.close()
            self._shard = None
            self._num_shards += 1


class Shard:
    """Writes one shard: `add` the samples, then `close`. Nothing is visible under its name before `close`."""

    def __init__(self, folder: str | Path, number: int) -> None:
        self.path = Path(folder) / shard_name(number)
        self.num_samples = 0
        self._keys: list[str] = []
        self._members: dict[str, list[tuple[int, int, int] | None]] = {}
        self._sha = hashlib.sha256()
        self._position = 0
        self._index = manifest.index_path(folder, number)
        self._index.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = io.unfinished(self.path)
        self._file: BinaryIO = self._temporary.open("wb")

    def add(self, key: str, members: dict[str, bytes]) -> None:
        """Append one sample; members in the order of their extensions."""
        if not _KEY.fullmatch(key):
            raise UserError(f"{self.path}: key '{key}': a key is 1 to 200 letters, digits, '_' or '-'")
        for extension in sorted(members):
            if not _EXTENSION.fullmatch(extension):
                raise UserError(f"{self.path}: key '{key}': '{extension}' is no member name (a-z, 0-9, '_')")
            data = members[extension]
            self._write(_header(f"{key}.{extension}", len(data)))
            entry = (self._position, len(data), zlib.crc32(data))
            self._members.setdefault(extension, [None] * self.num_samples).append(entry)
            self._write(data)
            self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        self._keys.append(key)
        self.num_samples += 1
        for entries in self._members.values():
            entries.extend([None] * (self.num_samples - len(entries)))

    def close(self) -> None:
        """Put the tar and its index in place, for good."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._position % tarfile.RECORDSIZE))
        self._file.close()
        io.publish_file(self.path)
        table = manifest.index_table(self.path.name, self._position, self._sha.hexdigest(), self._keys, self._members)
        write_table(table, self._index)

    def abandon(self) -> None:
        """Drop what was written."""
        self._file.close()
        self._temporary.unlink()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha.update(data)
        self._position += len(data)


def commit(folder: str | Path, info: dict[str, Any]) -> None:
    """Make the manifest from all indices: from now on the data set exists.

    Raises:
        UserError: there is no index, that is, no sample.
    """
    folder = Path(folder)
    table = manifest.manifest_table(folder, info)
    if not len(table):
        raise UserError(f"{folder}: no samples, so no data set was written")
    write_table(table, folder / manifest.NAME)


def write_table(table: pa.Table, path: Path) -> None:
    """Write a parquet file, whole or not at all."""
    with io.atomic(path) as temporary:
        pq.write_table(table, temporary)


def shard_name(number: int) -> str:
    """File name of shard `number`."""
    return f"shard-{number:06d}.tar"


def _clear(folder: Path) -> None:
    """Remove what an earlier writer left: the manifest first, so that a half-removed data set is never opened."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / manifest.NAME).unlink(missing_ok=True)
    shutil.rmtree(folder / manifest.INDEX, ignore_errors=True)
    for path in [*folder.glob("shard-??????.tar"), *folder.glob(".*.tmp")]:
        path.unlink()


def _header(name: str, size: int) -> bytes:
    """A tar header that depends on nothing but its arguments."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT)
