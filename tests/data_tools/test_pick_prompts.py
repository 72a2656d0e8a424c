"""pick_prompts.py: distinct captions with their own images, the same on every run."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from support.programs import load_program
from support.sources import image_file

from dalle_scale.curation.shard_writer import ShardWriter
from dalle_scale.types import UserError

pick_prompts = load_program("pick_prompts")


@pytest.fixture
def shards(tmp_path):
    """30 images of 16 x 12 with ten captions; number 7 is damaged."""
    with ShardWriter(tmp_path / "shards") as writer:
        for index in range(30):
            data = b"\x89PNG\r\n\x1a\n and no more" if index == 7 else image_file(index)
            writer.add(f"{index:02d}", {"png": data, "txt": f"caption {index % 10}".encode()})
    return tmp_path / "shards"


def run(shards, out, *options: str) -> list[dict]:
    pick_prompts.main([f"--data={shards}", f"--out={out}", *options])
    return [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]


def test_captions_are_distinct_and_images_their_own(shards, tmp_path):
    rows = run(shards, tmp_path / "a", "--limit=64")
    assert sorted(row["prompt"] for row in rows) == [f"caption {index}" for index in range(10)]
    for row in rows:
        assert row["prompt"] == f"caption {int(row['key']) % 10}" and row["key"] != "07"
        written = np.asarray(Image.open(io.BytesIO(image_file(int(row["key"])))))
        assert np.array_equal(np.asarray(Image.open(tmp_path / "a" / row["truth"])), written)


def test_the_choice_repeats_and_follows_the_seed(shards, tmp_path):
    rows = run(shards, tmp_path / "a", "--limit=3", "--size=6")
    assert len(rows) == 3 and run(shards, tmp_path / "b", "--limit=3") == rows
    assert run(shards, tmp_path / "c", "--limit=3", "--seed=1") != rows
    sizes = [Image.open(tmp_path / folder / "truth" / "00000.png").size for folder in ("a", "b")]
    assert sizes == [(6, 6), (16, 12)]


def test_wrong_input_is_one_line(shards, tmp_path):
    with pytest.raises(UserError, match="at least 1"):
        run(shards, tmp_path / "a", "--limit=0")
    with ShardWriter(tmp_path / "codes") as writer:
        writer.add("a", {"codes": b"12"})
    with pytest.raises(UserError, match="need images and captions"):
        run(tmp_path / "codes", tmp_path / "a")
