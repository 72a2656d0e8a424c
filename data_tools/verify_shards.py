"""Read a whole data set and find every fault in it.

    python data_tools/verify_shards.py --data runs/data/train [--workers 8]

Every shard: is it there, with its size and sha256; do its tar headers say what the index says, so that other readers
see the same samples. Every sample: the crc32 of its members, whether its image decodes, whether its caption is UTF-8
and not empty, whether its codes are as many and as small as the manifest says, whether it lacks a member that training
reads. The whole set: keys that come twice, files that do not belong to it. Remote shards are fetched for it.

Writes <data>/verify.jsonl, one line a fault (fault, shard, key, reason), and <data>/verify.json, the counts. The exit
code is 0 for a sound data set, 3 if there are faults, 2 for wrong usage.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

import dalle_scale.log  # noqa: F401 names the extra if pyarrow is missing  # isort: skip
import pyarrow as pa
import pyarrow.parquet as pq

from dalle_scale import io, log
from dalle_scale.arguments import Parser
from dalle_scale.curation.duplicate_keys import repeated
from dalle_scale.curation.tar import Member, Tar, TarError
from dalle_scale.data import codes, ledger, manifest
from dalle_scale.data.cache import FetchError, ShardCache
from dalle_scale.data.decode import BadSample, decode
from dalle_scale.data.manifest import IMAGES, Index, Manifest, ShardFile, index_path
from dalle_scale.data.processes import in_processes
from dalle_scale.types import UserError

REPORT, FAULTS = "verify.json", "verify.jsonl"
_FOREIGN = "webdataset"  # kind of a set that index_shards.py made of tars of others
_DAMAGED_TABLE = (pa.ArrowException, OSError, KeyError, TypeError, ValueError)
_PIECE_BYTES = 1 << 22


@dataclass(frozen=True)
class Job:
    """One shard."""

    folder: Path
    number: int
    cache: ShardCache


@dataclass
class Faults:
    """Faults in one shard, or in the set."""

    shard: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    size_bytes: int = 0  # that were read

    def add(self, fault: str, reason: str, key: str | None = None) -> None:
        """One fault: its kind, in a few words that are counted, and what there is to say about it."""
        self.rows.append({"fault": fault, "shard": self.shard, "key": key, "reason": reason})


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, verify, report, exit with 3 if there are faults."""
    parser = Parser(__doc__)
    parser.add_data()
    parser.add_workers()
    args = parser.parse_args(arguments)
    if not (args.data / manifest.NAME).exists():
        raise UserError(f"{args.data}: no data set, there is no {manifest.NAME} in it")
    report = verify(args.data, args.workers)
    for fault, count in report["faults"].items():
        log.say(f"{count:,} x {fault}")
    verdict = "sound" if report["sound"] else f"faults, see {args.data / FAULTS}"
    log.say(f"{args.data}: {report['samples']:,} samples in {report['shards']:,} shards: {verdict}")
    if not report["sound"]:
        sys.exit(3)


def verify(folder: Path, workers: int) -> dict[str, Any]:
    """Find all faults; what is written to verify.json."""
    started = time.monotonic()
    counts: Counter[str] = Counter()
    size_bytes = 0
    facts: dict[str, Any] = {"digest": None, "shards": 0, "samples": 0}
    with io.atomic(folder / FAULTS) as temporary, temporary.open("w", encoding="utf-8") as file:
        for faults in find(folder, workers, facts):
            size_bytes += faults.size_bytes
            counts.update(row["fault"] for row in faults.rows)
            file.writelines(json.dumps(row) + "\n" for row in faults.rows)
    seconds = time.monotonic() - started
    report = {
        "sound": not counts,
        **facts,
        "faults": dict(counts.most_common()),
        "bytes": size_bytes,
        "seconds": round(seconds, 3),
        "samples_per_second": round(facts["samples"] / seconds, 1),
        "megabytes_per_second": round(size_bytes / seconds / 1e6, 1),
    }
    io.write_json(folder / REPORT, report)
    return report


def find(folder: Path, workers: int, facts: dict[str, Any]) -> Iterator[Faults]:
    """All faults, and what the manifest says of the set, into `facts`."""
    open_manifest.cache_clear()
    try:
        data = open_manifest(folder)
    except (UserError, *_DAMAGED_TABLE) as error:
        faults = Faults(manifest.NAME)
        faults.add("manifest damaged", " ".join(str(error).split()))
        yield faults
        return
    facts.update(digest=data.digest, shards=data.num_shards, samples=data.num_samples)
    yield check_folder(data)
    temporary = Path(tempfile.mkdtemp(prefix="dalle_scale_verify_"))
    try:
        cache = ShardCache(temporary, max(1, data.largest_shards_bytes(2 * workers)), attempts=3)
        jobs = [Job(folder, number, cache) for number in range(data.num_shards)]
        yield from log.progress(in_processes(check_shard, jobs, workers), "verify", "shards", total=len(jobs))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    yield check_keys(data)


@lru_cache(maxsize=1)
def open_manifest(folder: Path) -> Manifest:
    """The manifest, whatever is the matter with the shards."""
    return Manifest(folder, *manifest.read_table(folder / manifest.NAME))


# --- the set ----------------------------------------------------------------------------------------------------------


def check_folder(data: Manifest) -> Faults:
    """Files that do not belong to the data set."""
    faults = Faults(str(data.folder))
    known = {shard.url for shard in data.shards}
    if data.info.get("kind") == _FOREIGN:  # a tar of which nothing was kept
        known |= {str(row.get("shard")) for row in ledger.read(data.folder / "ledger.jsonl")}
    indices = {index_path(data.folder, number) for number in range(data.num_shards)}
    extra = [path for path in data.folder.glob("*.tar") if path.name not in known]
    extra += [path for path in (data.folder / manifest.INDEX).glob("*") if path not in indices]
    extra += [path for path in data.folder.glob(".*.tmp") if path.name != f".{FAULTS}.tmp"]
    for path in sorted(extra):
        faults.add("extra file", f"{path.relative_to(data.folder)} is not in the manifest")
    return faults


def check_keys(data: Manifest) -> Faults:
    """Keys that come more than once in the set."""
    faults = Faults("")

    @lru_cache(maxsize=1)
    def read_keys(shard: int) -> list[str]:
        try:
            return [
                str(key) for key in pq.read_table(index_path(data.folder, shard), columns=["key"])["key"].to_pylist()
            ]
        except _DAMAGED_TABLE:
            return []  # reported already

    for shard, row, first in repeated([len(data.samples(shard)) for shard in range(data.num_shards)], read_keys):
        faults.shard = data.shard(shard).url
        faults.add("key comes twice", f"shard {data.shard(first).url} has this key", read_keys(shard)[row])
    return faults


# --- one shard --------------------------------------------------------------------------------------------------------


def check_shard(job: Job) -> Faults:
    """All faults of one shard."""
    warnings.filterwarnings("ignore", module="PIL")  # what Pillow only warns of it decodes
    data = open_manifest(job.folder)
    shard = data.shard(job.number)
    faults = Faults(shard.url)
    path = locate(job, shard, faults)
    index = read_index(data, job.number, faults)
    if path is None:
        return faults
    try:
        is_same = check_file(path, shard, faults)
        if index is not None:
            check_headers(path, data, index, is_same, faults)
            check_samples(path, data, index, faults)
    except OSError as error:
        faults.add("shard cannot be read", str(error.strerror or error))
    return faults


def locate(job: Job, shard: ShardFile, faults: Faults) -> Path | None:
    """The shard as a file, fetched if it is remote."""
    if not shard.is_remote:
        path = job.folder / shard.url
        if path.is_file():
            return path
        faults.add("shard missing", "no such file")
        return None
    try:
        return job.cache.fetch(shard.url, shard.size_bytes, shard.sha256)
    except (FetchError, UserError) as error:
        faults.add("shard cannot be fetched", str(error))
        return None


def read_index(data: Manifest, number: int, faults: Faults) -> Index | None:
    """The index of a shard, if it is the one that the manifest was made with."""
    try:
        index = data.index(number)
        if len(index.keys) == len(data.samples(number)):
            return index
        reason = f"{len(index.keys)} samples, the manifest says {len(data.samples(number))}"
    except (UserError, *_DAMAGED_TABLE) as error:
        reason = " ".join(str(error).split())
    faults.add("index damaged", reason)
    return None


def check_file(path: Path, shard: ShardFile, faults: Faults) -> bool:
    """Size and digest of a shard; whether they are right."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            faults.size_bytes += len(piece)
    if faults.size_bytes != shard.size_bytes:
        faults.add("shard size", f"{faults.size_bytes} bytes instead of {shard.size_bytes}")
    elif digest.hexdigest() != shard.sha256:
        faults.add("shard digest", f"sha256 {digest.hexdigest()} instead of {shard.sha256}")
    else:
        return True
    return False


def check_headers(path: Path, data: Manifest, index: Index, is_same: bool, faults: Faults) -> None:
    """Whether a reader that goes by the tar's headers finds what the index says.

    What index_shards.py left out is no fault, nor is damage that it has met, as long as the tar is still the same.
    """
    foreign = data.info.get("kind") == _FOREIGN
    expected = {}  # offset -> row, extension, length
    for name, (offsets, lengths, _) in index.members.items():
        for row in np.flatnonzero(offsets >= 0).tolist():
            expected[int(offsets[row])] = (row, name, int(lengths[row]))
    keys = index.keys.to_pylist()
    try:
        with path.open("rb") as file:
            for member in Tar(file):
                if member.offset in expected:
                    row, name, length = expected.pop(member.offset)
                    key = keys[row].partition("/")[2] if foreign and data.info.get("prefix_keys") else keys[row]
                    if not says(member, f"{key}.{name}", length):
                        found = f"{member.kind} '{member.name}' of {member.size} bytes"
                        faults.add("header disagrees", f"{found} instead of '{name}' of {length} bytes", keys[row])
                elif not foreign and member.kind != "folder":
                    faults.add("header disagrees", f"{member.kind} '{member.name}' is not in the index")
    except TarError as error:
        if expected or not (foreign and is_same):
            faults.add("tar damaged", f"{error}; other readers lose {len(expected)} members after it")
        return
    for row, name, _ in expected.values():
        faults.add("header disagrees", f"there is no header for '{name}'", keys[row])


def says(member: Member, name: str, length: int) -> bool:
    """Whether a header describes a member of the index; extensions are in lower case there."""
    stem, dot, extension = member.name.rpartition(".")
    return member.kind == "file" and member.size == length and f"{stem}{dot}{extension.lower()}" == name


def check_samples(path: Path, data: Manifest, index: Index, faults: Faults) -> None:
    """Bytes and content of every sample."""
    size_bytes = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        for row, key in enumerate(index.keys.to_pylist()):
            held = set()
            for name in index.members:
                entry = index.entry(row, name)
                if entry is None:
                    continue
                held.add(name)
                if entry.offset + entry.length > size_bytes:
                    faults.add("member cut off", f"'{name}' goes beyond the end of the shard", key)
                    continue
                content = os.pread(file.fileno(), entry.length, entry.offset)
                if zlib.crc32(content) != entry.crc32:
                    faults.add("member checksum", f"checksum of '{name}' is wrong", key)
                    continue
                check_content(name, content, data.info, key, faults)
            check_members(held, data, key, faults)


def check_content(name: str, content: bytes, info: dict[str, Any], key: str, faults: Faults) -> None:
    """Whether a member is what its extension says."""
    try:
        if name in IMAGES:
            decode(content)
        elif name == "txt" and not content.decode().strip():
            faults.add("caption empty", "the caption is empty", key)
        elif name == codes.MEMBER:
            codes.unpack(content, codes.count(info["grids"]), int(info["vocab"]))
    except UnicodeDecodeError:
        faults.add("caption not UTF-8", "the caption is not UTF-8", key)
    except BadSample as error:
        faults.add("image" if name in IMAGES else "codes", f"'{name}': {error}", key)
    except (KeyError, TypeError, ValueError):
        faults.add("codes", "the manifest does not say how many codes there are, and of which vocabulary", key)


def check_members(held: set[str], data: Manifest, key: str, faults: Faults) -> None:
    """Whether a sample lacks something that training reads in this set."""
    if data.holds_images and not held & set(IMAGES):
        faults.add("member missing", "no image", key)
    for name in ("txt", codes.MEMBER):
        if name in data.members and name not in held:
            faults.add("member missing", f"no '{name}'", key)


if __name__ == "__main__":
    log.guarded(main)
