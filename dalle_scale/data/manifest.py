"""What a folder of shards holds: `manifest.parquet`, the only way into the data.

One row a sample: `shard` (number), `key`, and for each member extension `<ext>.offset`, `<ext>.length` and
`<ext>.crc32` (null where the sample has no such member). Offsets are bytes from the start of the tar, so a sample is
read without looking at any tar header. The table's metadata holds one JSON document: the shards (file, size in bytes,
sha256, samples) and `info`, a free dictionary that says what the members are.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dalle_scale.types import UserError

NAME = "manifest.parquet"
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")  # members that hold an encoded picture
_FIELDS = {"offset": np.dtype("<i8"), "length": np.dtype("<i8"), "crc32": np.dtype("<u4")}
_METADATA = b"dalle_scale"


@dataclass(frozen=True)
class ShardFile:
    """One tar of the data set."""

    file: str
    size_bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class Member:
    """Where one member (`png`, `txt`, ...) of every sample lies: arrays [N]; offset -1 = the sample has none."""

    offset: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    crc32: npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Manifest:
    """The opened index of a data set of N samples."""

    folder: Path
    shards: tuple[ShardFile, ...]
    info: dict[str, Any]
    shard: npt.NDArray[np.int32]  # [N], index into `shards`
    keys: pa.ChunkedArray  # [N] strings
    members: dict[str, Member]
    digest: str  # sha256 (hex) of all of the above but `folder`

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.shard)

    @staticmethod
    def open(folder: str | Path) -> Manifest:
        """Read `folder/manifest.parquet` and check that every shard is there in its full size.

        Raises:
            UserError: no manifest, or a shard is missing or has another size.
        """
        folder = Path(folder)
        table, shards, info = _read(folder / NAME)
        for shard in shards:
            path = folder / shard.file
            if not path.is_file():
                raise UserError(f"{path}: this shard is missing; copy it back or build the shards again")
            if path.stat().st_size != shard.size_bytes:
                raise UserError(
                    f"{path}: this shard has {path.stat().st_size} bytes, the manifest says {shard.size_bytes}; "
                    "copy it again or build the shards again"
                )
        names = sorted(name.removesuffix(".offset") for name in table.column_names if name.endswith(".offset"))
        members = {
            name: Member(
                offset=_numbers(table, f"{name}.offset", absent=-1),
                length=_numbers(table, f"{name}.length", absent=0),
                crc32=_numbers(table, f"{name}.crc32", absent=0),
            )
            for name in names
        }
        shard_numbers = table["shard"].to_numpy()
        digest = _digest(shards, info, shard_numbers, table["key"], members)
        return Manifest(folder, shards, info, shard_numbers, table["key"], members, digest)

    @property
    def holds_images(self) -> bool:
        """Whether there are members that can be decoded to pictures."""
        return any(name in self.members for name in IMAGES)

    def shard_path(self, sample: int) -> Path:
        """The tar that one sample lies in."""
        return self.folder / self.shards[int(self.shard[sample])].file

    def key(self, sample: int) -> str:
        """The key of one sample."""
        return str(self.keys[sample].as_py())


def part(file: str, size_bytes: int, sha256: str, keys: list[str], members: dict[str, list[Any]]) -> pa.Table:
    """The rows of one finished shard, with the shard's facts as metadata.

    Args:
        members: for each extension a list as long as `keys` of (offset, length, crc32), or None where absent.
    """
    columns: dict[str, pa.Array] = {"key": pa.array(keys, pa.string())}
    for name, entries in sorted(members.items()):
        for index, (field, dtype) in enumerate(_FIELDS.items()):
            values = [None if entry is None else entry[index] for entry in entries]
            columns[f"{name}.{field}"] = pa.array(values, pa.from_numpy_dtype(dtype))
    facts = {"file": file, "size_bytes": size_bytes, "sha256": sha256, "samples": len(keys)}
    return pa.table(columns).replace_schema_metadata({_METADATA: json.dumps(facts).encode()})


def merge(parts: list[pa.Table], info: dict[str, Any]) -> pa.Table:
    """The manifest of the shards whose `part` tables are given, in that order."""
    shards = [json.loads(table.schema.metadata[_METADATA]) for table in parts]
    rows = [
        table.add_column(0, "shard", pa.array(np.full(len(table), number, np.int32)))
        for number, table in enumerate(parts)
    ]
    table = pa.concat_tables([row.replace_schema_metadata(None) for row in rows], promote_options="default")
    document = json.dumps({"shards": shards, "info": info}, sort_keys=True)
    return table.replace_schema_metadata({_METADATA: document.encode()})


def _read(path: Path) -> tuple[pa.Table, tuple[ShardFile, ...], dict[str, Any]]:
    """The table, shards and info of a manifest file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; a data set is a folder written by data_tools/build_shards.py")
    try:
        table = pq.read_table(path)
        document = json.loads(table.schema.metadata[_METADATA])
        return table, tuple(ShardFile(**shard) for shard in document["shards"]), document["info"]
    except (pa.ArrowException, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not a manifest of this program, or damaged; build the shards again") from None


def _numbers(table: pa.Table, column: str, absent: int) -> Any:
    """One column as a numpy array with `absent` in place of nulls."""
    return table[column].fill_null(absent).to_numpy()


def _digest(
    shards: tuple[ShardFile, ...],
    info: dict[str, Any],
    shard_numbers: npt.NDArray[np.int32],
    keys: pa.ChunkedArray,
    members: dict[str, Member],
) -> str:
    """sha256 of the manifest's content; does not depend on how parquet encodes it."""
    sha = hashlib.sha256(json.dumps([[vars(shard) for shard in shards], info], sort_keys=True).encode())
    sha.update(shard_numbers.astype("<i4").tobytes())
    for chunk in keys.chunks:
        sha.update("\n".join(chunk.to_pylist()).encode() + b"\n")
    for name, member in members.items():
        sha.update(name.encode())
        for field, dtype in _FIELDS.items():
            sha.update(getattr(member, field).astype(dtype).tobytes())
    return sha.hexdigest()
