"""launch/evaluate.py on two ranks: the same files as on one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from support.exports import save, save_dvae, write_data
from support.priors import DALLE, save_prior, save_text
from support.processes import ROOT, free_port, in_ranks
from support.programs import run_here, run_rank

PROGRAM = ROOT / "launch" / "evaluate.py"


def test_two_ranks_write_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path / "valid")
    exports = [save_dvae(tmp_path / "dvae"), save(tmp_path / "bounds", "support.bounds")]
    parts = {"tokenizer": exports[0], "text_tokenizer": save_text(tmp_path)}
    prior = save_prior(tmp_path / "prior", "dalle", parts, image_vocab=64, grid=8, caption_dropout=0.1, **DALLE)

    def options(out: str) -> list[str]:
        line = [
            "--data",
            tmp_path / "valid",
            "--out",
            tmp_path / out,
            "--limit",
            43,
            "--batch-size",
            6,
            "--prior",
            prior,
        ]
        return [str(option) for option in (*line, *exports)]

    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", sys.argv)
    torch.set_num_threads(1)
    assert run_here(PROGRAM, *options("out1"))[0] == 0
    torch.set_num_threads(threads)
    in_ranks(run_rank, free_port(), PROGRAM, options("out2"))
    one, two = (json.loads((tmp_path / f"out{n}" / "comparison.json").read_text()) for n in (1, 2))
    assert one["exports"][0]["samples"] + one["exports"][0]["samples_lost"] == 43
    assert one["exports"][0] == two["exports"][0], "to the last bit"
    assert 0 < one["exports"][0]["prior_bits"] != one["exports"][0]["prior_bits_given_caption"] > 0
    assert one["protocol"] == two["protocol"]
    for name, value in one["exports"][1].items():  # the stage adds up on its own, rank by rank
        assert two["exports"][1][name] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value)
    for name in ("comparison.md", "comparison.html", "reconstructions_dvae.png"):
        first, second = ((tmp_path / f"out{n}" / name).read_bytes() for n in (1, 2))
        assert first == second, name
