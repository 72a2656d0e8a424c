"""download.py: every row of a list ends as a sample or as one reason; stopped and resumed, it writes the same bytes."""

import csv
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.processes import ROOT, run_until
from support.programs import load_program
from support.sources import content, image_file, ledger, samples
from support.web import Web

from dalle_scale.data.manifest import Manifest
from dalle_scale.data.reader import Reader
from dalle_scale.types import UserError

sys.path.append(str(ROOT / "data_tools"))  # where a program finds its neighbours when it is started
download = load_program("download")

BAD = {  # path -> reason
    "/status/404": "http 404", "/status/503": "http 503", "/reset": "connection reset", "/short": "cut off",
    "/empty": "empty body", "/bomb": "compressed in transfer: identity was asked for", "/hop/9": "redirects too often",
    "/headers/x?X-Robots-Tag=noai": "opted out: X-Robots-Tag says noai", "/ok/page": "unknown image format",
    "/ok/cut": "cannot decode", "/ok/small": "too small: 5 x 6", "/to/file%3A%2F%2F%2Fetc%2Fpasswd": "not http(s)",
    "/endless": "too large: more than 50000 bytes",
}  # fmt: skip
ELSEWHERE = {
    "file:///etc/passwd": "not http(s)", "/etc/passwd": "not http(s)", "": "no url",
    "http://u:p@h.test/": "credentials in url", "http://127.0.0.1:1/x.png": "connection refused",
}  # fmt: skip
OPTIONS = [
    "--allow-private", "--min-side=8", "--max-bytes=50000", "--retries=0", "--valid-share=0.3",
    "--samples-per-shard=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def web():
    with Web() as server:
        server.files = {f"{n}.png": image_file(n, kind="JPEG" if n % 2 else "PNG") for n in range(40)}
        server.files |= {"page": b"<html>", "cut": image_file(0)[:-30], "small": image_file(0, height=6, width=5)}
        yield server


@pytest.fixture(scope="module")
def rows(web) -> list[dict[str, str]]:
    """Good ones, with a bad one after every second."""
    bad = [web.url(path) for path in BAD] + list(ELSEWHERE)
    urls = []
    for number in range(40):
        urls.append(web.url(f"/ok/{number}.png", "127.0.0.2" if number % 3 else "127.0.0.1"))
        urls += bad[number // 2 : number // 2 + 1] if number % 2 else []
    return [{"url": url, "caption": f"row {at}: {url[-20:]}", "extra": at} for at, url in enumerate(urls)]


def write_list(rows: list[dict], path: Path) -> Path:
    """A list as a table of the kind that its name says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def run(*arguments) -> None:
    download.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def table(rows, tmp_path_factory) -> Path:
    return write_list(rows, tmp_path_factory.mktemp("list") / "list.parquet")


@pytest.fixture(scope="module")
def done(table, tmp_path_factory) -> dict[str, bytes]:
    """What an uninterrupted run with one worker writes."""
    out = tmp_path_factory.mktemp("done") / "out"
    run(table, "--out", out, *OPTIONS, "--workers=1")
    return content(out)


def accounts(out: Path) -> list[dict]:
    return [row for path in sorted((out / "rows").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def all_samples(out: Path) -> dict[str, tuple[bytes, str]]:
    return samples(out / "train") | samples(out / "valid")


def test_each_row_is_a_sample_or_has_one_reason(web, rows, table, tmp_path):
    out = tmp_path / "out"
    run(table, "--out", out, *OPTIONS, "--workers=1")
    reasons = {web.url(path): reason for path, reason in BAD.items()} | ELSEWHERE
    expected, lost = {}, {}
    for row in rows:
        if row["url"] in reasons:
            lost[row["url"]] = reasons[row["url"]]
        else:
            data = web.files[row["url"].split("/")[-1]]
            expected[row["caption"]] = (data, "png" if data.startswith(b"\x89PNG") else "jpg")
    assert all_samples(out) == expected and len(expected) == 40
    found = ledger(out)
    assert len(found) == len(BAD) + len(ELSEWHERE)
    # a row without a url is named by its number
    by_url = {name if name in lost else "": reason for name, reason in found.items()}
    assert by_url == {url: reason for url, reason in lost.items() if reason != "cannot decode"} | {
        web.url("/ok/cut"): found[web.url("/ok/cut")]
    }
    assert found[web.url("/ok/cut")].startswith("cannot decode")
    assert [row["row"] for row in accounts(out)] == list(range(len(rows)))
    report = json.loads((out / "report.json").read_text())
    assert report["rows"] == len(rows) == report["kept"] + sum(report["left_out"].values())
    assert {"http 404", "opted out", "too large"} <= set(report["left_out"])


def test_who_does_not_answer_is_given_up(web, tmp_path):
    table = write_list([{"url": web.url("/silent"), "caption": "nothing"}], tmp_path / "list.csv")
    with pytest.raises(UserError, match="no samples"):
        run(table, "--out", tmp_path / "out", "--allow-private", "--timeout-seconds=1", "--retries=0", "--workers=1")
    assert list(ledger(tmp_path / "out").values()) == ["timeout"]


def test_columns_that_are_kept_are_json_beside_the_caption(rows, tmp_path):
    scores = [0.5, float("nan"), None, -1.0, 2.0, 3.0, 4.0, 5.0]
    few = [rows[number] | {"score": score, "page": f"p{number}"} for number, score in enumerate(scores)]
    path = write_list(few, tmp_path / "list.parquet")
    options = ["--allow-private", "--retries=0", "--workers=1"]
    run(path, "--out", tmp_path / "out", *options, "--keep-column=score", "--keep-column=page")
    reader, found = Reader(Manifest.open(tmp_path / "out" / "train")), {}
    for sample in range(reader.manifest.num_samples):
        columns = json.loads(reader.read(sample, "json"), parse_constant=pytest.fail)
        found[reader.read(sample, "txt").decode()] = columns
    expected = {row["caption"]: {"score": row["score"], "page": row["page"]} for row in few}
    expected[few[1]["caption"]]["score"] = None
    assert len(found) == 6 and all(found[caption] == expected[caption] for caption in found)
    with pytest.raises(UserError, match=r"no column pages; it has .*; see --keep-column"):
        run(path, "--out", tmp_path / "other", *options, "--keep-column=pages")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_every_kind_of_list(kind, rows, tmp_path):
    few = [{"URL": row["url"], "TEXT": row["caption"], "similarity": 0.3} for row in rows[:8]]
    out = tmp_path / "out"
    run(write_list(few, tmp_path / f"list.{kind}"), "--out", out, "--allow-private", "--retries=0")
    kept = [row["caption"] for row, account in zip(rows, accounts(out), strict=False) if account["status"] == "kept"]
    assert set(samples(out / "train")) == set(kept) and len(kept) == 6
    named = ["--url-column=URL", "--caption-column=TEXT", "--allow-private", "--retries=0"]
    run(tmp_path / f"list.{kind}", "--out", tmp_path / "named", *named)
    assert content(tmp_path / "named") == content(out)


def program(table: Path, out: Path, workers: int) -> list[str]:
    path = str(ROOT / "data_tools" / "download.py")
    return [sys.executable, path, str(table), "--out", str(out), *OPTIONS, f"--workers={workers}"]


@pytest.mark.parametrize("workers, chunks_done", [(1, 3), (2, 4)])
def test_killed_and_resumed_it_writes_the_same_files(workers, chunks_done, table, done, tmp_path):
    out = tmp_path / "out"
    run_until(chunks_done, f"{out}/unfinished/rows/*.parquet", program(table, out, workers))
    assert len(list(out.glob("unfinished/rows/*.parquet"))) < 8
    run(table, "--out", out, *OPTIONS, f"--workers={workers}")
    assert content(out) == done


def test_what_may_change_between_two_runs(table, done, tmp_path, monkeypatch):
    """More patience and fewer connections finish what was begun; another policy needs another folder."""
    out = tmp_path / "out"

    def stop(*unused, **unused_too):
        raise KeyboardInterrupt

    monkeypatch.setattr("dalle_scale.curation.build._find_duplicates", stop)
    with pytest.raises(KeyboardInterrupt):
        run(table, "--out", out, *OPTIONS, "--workers=1")
    monkeypatch.undo()
    with pytest.raises(UserError, match="another heed_robots_tag"):
        run(table, "--out", out, *OPTIONS, "--ignore-robots-tag")
    run(table, "--out", out, *OPTIONS, "--timeout-seconds=50", "--connections=5", "--per-host=1", "--workers=1")
    assert content(out) == done


def test_what_failed_is_fetched_when_it_is_there(tmp_path):
    paths = [f"/{kind}/{n}.png" for n in range(6) for kind in ("ok", "after/1/503", "after-reset/2", "after/9/404")]
    options = ["--allow-private", "--retries=0", "--size=8", "--samples-per-shard=5", "--workers=1"]
    with Web() as web:
        web.files = {path.split("/", 2)[2]: image_file(seed) for seed, path in enumerate(paths)}
        rows = [{"url": web.url(path), "caption": path} for path in paths]
        table = write_list(rows, tmp_path / "list.csv")
        run(table, "--out", tmp_path / "first", *options)
        before, asked = content(tmp_path / "first"), len(web.visits)
        run(table, "--out", tmp_path / "second", *options, "--retry-failed", tmp_path / "first")
        again = {visit.path for visit in web.visits[asked:]}
    assert content(tmp_path / "first") == before
    first, second = (
        ["kept", "http 503", "connection reset", "http 404"],
        ["not retried: kept", "kept", "kept", "not retried: http 404"],
    )
    for name, expected in (("first", first), ("second", second)):
        assert [row["status"] for row in accounts(tmp_path / name)] == expected * 6
    assert again == {path for path in paths if path.startswith(("/after/1/", "/after-reset/"))}
    assert set(samples(tmp_path / "second" / "train")) == again
    manifests = [Manifest.open(tmp_path / name / "train") for name in ("first", "second")]
    keys = [manifest.key(sample) for manifest in manifests for sample in range(manifest.num_samples)]
    assert len(set(keys)) == len(keys) == 18, "both can be used together"


def test_the_network_inside_stays_closed(web, table, tmp_path):
    visits = len(web.visits)
    with pytest.raises(UserError, match="no samples"):
        run(table, "--out", tmp_path / "out", *OPTIONS[1:], "--workers=1")
    assert set(ledger(tmp_path / "out").values()) == {
        "private address", "not http(s)", "no url", "credentials in url"
    }  # fmt: skip
    assert len(web.visits) == visits


def test_what_filters_leave_out_is_not_fetched(web, rows, tmp_path):
    few = [row | {"punsafe": 0.9 if at % 2 else 0.1} for at, row in enumerate(rows[:2])]
    visits = len(web.visits)
    run(write_list(few, tmp_path / "list.jsonl"), "--out", tmp_path / "out", "--allow-private", "--max-nsfw=0.5")
    assert len(web.visits) - visits == 1 and list(ledger(tmp_path / "out").values()) == ["NSFW score: 0.9"]


def test_wrong_input_gets_one_line(rows, table, tmp_path):
    other = write_list([{"link": "x", "caption": "y"}], tmp_path / "other.csv")
    (tmp_path / "x.zip").write_bytes(b"PK")
    shifted = write_list(rows[1:], tmp_path / "shifted.parquet")
    run(write_list(rows[:2], tmp_path / "two.jsonl"), "--out", tmp_path / "two", "--allow-private")
    for arguments, message in [
        ([other], "no column url or URL; it has link, caption; see --url-column"),
        ([table, "--caption-column=alt"], "no column alt; it has url, caption, extra; see --caption-column"),
        ([tmp_path / "x.zip"], "not a list"),
        ([tmp_path / "gone.csv"], "cannot be read"),
        ([table, "--per-host=0"], "at least 1"),
        ([table, "--timeout-seconds=0"], "not above 0"),
        ([table, "--connections=1000000000", "--workers=1"], "ulimit"),
        ([table, f"--retry-failed={tmp_path / 'gone'}"], "no finished data set"),
        ([table, f"--retry-failed={tmp_path / 'out'}"], "no finished data set"),
        ([shifted, f"--retry-failed={tmp_path / 'two'}"], "not made of this list"),
        ([table, f"--retry-failed={tmp_path / 'two'}", f"--out={tmp_path / 'two'}", "--overwrite"], "its own folder"),
    ]:
        with pytest.raises(UserError, match=message):
            run("--out", tmp_path / "out", *arguments)
        assert not (tmp_path / "out" / "train").exists()
