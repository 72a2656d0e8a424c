"""Make a data set of webdataset tars that exist already, without rewriting them.

    python data_tools/index_shards.py SOURCE... --out runs/foreign [--workers 8] [--require jpg,txt]

A SOURCE is a tar, a folder of tars, a pattern ("set/*.tar"), a range (shard-{000..123}.tar), an http(s)://, s3:// or
gs:// address, or a .txt file with one of these a line. Each tar is read once, from its start to its end. Samples are
what webdataset makes of the names (the key goes up to the first dot of the file name, folders are part of it), but
only where there is no doubt:

    a key whose members do not stand side by side, or that comes twice in a tar, is left out; of a key that is in
        several tars the first is kept (--prefix-keys puts the tar's name before its keys)
    names with several dots (img_1.0.jpg, img_1.5.jpg) would become one sample: left out
    absolute names, names with "..", links and other special members: left out
    of a damaged tar the samples before the damage are kept, except the last, which may have lost members
        (with --require it is kept if it has those)

What is left out is, with its one reason, a line of <out>/ledger.jsonl. Writes <out>/index and <out>/manifest.parquet;
<out> may be the folder of the tars. The same bytes at any number of workers. Tars that were done before an
interruption are not read again if their size is still the same.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import posixpath
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dalle_scale.log  # noqa: F401 names the extra if pyarrow is missing  # isort: skip
import pyarrow as pa
import pyarrow.parquet as pq

from dalle_scale import io, log
from dalle_scale.arguments import Parser
from dalle_scale.curation.duplicate_keys import repeated
from dalle_scale.curation.shard_writer import commit, write_table
from dalle_scale.curation.webdataset_import import Row, Sample, finalize, scan, to_rows
from dalle_scale.data import manifest
from dalle_scale.data.cache import PROTOCOLS, FetchError, open_remote, remote_size, retry
from dalle_scale.data.processes import in_processes
from dalle_scale.types import UserError

KIND = "webdataset"  # in the manifest's info: tars that others wrote
PARTS = ".indexing"  # folder of what is done while not all is done
TAKEN = "another tar has this key"
TIMEOUT_SECONDS = 60.0
_LONGEST_RANGE = 10_000_000
_EXTENSION = re.compile(r"[a-z0-9_]{1,32}")


@dataclass(frozen=True)
class Options:
    """Options of samples. Part of the manifest's info."""

    prefix_keys: bool = False
    require: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One tar."""

    number: int
    source: str  # path or address
    url: str  # what the manifest calls it
    out: Path
    options: Options

    @property
    def part(self) -> Path:
        """Path of its index until all are done; further facts lie beside it, as .json."""
        return self.out / PARTS / f"{self.number:06d}.parquet"


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and index."""
    parser = Parser(__doc__)
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    parser.add_out()
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: one a core"
    )
    parser.add_argument("--require", default="", help="members without which a sample is left out, e.g. jpg,txt")
    parser.add_argument("--prefix-keys", action="store_true", help="for tars that number their samples each anew")
    parser.add_argument("--skip-unreadable", action="store_true", help="continue without tars that cannot be read")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the index that is there; tars are not touched"
    )
    args = parser.parse_args(arguments)
    require = tuple(sorted(filter(None, args.require.split(","))))
    if args.workers < 1 or not all(_EXTENSION.fullmatch(name) for name in require):
        raise UserError("--workers is at least 1; --require is a list of member names such as jpg,txt")
    options = Options(args.prefix_keys, require)
    sources = list(expand(args.sources, Path()))
    for source, count in Counter(sources).items():
        if count > 1:
            raise UserError(f"{source}: this tar comes twice in the list")
    out = Path(os.path.abspath(args.out))
    jobs = [Job(number, source, to_url(source, out), out, options) for number, source in enumerate(sources)]
    if prepare(out, jobs, args.overwrite):
        log.say(f"{args.out}: complete already")
        return
    with (out / PARTS / "lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another run is at work here; wait for it, or choose another folder") from None
        read_tars(jobs, args.workers, args.skip_unreadable)
        finish(out, jobs)


# --- which tars -------------------------------------------------------------------------------------------------------


def expand(sources: Iterable[str], base: Path, in_list: bool = False) -> Iterator[str]:
    """Sources as absolute paths and addresses of single tars; relative paths start at `base`."""
    for source in (text for pattern in sources for text in ranges(pattern)):
        protocol, colon, _ = source.partition(":")
        path = os.path.abspath(base / source)
        if "://" in source or (colon and protocol == "pipe"):
            if "://" not in source or protocol not in PROTOCOLS:
                allowed = ", ".join(f"{name}://" for name in PROTOCOLS)
                raise UserError(f"{source}: give a file, or an address that starts with {allowed}; no program is run")
            yield source
        elif os.path.isdir(path):
            yield from found(sorted(glob.glob(os.path.join(glob.escape(path), "*.tar"))), source)
        elif os.path.isfile(path) and path.endswith(".txt"):
            if in_list:
                raise UserError(f"{source}: a list in a list; name the tars")
            yield from expand(read_list(Path(path)), Path(path).parent, in_list=True)
        elif os.path.isfile(path):
            yield path
        else:
            yield from found(sorted(glob.glob(path)), source)


def read_list(path: Path) -> list[str]:
    """The lines of a file that are not empty."""
    try:
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a list of tars: {error}") from None


def found(paths: list[str], source: str) -> list[str]:
    """The paths, if there are any."""
    if not paths:
        raise UserError(f"{source}: no such file, or no tar there")
    return paths


def ranges(text: str) -> Iterator[str]:
    """`x-{08..11}` as x-08, x-09, x-10, x-11."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if match is None:
        yield text
        return
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < _LONGEST_RANGE:
        raise UserError(f"{text}: a range goes up, and has at most {_LONGEST_RANGE:,} numbers")
    for number in range(first, last + 1):
        yield from ranges(f"{text[: match.start()]}{number:0{len(match[1])}d}{text[match.end() :]}")


def to_url(source: str, out: Path) -> str:
    """Name of a tar in the manifest: relative to the data set's folder if it lies there, else as it is."""
    if "://" not in source and Path(source).is_relative_to(out):
        return Path(source).relative_to(out).as_posix()
    return source


def prepare(out: Path, jobs: list[Job], overwrite: bool) -> bool:
    """Make the folder ready; whether all is done already."""
    if overwrite:
        (out / manifest.NAME).unlink(missing_ok=True)
        for name in (manifest.INDEX, PARTS):
            shutil.rmtree(out / name, ignore_errors=True)
    if (out / manifest.NAME).exists():
        data = manifest.Manifest.open(out)
        with suppress(OSError, ValueError, KeyError):
            rows = [json.loads(line) for line in (out / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
            urls = {shard.url for shard in data.shards} | {row["shard"] for row in rows}
            if data.info == to_info(jobs[0].options) and urls == {job.url for job in jobs}:
                shutil.rmtree(out / PARTS, ignore_errors=True)
                return True
        raise UserError(f"{out}: holds another data set already; choose another folder, or replace it with --overwrite")
    if (out / manifest.INDEX).exists() and not (out / PARTS).exists():
        raise UserError(f"{out}: holds an unfinished data set of another program; choose another folder")
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    return False


def to_info(options: Options) -> dict[str, Any]:
    """The manifest's info."""
    return {"kind": KIND, "prefix_keys": options.prefix_keys, "require": list(options.require)}


# --- one tar ----------------------------------------------------------------------------------------------------------


def read_tars(jobs: list[Job], workers: int, skip_unreadable: bool) -> None:
    """Index every tar that is not done.

    Raises:
        UserError: some cannot be read, and that is not allowed.
    """
    outcomes = log.progress(in_processes(index_tar, jobs, workers), "index", "tars", total=len(jobs))
    failures = [(job, error) for job, error in zip(jobs, outcomes, strict=True) if error]
    if failures and not skip_unreadable:
        raise UserError(
            f"{len(failures)} of {len(jobs)} tars cannot be read, the first: {failures[0][1]}; run again to try these "
            "once more, or leave them out with --skip-unreadable"
        )
    for job, error in failures:
        write_part(job, 0, "", [], [{"shard": job.url, "key": None, "reason": f"cannot be read: {error}"}])


def index_tar(job: Job) -> str:
    """Read one tar and write its part, unless that is there. Returns why it cannot be read, or nothing."""
    try:
        if is_done(job):
            return ""
        size_bytes, sha256, samples, rows = retry(lambda: scan_source(job.source), job.source)
    except FetchError as error:
        return str(error)
    rows = [{"shard": job.url, **row} for row in rows]
    prefix = f"{posixpath.basename(job.url.partition('?')[0]).removesuffix('.tar')}/" if job.options.prefix_keys else ""
    kept = []
    for sample in finalize(samples, job.options.require):
        rows += [{"shard": job.url, **row} for row in to_rows(sample)]
        if not sample.reason:
            kept.append(Sample(prefix + sample.key, sample.members))
    write_part(job, size_bytes, sha256, kept, rows)
    return ""


def is_done(job: Job) -> bool:
    """Whether this very tar has been read, under the same options."""
    try:
        mark = json.loads(job.part.with_suffix(".json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    if mark["url"] != job.url or mark["options"] != json.loads(json.dumps(asdict(job.options))) or not mark["sha256"]:
        return False
    return retry(lambda: size_of(job.source), job.source) in (mark["size_bytes"], None)


def size_of(source: str) -> int | None:
    """Size of a tar in bytes, None where the server does not say."""
    if "://" not in source:
        return os.stat(source).st_size
    return remote_size(source, TIMEOUT_SECONDS)


def scan_source(source: str) -> tuple[int, str, list[Sample], list[Row]]:
    """`scan` of a path or address."""
    with open_remote(source, TIMEOUT_SECONDS) if "://" in source else open(source, "rb", buffering=1 << 20) as file:
        return scan(file)


# --- all tars ---------------------------------------------------------------------------------------------------------


def write_part(job: Job, size_bytes: int, sha256: str, samples: list[Sample], rows: list[Row]) -> None:
    """Put down what one tar holds; the .json comes last and says that all is there."""
    write_table(to_table(job.url, size_bytes, sha256, samples), job.part)
    facts = {"url": job.url, "size_bytes": size_bytes, "sha256": sha256, "options": asdict(job.options), "rows": rows}
    io.write(job.part.with_suffix(".json"), json.dumps(facts))


def to_table(url: str, size_bytes: int, sha256: str, samples: list[Sample]) -> pa.Table:
    """The index of one tar."""
    names = sorted({name for sample in samples for name in sample.members})
    members = {name: [sample.members.get(name) for sample in samples] for name in names}
    return manifest.index_table(url, size_bytes, sha256, [sample.key for sample in samples], members)


def from_table(table: pa.Table) -> list[Sample]:
    """The samples of an index."""
    samples = [Sample(key) for key in table["key"].to_pylist()]
    for name in (column.removesuffix(".offset") for column in table.column_names if column.endswith(".offset")):
        fields = (table[f"{name}.{part}"].to_pylist() for part in ("offset", "length", "crc32"))
        for sample, entry in zip(samples, zip(*fields, strict=True), strict=True):
            if entry[0] is not None:
                sample.members[name] = entry
    return samples


def finish(out: Path, jobs: list[Job]) -> None:
    """Leave out keys that an earlier tar has, number the tars that have samples, write index, ledger and manifest."""

    def read_keys(number: int) -> list[str]:
        keys: list[str] = pq.read_table(jobs[number].part, columns=["key"])["key"].to_pylist()
        return keys

    taken: dict[int, dict[int, int]] = {}  # number of a tar -> row -> tar that has its key
    for number, row, first in repeated([pq.read_metadata(job.part).num_rows for job in jobs], read_keys):
        taken.setdefault(number, {})[row] = first
    shutil.rmtree(out / manifest.INDEX, ignore_errors=True)
    (out / manifest.INDEX).mkdir()
    reasons: Counter[str] = Counter()
    num_shards = num_samples = 0
    with io.atomic(out / "ledger.jsonl") as temporary, temporary.open("w", encoding="utf-8") as ledger:
        for job in log.progress(jobs, "write", "tars"):
            facts = json.loads(job.part.with_suffix(".json").read_text(encoding="utf-8"))
            samples, rows = from_table(pq.read_table(job.part)), facts["rows"]
            for row, first in sorted(taken.get(job.number, {}).items()):
                reason = f"{TAKEN}: {jobs[first].url}"
                rows.append({"shard": job.url, "key": samples[row].key, "reason": reason})
            samples = [sample for row, sample in enumerate(samples) if row not in taken.get(job.number, {})]
            if samples:
                table = to_table(job.url, facts["size_bytes"], facts["sha256"], samples)
                write_table(table, manifest.index_path(out, num_shards))
                num_shards, num_samples = num_shards + 1, num_samples + len(samples)
            elif not rows:
                rows.append({"shard": job.url, "key": None, "reason": "no samples in this tar"})
            reasons.update(row["reason"].partition(":")[0] for row in rows)
            ledger.writelines(json.dumps(row) + "\n" for row in rows)
    commit(out, to_info(jobs[0].options))
    shutil.rmtree(out / PARTS)
    for reason, count in reasons.most_common():
        log.say(f"left out: {count:,} x {reason}")
    if reasons[TAKEN] > num_samples:
        log.say("do the tars number their samples each anew? Then index them with --prefix-keys")
    log.say(f"{out}: {num_samples:,} samples in {num_shards:,} of {len(jobs):,} tars")


if __name__ == "__main__":
    log.guarded(main)
