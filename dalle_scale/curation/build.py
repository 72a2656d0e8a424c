"""Build a data set from sources, in any number of processes, stopped and resumed at will, always the same bytes.

    build(out, sources, options, recipe, num_workers=8)

The input rows are cut into chunks of consecutive rows. A chunk becomes at most one shard of `train` and one of `valid`,
whatever happens to all other chunks (chunks.py). Unfinished work lies in <out>/unfinished, with a plan that says what
it is about. A chunk that is done stays done: after kill -9 the same command does the others. In the end
    <out>/train, <out>/valid   the data sets
    <out>/rows/                what became of each input row, a table a chunk
    <out>/ledger.jsonl         the rows that were left out: source, name, reason
    <out>/report.json          counts, and how fast the last run was

A downloader is another `fetch` (see `chunks.Fetch`).
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dalle_scale import io, log
from dalle_scale.curation import chunks, dedupe, sources, workers
from dalle_scale.curation.chunks import KEPT, SPLITS, Duplicates, Fetch, Job, Recipe
from dalle_scale.curation.items import Options
from dalle_scale.curation.shard_writer import commit, write_table
from dalle_scale.data import manifest
from dalle_scale.types import UserError

_STAGE = "unfinished"
_PLAN = "plan.json"
_DUPLICATES = "duplicates.parquet"
FORMAT = 2  # changes when the same plan gives other files
_CODECS = ("simplejpeg", "pillow", "numpy", "pyarrow")  # other versions may give other bytes


def build(
    out: Path,
    paths: list[Path],
    options: Options,
    recipe: Recipe,
    num_workers: int = 1,
    overwrite: bool = False,
    fetch: Fetch = chunks.fetch,
    fetch_plan: dict[str, Any] | None = None,
) -> None:
    """Build, or continue building, the data set in `out`.

    Args:
        paths: the sources, as they are given on the command line.
        overwrite: replace a finished data set, or unfinished work on another one.
        fetch: what reads the images of a chunk.
        fetch_plan: what `fetch` depends on, as JSON has it; unfinished work continues under the same only.

    Raises:
        UserError: a source cannot be read; `out` holds something else; another run is at work; no sample is left.
    """
    started = time.monotonic()
    paths = sources.expand(paths)
    _check_outside(out, paths)
    stage = out / _STAGE
    if not stage.exists():
        _check_vacant(out, overwrite)
    with workers.locked(stage):
        try:
            _check_vacant(out, overwrite)
        except UserError:  # a run that finished, just now or killed while it was tidying up
            shutil.rmtree(stage)
            raise
        _take_stage(out, stage, _plan(paths, options, recipe, fetch_plan or {}), overwrite)
        try:
            opened = sources.Sources.open(paths, stage / "sources", options)
            if not opened.num_rows:
                raise UserError(f"{', '.join(map(str, paths))}: no rows, so no samples")
        except UserError:  # nothing was built yet, and the source has to change
            shutil.rmtree(stage)
            raise
        if not (stage / "rows").exists():
            _clear(out)
        job = Job(out, stage, opened, recipe, fetch)
        rows = _pass(partial(chunks.build_chunk, job), job, job.staged, "build", num_workers)
        known = _find_duplicates(job)
        _pass(partial(chunks.finish_chunk, job, known), job, job.finished, "finish", num_workers)
        _finish(job, rows, started)
        (stage / _PLAN).unlink()  # from here on it is finished
        shutil.rmtree(stage)


def _pass(task: workers.Task, job: Job, table: Callable[[int], Path], what: str, num_workers: int) -> int:
    """Do one of the two passes over all chunks that have no table yet. Returns the number of their rows."""
    left = [chunk for chunk in range(job.num_chunks) if not table(chunk).exists()]
    total = sum(len(job.rows(chunk)) for chunk in left)
    counts = workers.run(task, left, num_workers, job.stage)
    each = (None for count in counts for _ in repeat(None, count))
    try:
        for _ in log.progress(each, what, "rows", total=total):
            pass
    except workers.WorkerDied as died:
        if not _find_fatal(job, died.rows):
            raise
        _pass(task, job, table, what, num_workers)
    return total


def _find_fatal(job: Job, rows: list[int]) -> bool:
    """Note those of the rows that end the process that looks at them: they are left out from now on."""
    found = {row: how for row in rows if (how := workers.cause_of_failure(chunks.try_row, job, row))}
    io.write_json(job.fatal, {**job.fatal_rows(), **found})
    for row, how in found.items():
        log.say(f"row {row} ends the process that decodes it ({how}) and is left out")
    return bool(found)


# --- what the folder holds --------------------------------------------------------------------------------------------


def _plan(paths: list[Path], options: Options, recipe: Recipe, fetch_plan: dict[str, Any]) -> dict[str, Any]:
    """All that the result depends on."""
    plan = {
        "format": FORMAT,
        "sources": [sources.fingerprint(path) for path in paths],
        "options": asdict(options),
        "recipe": asdict(recipe),
        "fetch": fetch_plan,
        "versions": {name: version(name) for name in _CODECS},
    }
    result: dict[str, Any] = json.loads(json.dumps(plan, default=str))  # as it reads from a file
    return result


def _check_vacant(out: Path, overwrite: bool) -> None:
    """Raises UserError if `out` holds a finished data set that is not to be replaced."""
    finished = any((out / split / manifest.NAME).exists() for split in SPLITS)
    if finished and not overwrite and not (out / _STAGE / _PLAN).exists():
        raise UserError(f"{out}: holds a data set already; delete it, choose another folder or --overwrite it")


def _take_stage(out: Path, stage: Path, plan: dict[str, Any], overwrite: bool) -> None:
    """Make the staging folder hold work on this plan, old or new.

    Raises:
        UserError: it holds work on another one, and `overwrite` is not set.
    """
    path = stage / _PLAN
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        if there == plan:
            return
        if not overwrite:
            raise UserError(
                f"{out}: holds unfinished work with another {_difference(there, plan)}; "
                "repeat that command, choose another folder or --overwrite it"
            )
    path.unlink(missing_ok=True)
    for folder in [path for path in stage.iterdir() if path.is_dir()]:
        shutil.rmtree(folder)
    (stage / _DUPLICATES).unlink(missing_ok=True)
    io.write_json(path, plan)


def _clear(out: Path) -> None:
    """Remove the data set that was there: the manifests first, so that a half-removed one is never opened."""
    for split in SPLITS:
        (out / split / manifest.NAME).unlink(missing_ok=True)
    for folder in [*(out / split for split in SPLITS), out / "rows"]:
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("ledger.jsonl", "report.json"):
        (out / name).unlink(missing_ok=True)


def _difference(there: Any, plan: Any, name: str = "") -> str:
    """The first thing in which two plans differ."""
    if isinstance(there, dict) and isinstance(plan, dict) and there.keys() == plan.keys():
        for key in plan:
            if there[key] != plan[key]:
                return _difference(there[key], plan[key], key)
    if name == "sources":
        return "input: the sources are not the same, or have changed since"
    return f"{name} ({there}, now {plan})"


def _check_outside(out: Path, paths: list[Path]) -> None:
    """Raises UserError if the data set would become part of its own input."""
    for path in paths:
        if path.is_dir() and path.resolve() in [out.resolve(), *out.resolve().parents]:
            raise UserError(f"{out}: lies inside the source {path}; choose an --out outside of it")


# --- duplicates -------------------------------------------------------------------------------------------------------


def _find_duplicates(job: Job) -> Duplicates:
    """Find rows that repeat earlier ones, and so the chunks that still have samples. All chunks must be built."""
    path = job.stage / _DUPLICATES
    if job.recipe.dedupe != "none" and not path.exists():
        folder = job.stage / "dedupe"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        rows = job.sources.num_rows
        exact = dedupe.exact(_records(job, dedupe.EXACT, ()), rows, folder)
        near = exact[:0]
        if job.recipe.dedupe == "near":
            rest = _records(job, dedupe.NEAR, exact["row"])
            near = dedupe.near(rest, rows, job.recipe.near_bits, rows, folder)
        found = np.concatenate([exact, near])
        is_near = np.arange(len(found)) >= len(exact)
        order = np.argsort(found["row"])
        columns = {"row": found["row"][order], "of": found["of"][order], "near": is_near[order]}
        write_table(pa.table(columns), path)
    known = Duplicates({}, path if job.recipe.dedupe != "none" else None)
    for chunk in log.progress(range(job.num_chunks), "count", "chunks", total=job.num_chunks):
        gone = known.of(job.rows(chunk))
        table = pq.read_table(job.staged(chunk), columns=["row", "split"], use_threads=False)
        left = {split for row, split in zip(*table.to_pydict().values(), strict=True) if row not in gone}
        for split in SPLITS:
            known.numbers.setdefault(split, []).append(0 if split in left else -1)
    for numbers in known.numbers.values():
        following = iter(range(len(numbers)))
        numbers[:] = [next(following) if number == 0 else -1 for number in numbers]
    return known


def _records(job: Job, kind: np.dtype[Any], without: Any) -> Iterator[dedupe.Records]:
    """Records to compare, of all samples but the rows `without` (sorted)."""
    columns = ["row", "status", "sha256", "perceptual_hash"]
    for chunk in log.progress(range(job.num_chunks), "read rows", "chunks", total=job.num_chunks):
        table = pq.read_table(job.staged(chunk), columns=columns, use_threads=False)
        table = table.filter(pc.equal(table["status"], KEPT)).combine_chunks()
        block = np.empty(len(table), kind)
        block["row"] = table["row"].to_numpy()
        if kind == dedupe.NEAR:
            block["hash"] = table["perceptual_hash"].to_numpy()
        else:
            digests = b"".join(table["sha256"].to_pylist())
            block["sha"] = np.frombuffer(digests, "<u8").reshape(-1, 4)
        yield block[~np.isin(block["row"], without)]


# --- the end ----------------------------------------------------------------------------------------------------------


def _finish(job: Job, rows: int, started: float) -> None:
    """Write ledger, report and manifests, and print the result. `rows`: built by this run."""
    reasons: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    with io.atomic(job.out / "ledger.jsonl") as temporary, temporary.open("w", encoding="utf-8") as ledger:
        for chunk in log.progress(range(job.num_chunks), "account", "chunks", total=job.num_chunks):
            table = pq.read_table(job.finished(chunk), columns=["source", "name", "status", "split"], use_threads=False)
            good = pc.equal(table["status"], KEPT)
            kept.update(table.filter(good)["split"].to_pylist())
            for row in table.filter(pc.invert(good)).select(["source", "name", "status"]).to_pylist():
                reason = row.pop("status")
                reasons[re.split(r":| of \d", reason)[0]] += 1
                ledger.write(json.dumps({**row, "reason": reason}) + "\n")
    seconds = time.monotonic() - started
    report = {
        "rows": job.sources.num_rows,
        "kept": sum(kept.values()),
        **{split: kept[split] for split in SPLITS},
        "left_out": dict(sorted(reasons.items())),
        "last_run": {"rows": rows, "seconds": round(seconds, 3), "rows_per_second": round(rows / seconds, 3)},
    }
    io.write_json(job.out / "report.json", report)
    for reason, count in reasons.most_common():
        log.say(f"left out: {count:,} x {reason}")
    for split in SPLITS if job.recipe.valid_share else SPLITS[:1]:
        if not kept[split]:
            raise UserError(f"{job.out / split}: no samples; give other options with --overwrite, or other sources")
        commit(job.out / split, {"kind": "images", "size": job.recipe.size})
        log.say(f"{job.out / split}: {kept[split]:,} samples")
    log.say(
        f"{rows:,} rows in {seconds:,.1f} s: {rows / seconds:,.1f} rows/s; what became of each is in {job.out / 'rows'}"
    )
