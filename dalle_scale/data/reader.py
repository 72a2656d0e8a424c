"""Bytes of single samples, by the manifest's offsets, with length and checksum verified."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from io import FileIO
from typing import TypeVar

from dalle_scale.data.manifest import IMAGES, Manifest

_OPEN_FILES = 128
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class BadSample(Exception):
    """Why one sample cannot be used. It keeps its slot with weight 0 and becomes a row of the ledger."""


class Reader:
    """Random access to the members of a data set; keeps the files it used last open."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._files: OrderedDict[int, FileIO] = OrderedDict()
        self._images = [name for name in IMAGES if name in manifest.members]

    def read(self, sample: int, name: str) -> bytes:
        """The member `name` of sample number `sample`.

        Raises:
            BadSample: the sample has no such member, or its bytes are not those that were written.
        """
        shard, row = self._manifest.locate(sample)
        return self._read(shard, row, name)

    def read_image(self, sample: int) -> bytes:
        """The encoded picture, whatever its extension. Raises BadSample as `read`."""
        shard, row = self._manifest.locate(sample)
        index = self._manifest.index(shard)
        name = next((name for name in self._images if index.entry(row, name) is not None), None)
        if name is None:
            raise BadSample("no image")
        return self._read(shard, row, name)

    def _read(self, shard: int, row: int, name: str) -> bytes:
        entry = self._manifest.index(shard).entry(row, name)
        if entry is None:
            raise BadSample(f"no member '{name}'")
        try:
            data = os.pread(self._descriptor(shard), entry.length, entry.offset)
        except OSError as error:
            raise BadSample(f"cannot read '{name}': {error.strerror}") from None
        if len(data) != entry.length:
            raise BadSample(f"'{name}' ends after {len(data)} of {entry.length} bytes")
        if zlib.crc32(data) != entry.crc32:
            raise BadSample(f"checksum of '{name}' is wrong")
        return data

    def close(self) -> None:
        """Close all files; they open again when they are needed."""
        while self._files:
            self._files.popitem()[1].close()

    def _descriptor(self, shard: int) -> int:
        """The open file of a shard; the one that was not used for longest makes room."""
        file = self._files.get(shard)
        if file is None:
            if len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            file = self._files[shard] = FileIO(self._manifest.folder / self._manifest.shard(shard).url)
        self._files.move_to_end(shard)
        return file.fileno()


def ahead(pool: Executor, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """`function` of each item in turn, computed in `pool` one item ahead of what was asked for."""
    pending = None
    for item in items:
        following = pool.submit(function, item)
        if pending is not None:
            yield pending.result()
        pending = following
    if pending is not None:
        yield pending.result()
