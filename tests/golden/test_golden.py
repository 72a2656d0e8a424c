"""Every tiny config trains to the losses of before, and a record tells where two differ.

losses.json is of one machine. Where another rounds otherwise, what is computed before the first step differs by
rounding alone. Later losses differ by what Adam makes of it, whose first steps turn the sign of a small gradient into
a whole step: on one processor by 7e-4 at most between SSE4.2 and AVX-512. Which code is the nearest may be up to
rounding too, so statistics of codes are left out, and stages over codes train on codes that no network has made.

To renew it after a change that should alter the mathematics:

    python tests/golden/test_golden.py tests/golden/losses.json
"""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import golden
import numpy as np
import pytest
from steps import STAGES, Step, data_steps, training

from dalle_scale.curation.shard_writer import ShardWriter
from dalle_scale.data import codes

LOSSES = Path(__file__).with_name("losses.json")
CODES = {"codes": (64, [8]), "vqvae2_codes": (32, [4, 8])}  # data set -> vocabulary, grids
STATISTICS = ("codes_used", "perplexity")


def losses(work: Path) -> dict[str, list[dict[str, float]]]:
    """What each tiny config logs, by step."""
    golden.run(work, [*data_steps(), *(alone(stage) for stage in STAGES)])
    for name, (vocab, grids) in CODES.items():
        for split, samples in (("train", 96), ("valid", 24)):
            write_codes(work / "runs/tiny" / name / split, samples, vocab, grids)
    golden.run(work, [alone("dalle"), alone("vqvae2_prior"), alone("vqvae2_prior", "runs/tiny/top", "model.level=0")])
    found = {}
    for path in sorted(work.glob("runs/tiny/*/metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found[path.parent.name] = [{key: row[key] for key in row if is_loss(key) or key == "step"} for row in rows]
    return found


def alone(stage: str, run: str = "", *overrides: str) -> Step:
    """A training without the launcher, which takes as long as all its steps."""
    return training(golden.ROOT, stage, run, *overrides, ranks=0)


def is_loss(key: str) -> bool:
    """Of what is logged."""
    return "/" in key and not any(part in key for part in STATISTICS)


def write_codes(folder: Path, samples: int, vocab: int, grids: list[int]) -> None:
    with ShardWriter(folder, samples_per_shard=64, info={"kind": "codes", "vocab": vocab, "grids": grids}) as writer:
        for index in range(samples):
            drawn = np.random.default_rng(index).integers(0, vocab, codes.count(grids))
            writer.add(f"{index:05d}", {"codes": codes.pack(drawn), "txt": f"a picture of {index} things".encode()})


def test_losses(tmp_path: Path) -> None:
    found, expected = losses(tmp_path / "work"), json.loads(LOSSES.read_text(encoding="utf-8"))
    assert found.keys() == expected.keys()
    for stage, rows in expected.items():
        assert [row.keys() for row in found[stage]] == [row.keys() for row in rows], stage
        for row, want in zip(found[stage], rows, strict=True):
            if stage == "vqgan" and want["step"] > 1:
                assert all(map(math.isfinite, row.values()))  # two nets that chase each other carry any jump further
                continue
            close = {"rel": 1e-4, "abs": 1e-6} if want["step"] == 1 else {"rel": 3e-3, "abs": 5e-4}
            assert row == pytest.approx(want, **close), f"{stage}, step {want['step']}"


RECORD: golden.Record = {
    "train_dvae": {"metrics.jsonl: 0.train/loss": 0.5, "export/model.safetensors: a.weight": "float32 [1] abc"},
    "evaluate_x": {"comparison.json: psnr_db": 20.0, "comparison.json: samples": 24},
}


def changed(step: str, name: str, value: golden.Value) -> golden.Record:
    record = copy.deepcopy(RECORD)
    record[step][name] = value
    return record


def test_equal_records() -> None:
    assert not list(golden.differences(RECORD, copy.deepcopy(RECORD), None, 0.0))


@pytest.mark.parametrize("name", list(RECORD["train_dvae"]))
def test_what_differs_is_named(name: str) -> None:
    for newer in (changed("train_dvae", name, 0.5 + 2**-53), changed("train_dvae", name, "float32 [1] abd")):
        [line] = golden.differences(RECORD, newer, None, 1.0)
        assert line.startswith(f"train_dvae: {name}: ")


def test_what_one_record_lacks_is_named() -> None:
    newer = changed("train_dvae", "new", 1.0)
    del newer["evaluate_x"]
    assert list(golden.differences(RECORD, newer, None, 0.0)) == [
        "train_dvae: new: only in the newer record",
        "evaluate_x: only in the older record",
    ]


def test_tolerances() -> None:
    close = changed("evaluate_x", "comparison.json: psnr_db", 20.0 * (1 + 5e-7))
    assert len(list(golden.differences(RECORD, close, None, 0.0))) == 1
    assert not list(golden.differences(RECORD, close, None, 1e-6))
    elsewhere = changed("train_dvae", "export/model.safetensors: a.weight", "float32 [1] abd")
    elsewhere["train_dvae"]["metrics.jsonl: 0.train/loss"] = 0.5001
    assert len(list(golden.differences(RECORD, elsewhere, 1e-5, 0.0))) == 1
    assert not list(golden.differences(RECORD, elsewhere, 1e-3, 0.0))


def test_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "renames.json").write_text(json.dumps({"train/": "training/", r"^evaluate_(.*)": r"\1_measured"}))
    monkeypatch.setattr(golden, "RENAMES", tmp_path / "renames.json")
    renamed = golden.renamed(RECORD)
    assert list(renamed) == ["train_dvae", "x_measured"] and "metrics.jsonl: 0.training/loss" in renamed["train_dvae"]


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        text = json.dumps(losses(Path(folder) / "work"), indent=1)
    Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")
