"""The whole chain from nothing to an image, through the real launcher, at a size that takes a minute."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support.processes import HANG_SECONDS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished tiny demo, started outside the project's folder."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "demo.py", "--tiny"],
        cwd=folder,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("in a browser).")
    return folder / "runs" / "demo"


def test_report(finished):
    report = json.loads((finished / "report.json").read_text(), parse_constant=pytest.fail)
    for objects in ("one_object", "two_objects"):
        for split in ("seen", "held_out"):
            scores = report[objects][split]
            assert scores["captions"] == 4 and 0 <= scores["first"] <= 1 and 0 <= scores["best_of_16"] <= 1
    assert report["tokenizer"]["psnr_db"] > 20
    assert 0 < report["tokenizer"]["codes_used"] <= 1 < report["tokenizer"]["perplexity"]
    steps = {name: value for name, value in report["seconds"].items() if name != "total"}
    assert report["seconds"]["total"] == pytest.approx(sum(steps.values()), abs=0.5)
    assert {"shards", "dvae", "encode", "transformer", "clip", "sample", "rerank", "report"} <= set(steps)


def test_gallery(finished):
    assert Image.open(finished / "gallery.png").width > 500
    page = (finished / "gallery.html").read_text()
    assert "first candidate" in page and "http" not in page.split("<body")[1]


def test_candidates(finished):
    rows = [json.loads(line) for line in (finished / "samples" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 16 * 16
    assert all(Image.open(finished / "samples" / row["file"]).size == (32, 32) for row in rows)
    scores = [json.loads(line) for line in (finished / "reranked" / "scores.jsonl").read_text().splitlines()]
    for index in range(16):
        ranked = sorted((row for row in scores if row["prompt_index"] == index), key=lambda row: row["rank"])
        assert [row["rank"] for row in ranked] == list(range(1, 17))
        assert ranked[0]["score"] == max(row["score"] for row in ranked)


@pytest.mark.parametrize("stage", ["dvae", "dalle", "clip"])
def test_runs_leave_everything(finished, stage):
    run = finished / stage
    assert (run / "config.yaml").is_file() and (run / "export" / "config.yaml").is_file()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("valid/loss" in row for row in rows)
    assert list((run / "tensorboard").iterdir()) and list((run / "checkpoints").iterdir())
