"""Sampling on two ranks: the same folder as from one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from support.exports import save
from support.processes import ROOT, free_port, in_ranks
from support.programs import run_here, run_rank

PROGRAM = ROOT / "launch" / "sample.py"


@pytest.mark.parametrize("candidates", [7, 1])
def test_same_images_on_two_ranks(candidates: int, tmp_path: Path) -> None:
    """Also where there is nothing left to sample for the second rank."""
    model = save(tmp_path / "vae", "vae", **yaml.safe_load((ROOT / "configs/tiny/vae.yaml").read_text())["model"])

    def options(out: str) -> list[str]:
        return [f"--model={model}", f"--candidates={candidates}", "--batch-size=3", f"--out={tmp_path / out}"]

    code, printed = run_here(PROGRAM, *options("one"))
    assert code == 0, printed
    in_ranks(run_rank, free_port(), PROGRAM, options("two"))
    one, two = tmp_path / "one", tmp_path / "two"
    files = sorted(path.relative_to(one) for path in one.rglob("*.*"))
    assert len(files) == candidates + 3 and files == sorted(path.relative_to(two) for path in two.rglob("*.*"))
    for file in files:
        if file.suffix == ".png":
            first, second = (np.asarray(Image.open(folder / file)).astype(int) for folder in (one, two))
            assert np.abs(first - second).max() <= 1  # convolutions of other batches round differently
        else:
            assert (one / file).read_bytes() == (two / file).read_bytes()
    rows = [json.loads(line) for line in (two / "samples.jsonl").read_text().splitlines()]
    assert [row["candidate"] for row in rows] == list(range(candidates))
