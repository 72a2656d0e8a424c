"""Every image of Pillow's own test set, many of them damaged, odd or hostile on purpose: no crash, no hang, and all
accounted for. PILLOW_TEST_IMAGES names a tar of them (Tests/images of python-pillow/Pillow)."""

import os
import tarfile
from pathlib import Path

import pytest
from support.programs import load_program

from dalle_scale.config import DataConfig
from dalle_scale.data.ledger import read
from dalle_scale.data.manifest import Manifest
from dalle_scale.data.pipeline import open_stream
from dalle_scale.types import BatchSpec

IMAGES = os.environ.get("PILLOW_TEST_IMAGES", "")


@pytest.mark.skipif(not Path(IMAGES).is_file(), reason="PILLOW_TEST_IMAGES names no tar of Pillow's test images")
def test_every_odd_image_is_kept_or_has_a_reason(tmp_path):
    with tarfile.open(IMAGES) as tar:
        files = [member.name for member in tar if member.isreg()]
    out = tmp_path / "set"
    load_program("build_shards").main([IMAGES, f"--out={out}", "--caption-template=a {folder}", "--workers=1"])
    manifest = Manifest.open(out / "train")
    left_out = [line for line in (out / "ledger.jsonl").read_text().splitlines() if line]
    assert manifest.num_samples > 100 and len(left_out) > 20
    assert manifest.num_samples + len(left_out) <= len(files), "names that no image has are not rows"
    sizes = {"global_batch_size": 32, "micro_batch_size": 32, "rank": 0, "world_size": 1}
    stream = open_stream(
        DataConfig(train=str(out / "train"), max_bad_share=1.0),
        str(out / "train"),
        BatchSpec(image_size=32, augment="dvae"),
        seed=0,
        train=True,
        ledger=tmp_path / "ledger.jsonl",
        **sizes,
    )
    delivered = sum(int((batch["id"] >= 0).sum()) for (batch,) in stream.batches(0, stream.batches_per_epoch))
    assert delivered + len(read(tmp_path / "ledger.jsonl")) == manifest.num_samples
