"""launch/evaluate_clip.py on two ranks: the same files as on one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support.clips import save_clip, write_pairs, write_samples
from support.processes import ROOT, free_port, in_ranks
from support.programs import run_here, run_rank

PROGRAM = ROOT / "launch" / "evaluate_clip.py"


def test_two_ranks_write_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches do not divide the pairs, the texts or the samples; the samples' prompts are captions too."""
    write_pairs(tmp_path / "valid")
    write_samples(tmp_path / "samples", candidates=4)
    models = [save_clip(tmp_path / "a"), save_clip(tmp_path / "b", seed=1, loss="siglip")]
    (tmp_path / "templates.txt").write_text("{}\nan image: {}\n{} it is\n")

    def options(out: str) -> list[str]:
        line = ["--data", tmp_path / "valid", "--samples", tmp_path / "samples", "--out", tmp_path / out]
        clips = [word for model in models for word in ("--clip", model)]
        line += ["--batch-size", 3, "--templates", tmp_path / "templates.txt"]
        return [str(word) for word in (*clips, *line)]

    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", sys.argv)
    torch.set_num_threads(1)
    assert run_here(PROGRAM, *options("out1"))[0] == 0
    torch.set_num_threads(threads)
    in_ranks(run_rank, free_port(), PROGRAM, options("out2"))
    names = {path.relative_to(tmp_path / "out1") for path in (tmp_path / "out1").rglob("*") if path.is_file()}
    assert {"clip.json", "clip.md", "best_of.csv", "ledger.jsonl"} < {str(name) for name in names}
    for name in names - {Path("ledger.jsonl")}:  # whose lines come in the order of the ranks
        first, second = ((tmp_path / f"out{n}" / name).read_bytes() for n in (1, 2))
        assert first == second, name
    ledgers = (sorted((tmp_path / f"out{n}" / "ledger.jsonl").read_text().splitlines()) for n in (1, 2))
    assert len({len(lines) for lines in ledgers}) == 1
