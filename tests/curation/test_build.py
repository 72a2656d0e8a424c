"""The engine: killed and resumed at random, with any number of processes, it gives the same bytes, and each row is
accounted for once."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.processes import ROOT, TESTS, environment, run_until
from support.sources import build, build_shards, content, image_file, write_files

from dalle_scale.curation import build as engine
from dalle_scale.curation import chunks, workers
from dalle_scale.curation.chunks import Recipe
from dalle_scale.curation.filters import Filters
from dalle_scale.curation.items import Options
from dalle_scale.data.manifest import Manifest
from dalle_scale.data.reader import Reader
from dalle_scale.types import UserError

ROWS = 90
OPTIONS = ["--size=16", "--valid-share=0.3", "--samples-per-shard=8", "--dedupe=near", "--min-side=20"]


def files(number: int) -> dict[str, bytes]:
    """One input row: mostly an image of its own; some repeat others, are small, damaged or have no caption."""
    data = image_file(number, height=48, width=40, kind="JPEG" if number % 2 else "PNG")
    if number % 11 == 3:  # the same pixels; the same bytes too where the kind is the same
        data = image_file(number - 3, height=48, width=40, kind="JPEG" if number % 4 > 1 else "PNG")
    if number % 13 == 4 or 32 <= number < 40:  # the latter are a whole chunk
        data = image_file(number, height=10)
    if number % 17 == 5:
        data = data[:300]
    caption = {} if number % 19 == 6 else {f"{number:03d}.txt": f"image {number}".encode()}
    return {f"{number:03d}.{'jpg' if number % 2 else 'png'}": data} | caption


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder of 90 rows, eight a chunk."""
    rows = {name: data for number in range(ROWS) for name, data in files(number).items()}
    return write_files(tmp_path_factory.mktemp("source") / "in", rows)


@pytest.fixture(scope="module")
def done(source, tmp_path_factory) -> dict[str, bytes]:
    """What an uninterrupted run with one worker writes."""
    out = tmp_path_factory.mktemp("done") / "out"
    build(source, "--out", out, *OPTIONS)
    return content(out)


def table(out: Path) -> list[dict]:
    paths = sorted((out / "rows").glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def test_each_row_is_kept_or_has_one_reason(source, tmp_path):
    out = tmp_path / "out"
    build(source, "--out", out, *OPTIONS)
    rows = table(out)
    assert [row["row"] for row in rows] == list(range(ROWS))
    kept = [row for row in rows if row["status"] == "kept"]
    seen = []
    for split in ("train", "valid"):
        manifest = Manifest.open(out / split)
        reader = Reader(manifest)
        keys = [manifest.key(sample) for sample in range(manifest.num_samples)]
        assert keys == sorted(keys) == [row["key"] for row in kept if row["split"] == split], "in the order of the rows"
        for sample, key in enumerate(keys):
            number = int(key.split("-")[0])
            assert reader.read(sample, "txt") == f"image {number}".encode()
            seen.append(number)
    assert sorted(seen) == [row["row"] for row in kept] and len(kept) > 40
    for number, row in enumerate(rows):
        data, *caption = files(number).values()
        status = row["status"].split(":")[0]
        if not caption:
            assert status == "no caption"
        elif number % 17 == 5 and data != image_file(number, height=10):
            assert status == "cannot decode"
        elif number % 13 == 4 or 32 <= number < 40:
            assert status == "too small" and row["sha256"] == hashlib.sha256(data).digest()
        elif status != "kept":
            same = data == next(iter(files(number - 3).values()))
            assert status == f"{'' if same else 'near '}duplicate of {number - 3}"
            assert row["key"] is row["split"] is None
        if row["sha256"] is not None:
            assert row["sha256"] == hashlib.sha256(data).digest()
        if status == "kept":
            assert (row["height"], row["width"], row["caption_characters"]) == (48, 40, len(caption[0]))
    lost = [row for row in rows if row["status"] != "kept"]
    ledger = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert ledger == [{"source": row["source"], "name": row["name"], "reason": row["status"]} for row in lost]
    report = json.loads((out / "report.json").read_text())
    assert report["rows"] == ROWS and report["kept"] == len(kept) == report["train"] + report["valid"]
    assert sum(report["left_out"].values()) == len(lost) and {"duplicate", "near duplicate"} < set(report["left_out"])
    assert not (out / "unfinished").exists()


@pytest.mark.parametrize("number", [2, 3])
def test_any_number_of_workers_writes_the_same_files(number, source, done, tmp_path):
    build(source, "--out", tmp_path / "out", *OPTIONS, workers=number)
    assert content(tmp_path / "out") == done


def arguments(source: Path, out: Path, number: int) -> list[str]:
    return [str(source), f"--out={out}", *OPTIONS, f"--workers={number}"]


@pytest.fixture(scope="module")
def killed():
    """killed(arguments, step=7) or (arguments, seconds=0.2): whether the program was killed before it ended."""
    line = [sys.executable, str(TESTS / "support" / "victims.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, env=environment(), **pipes) as server:

        def order(arguments: list[str], **when) -> bool:
            server.stdin.write(json.dumps({"arguments": arguments, **when}) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        yield order
        server.stdin.close()


def test_killed_again_and_again_it_writes_the_same_files(source, done, killed, tmp_path):
    """One worker, killed after random times, until it gets to the end."""
    rng, kills, patience_seconds = random.Random(0), 0, 0.01
    while killed(arguments(source, tmp_path / "out", 1), seconds=rng.uniform(0, patience_seconds)):
        kills += 1
        patience_seconds *= 1.15
    assert kills >= 3 and content(tmp_path / "out") == done


@pytest.mark.parametrize(
    "replaces, last_step, stride",
    [(False, 1000, 2), (True, 25, 2), pytest.param(False, 1000, 1, marks=pytest.mark.long)],
)
def test_killed_before_any_change_to_the_disk_it_writes_the_same_files(
    replaces, last_step, stride, killed, tmp_path, monkeypatch
):
    """Three chunks: the shard of one is moved, one has no sample, that of one is copied under another number without a
    duplicate. With `replaces`, over a finished data set, which is removed in the first steps."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # as victims.py has it
    pairs = [dict(zip(("x.png", "x.txt"), files(number).values(), strict=True)) for number in (1, 2, 32, 33, 0, 3)]
    rows = {f"{at}{name}": data for at, pair in enumerate(pairs) for name, data in pair.items()}
    folder = write_files(tmp_path / "in", rows)
    options = ["--samples-per-shard=2", "--dedupe=near", "--min-side=20", "--workers=1"]
    build_shards.main([str(folder), f"--out={tmp_path / 'done'}", *options])
    build_shards.main([str(folder), f"--out={tmp_path / 'old'}", "--size=4", "--workers=1"])
    done = content(tmp_path / "done")
    assert [row["status"][:4] for row in table(tmp_path / "done")] == ["kept", "kept", "too ", "too ", "kept", "near"]
    for step in range(1, last_step, stride):
        out = tmp_path / str(step)
        line = [str(folder), f"--out={out}", *options]
        if replaces:
            shutil.copytree(tmp_path / "old", out)
            line.append("--overwrite")
        was_killed = killed(line, step=step)
        if was_killed:
            try:
                build_shards.main(line)
            except UserError as error:  # in its last steps, which tidy up
                assert "already" in str(error)
        assert content(out) == done, f"killed before change {step}"
        shutil.rmtree(out)
        if not was_killed:
            break
    assert step > 60 or replaces


@pytest.mark.parametrize("number, folder, chunks_done", [(2, "unfinished/rows", 3), (3, "rows", 2)])
def test_killed_with_workers_it_writes_the_same_files(number, folder, chunks_done, source, done, tmp_path):
    """The whole program is killed in its first or its last pass; its workers then end by themselves."""
    out = tmp_path / "out"
    line = [sys.executable, str(ROOT / "data_tools" / "build_shards.py"), *arguments(source, out, number)]
    run_until(chunks_done, f"{out}/{folder}/*.parquet", line)
    assert chunks_done <= len(list((out / folder).glob("*.parquet"))) < 12
    build_shards.main(arguments(source, out, number))
    assert content(out) == done


@dataclass(frozen=True)
class KilledOnce:
    """Reads images; the first time that it comes to row 20, its process dies."""

    mark: Path

    def __call__(self, rows):
        for row, data in chunks.fetch(rows):
            if row.number == 20 and not self.mark.exists():
                self.mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield row, data


def run(source: Path, out: Path, recipe: Recipe, **options) -> list[dict]:
    engine.build(out, [source], Options(), recipe, **options)
    return table(out)


RECIPE = Recipe(size=16, filters=Filters(min_side=20), valid_share=0.3, samples_per_shard=8, dedupe="near")


def test_a_killed_worker_ends_the_run_in_one_line(source, done, tmp_path):
    fetch = KilledOnce(tmp_path / "mark")
    with pytest.raises(UserError, match="a worker process was killed"):
        run(source, tmp_path / "out", RECIPE, fetch=fetch, num_workers=2)
    run(source, tmp_path / "out", RECIPE, fetch=fetch, num_workers=2)
    assert content(tmp_path / "out") == done


class Fatal(bytes):
    """An image that ends the process whose decoder looks at it."""

    def startswith(self, *unused):
        os.kill(os.getpid(), signal.SIGSEGV)


def fetch_fatal(rows):
    for row, data in chunks.fetch(rows):
        yield row, Fatal(data) if row.number in (20, 21, 34) else data


def test_images_that_end_their_process_are_left_out(source, tmp_path, capsys):
    expected = run(source, tmp_path / "expected", replace(RECIPE, dedupe="none"))
    rows = run(source, tmp_path / "out", replace(RECIPE, dedupe="none"), fetch=fetch_fatal, num_workers=2)
    for number, row in enumerate(rows):
        if number in (20, 21, 34):
            assert row["status"] == "ended the process that decoded it: SIGSEGV" and row["key"] is None
        else:
            assert row == expected[number]
    assert "row 34 ends the process" in capsys.readouterr().out


def test_another_fetch_reads_ahead_and_gives_reasons(source, tmp_path):
    asked = []

    def fetch(rows):
        batch = list(rows)
        asked.extend(row.number for row in batch)
        for row in batch:
            yield row, "the server is asleep" if row.number % 7 == 1 else row.read()

    recipe = replace(RECIPE, filters=Filters(min_caption_characters=len("image 10")), dedupe="none")
    rows = run(source, tmp_path / "out", recipe, fetch=fetch)
    assert asked == [row["row"] for row in rows if row["row"] >= 10 and not row["status"].startswith("no caption")]
    assert all(rows[number]["status"] == "the server is asleep" for number in asked if number % 7 == 1)
    assert sum(row["status"] == "the server is asleep" for row in rows) == sum(number % 7 == 1 for number in asked)

    for name, wrong in {
        "turned": lambda rows: ((row, row.read()) for row in reversed(list(rows))),
        "twice": lambda rows: ((row, b"") for row in rows for _ in range(2)),
        "lossy": lambda rows: ((row, b"") for row in rows if row.number % 2),
    }.items():
        with pytest.raises(AssertionError):
            run(source, tmp_path / name, recipe, fetch=wrong)


def test_shards_are_numbered_without_gaps(tmp_path):
    names = {f"{number:02d}": image_file(number, height=4 if 4 <= number < 12 else 20) for number in range(20)}
    rows = {f"{name}.png": data for name, data in names.items()} | {f"{name}.txt": b"x" for name in names}
    out = tmp_path / "out"
    build(write_files(tmp_path / "in", rows), "--out", out, "--min-side=10", "--samples-per-shard=4")
    manifest = Manifest.open(out / "train")
    assert [shard.url for shard in manifest.shards] == [f"shard-{number:06d}.tar" for number in range(3)]
    kept = [number for number in range(20) if not 4 <= number < 12]
    reader = Reader(manifest)
    assert [reader.read(sample, "png") for sample in range(12)] == [image_file(number, height=20) for number in kept]


def test_nothing_left_is_one_line_and_the_reasons_are_there(tmp_path):
    folder = write_files(tmp_path / "in", {"a.png": b"\x89PNG\r\n\x1a\n", "a.txt": b"x"})
    for _ in range(2):
        with pytest.raises(UserError, match="no samples"):
            build(folder, "--out", tmp_path / "out")
        assert "cannot decode" in (tmp_path / "out" / "ledger.jsonl").read_text()


class Stop(Exception):
    pass


def interrupted(source: Path, out: Path, recipe: Recipe) -> None:
    """Work that ends in its second chunk."""

    def fetch(rows):
        for row, data in chunks.fetch(rows):
            if row.number == 10:
                raise Stop
            yield row, data

    with pytest.raises(Stop):
        run(source, out, recipe, fetch=fetch)


def test_unfinished_work_goes_on_with_the_same_plan_only(tmp_path):
    rows = {name: data for number in range(20) for name, data in files(number).items()}
    folder, out = write_files(tmp_path / "in", rows), tmp_path / "out"
    interrupted(folder, out, RECIPE)
    staged = out / "unfinished" / "rows" / "000000.parquet"
    time_ns = staged.stat().st_mtime_ns
    with pytest.raises(UserError, match=r"another size \(16, now 8\)"):
        run(folder, out, replace(RECIPE, size=8))
    with pytest.raises(UserError, match="another fetch"):
        run(folder, out, RECIPE, fetch_plan={"timeout_seconds": 3})
    os.utime(folder / "000.png", ns=(1, 1))
    with pytest.raises(UserError, match="another input"):
        run(folder, out, RECIPE)
    assert staged.stat().st_mtime_ns == time_ns, "nothing was touched"
    run(folder, out, RECIPE, overwrite=True)
    with pytest.raises(UserError, match="already"):
        run(folder, out, RECIPE)
    before = content(out)
    run(folder, tmp_path / "fresh", RECIPE)
    assert before == content(tmp_path / "fresh")
    with pytest.raises(UserError, match="not a source"):
        run(folder / "000.txt", out, RECIPE, overwrite=True)
    assert content(out) == before, "what is there stays until there is something to replace it by"


def test_resuming_does_not_repeat_finished_chunks(source, done, tmp_path):
    out, asked = tmp_path / "out", []
    interrupted(source, out, RECIPE)

    def fetch(rows):
        for row, data in chunks.fetch(rows):
            asked.append(row.number)
            yield row, data

    run(source, out, RECIPE, fetch=fetch)
    assert min(asked) == 8 and len(asked) == len(set(asked))
    assert content(out) == done


def test_one_run_at_a_time(source, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_PATIENCE_SECONDS", 0.1)
    with (
        workers.locked(tmp_path / "out" / "unfinished"),
        pytest.raises(UserError, match="another run is at work"),
    ):
        build(source, "--out", tmp_path / "out")


def test_out_may_not_lie_in_the_input(source):
    with pytest.raises(UserError, match="lies inside the source"):
        build(source, "--out", source / "shards")
