"""launch/fidelity.py on two ranks: the same files as on one, to the last bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.exports import write_data
from support.processes import ROOT, free_port, in_ranks
from support.programs import run_here, run_rank
from support.sampled import blobs, save_clip, save_samples

PROGRAM = ROOT / "launch" / "fidelity.py"


def test_two_ranks_write_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """43 places in batches of 6 and 30 of samples: the last batches are not full, and on two ranks one is empty."""
    write_data(tmp_path / "valid")
    clip = save_clip(tmp_path / "clip")
    save_samples(tmp_path / "samples", blobs(30, 20))

    def options(out: str) -> list[str]:
        line = ["--samples", tmp_path / "samples", "--reference", tmp_path / "valid", "--clip", clip]
        line += ["--limit-reference", 43, "--batch-size", 6, "--subset", 20, "--out", tmp_path / out]
        return [str(option) for option in [*line, "--save-reference", tmp_path / out / "reference.safetensors"]]

    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", sys.argv)
    torch.set_num_threads(1)
    assert run_here(PROGRAM, *options("out1"))[0] == 0
    torch.set_num_threads(threads)
    in_ranks(run_rank, free_port(), PROGRAM, options("out2"))
    one, two = tmp_path / "out1", tmp_path / "out2"
    document = json.loads((one / "fidelity.json").read_text())
    reference = document["reference"]
    assert reference["samples"] + reference["samples_lost"] == 43 and document["samples"]["samples"] == 30
    for name in ("fidelity.json", "fidelity.md"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    first, second = (load_file(folder / "reference.safetensors") for folder in (one, two))
    assert first["covariance"].dtype == torch.float64 and len(first["features"]) == reference["samples"]
    assert all(torch.equal(first[name], second[name]) for name in first), "statistics too"
