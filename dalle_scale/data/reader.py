"""Bytes of single samples, by the manifest's offsets, with length and checksum verified."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from io import FileIO
from typing import NamedTuple, TypeVar

from isal import isal_zlib

from dalle_scale.data.cache import FetchError, ShardCache
from dalle_scale.data.decode import BadSample
from dalle_scale.data.manifest import IMAGES, Entry, Manifest, ShardFile
from dalle_scale.types import UserError

_OPEN_FILES = 128
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Span(NamedTuple):
    """Position of the bytes of one member. `read` may be called from any thread."""

    file: FileIO
    name: str
    entry: Entry

    def read(self) -> bytes:
        """The bytes.

        Raises:
            BadSample: they are not those that were written.
        """
        _, length, crc32 = self.entry
        try:
            data = os.pread(self.file.fileno(), length, self.entry.offset)
        except OSError as error:
            raise BadSample(f"cannot read '{self.name}': {error.strerror}") from None
        if len(data) != length:
            raise BadSample(f"'{self.name}' ends after {len(data)} of {length} bytes")
        if isal_zlib.crc32(data) != crc32:  # three times as fast as zlib's
            raise BadSample(f"checksum of '{self.name}' is wrong")
        return data


class Reader:
    """Random access to the members of a data set; keeps the files it used last open."""

    def __init__(self, manifest: Manifest, cache: ShardCache | None = None) -> None:
        """cache: where remote shards are fetched to."""
        self.manifest = manifest
        self._cache = cache
        self._files: OrderedDict[int, FileIO] = OrderedDict()
        self._images = [name for name in IMAGES if name in manifest.members]

    def span(self, sample: int, name: str) -> Span:
        """Position of the member `name` of sample number `sample`.

        Raises:
            BadSample: the sample has no such member, or its shard cannot be opened.
        """
        return self._span(sample, (name,), f"no member '{name}'")

    def image_span(self, sample: int) -> Span:
        """Position of the encoded image, whatever its extension. Raises BadSample as `span`."""
        return self._span(sample, self._images, "no image")

    def read(self, sample: int, name: str) -> bytes:
        """The member `name` of sample number `sample`. Raises BadSample as `span` and `Span.read`."""
        return self.span(sample, name).read()

    def read_image(self, sample: int) -> bytes:
        """The encoded image, whatever its extension. Raises BadSample as `read`."""
        return self.image_span(sample).read()

    def _span(self, sample: int, names: Iterable[str], reason: str) -> Span:
        shard, row = self.manifest.locate(sample)
        index = self.manifest.index(shard)
        for name in names:
            if (entry := index.entry(row, name)) is not None:
                try:
                    return Span(self._file(shard), name, entry)
                except OSError as error:
                    raise BadSample(f"cannot read '{name}': {error.strerror}") from None
        raise BadSample(reason)

    def close(self) -> None:
        """Close all files; they open again when they are needed. Spans end with them."""
        while self._files:
            self._files.popitem()[1].close()

    def _file(self, shard: int) -> FileIO:
        """The open file of a shard; the one that was not used for longest is let go (and closes with its last span).

        Raises:
            UserError: a remote shard cannot be fetched. Not a reason to continue without its samples: the address or
            the
                network can be fixed, and the same run resumed.
        """
        file = self._files.get(shard)
        if file is None:
            if len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)
            file = self._files[shard] = self._open(self.manifest.shard(shard))
        self._files.move_to_end(shard)
        return file

    def _open(self, shard: ShardFile) -> FileIO:
        if not shard.is_remote:
            return FileIO(self.manifest.folder / shard.url)
        assert self._cache is not None, "open_stream refuses remote shards without a cache"
        try:
            return self._cache.open(shard.url, shard.size_bytes, shard.sha256)
        except FetchError as error:
            raise UserError(f"cannot fetch a shard: {error}; the same command continues") from None


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
