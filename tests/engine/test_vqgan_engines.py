"""VQGAN's two nets at ZeRO 0 to 3 with 1 and 2 processes: see vqgan_checks.py; and resumed through the launcher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import checks
from support.processes import ROOT, TESTS
from support.rank_checks import vqgan_checks
from support.runs import metrics, write_config, write_images

NETS = ("model", "discriminator")


@pytest.fixture(scope="module", params=[1, 2], ids=["1_process", "2_processes"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return checks.outcomes(vqgan_checks, request.param, tmp_path_factory.mktemp("vqgan"))


@pytest.mark.parametrize("zero", checks.STAGES)
@pytest.mark.parametrize("check", checks.names(vars(vqgan_checks)))
def test_engines(results: dict[str, str], check: str, zero: int) -> None:
    assert results[f"{check}-{zero}"] == "ok", results[f"{check}-{zero}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `zero<n>` of the tiny config and `zero<n>_resumed`, which continued from their third step."""
    folder = tmp_path_factory.mktemp("vqgan_runs")
    for split, count in (("train", 30), ("valid", 13)):
        write_images(folder / "shards" / split, count, size=16, seed=count)
    tree = yaml.safe_load((ROOT / "configs/tiny/vqgan.yaml").read_text().replace("runs/tiny/", f"{folder}/"))
    tree["log"] = {"every": 1, "preview_every": 6, "valid_every": 3, "valid_samples": 13, "save_every": 3}
    config = write_config(folder / "vqgan.yaml", tree)
    todo = []
    for zero in checks.STAGES:
        name = f"zero{zero}"
        third = folder / name / "checkpoints" / "00000003"
        todo.append([str(config), f"engine.zero={zero}", f"run={folder / name}"])
        todo.append([str(config), f"engine.zero={zero}", f"run={folder / name}_resumed", "--resume", str(third)])
    (folder / "todo.json").write_text(json.dumps(todo))
    checks.launch(TESTS / "support" / "many_runs.py", folder / "todo.json", processes=2)
    return folder


@pytest.mark.parametrize("zero", checks.STAGES)
def test_resume_is_bit_exact(runs: Path, zero: int) -> None:
    """Both nets, lambda, LeCam's averages and the codebook; only the windows of usage start empty."""
    windows = {"train/codes_used", "train/perplexity", "train/psnr_db"}
    later = [line for line in metrics(runs / f"zero{zero}") if line["step"] > 3]
    assert later[0]["train/model/lambda"] > 0 and later[0]["train/discriminator/lecam"] > 0
    for line, reference in zip(metrics(runs / f"zero{zero}_resumed"), later, strict=True):
        assert {k: v for k, v in line.items() if k not in windows} == {
            k: v for k, v in reference.items() if k not in windows
        }
    for net in NETS:
        want, got = (load_file(runs / f"zero{zero}{end}" / "export" / f"{net}.safetensors") for end in ("", "_resumed"))
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
        assert not any("features" in name or "lpips" in name for name in want)


@pytest.mark.parametrize("zero", checks.STAGES)
def test_same_losses_at_every_zero_stage(runs: Path, zero: int) -> None:
    for line, reference in zip(metrics(runs / f"zero{zero}"), metrics(runs / "zero0"), strict=True):
        assert line == pytest.approx(reference, rel=1e-3, abs=1e-4)
