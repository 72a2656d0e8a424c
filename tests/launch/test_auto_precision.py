"""`engine.dtype: auto` through the real launcher, on machines made up by the rates that they are said to have."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.autoencoder import Net
from support.processes import ROOT, TESTS, command, environment
from support.programs import run_here
from support.runs import metrics, toy_run, write_config

from dalle_scale import config as configs
from dalle_scale.checkpoint import resume
from dalle_scale.engine import precision as engine_precision
from dalle_scale.nn import precision
from dalle_scale.types import UserError

PROGRAM = ROOT / "launch" / "train.py"
pytestmark = pytest.mark.usefixtures("one_thread")


def machine(folder: Path, bf16: float) -> dict[str, str]:
    """The environment of a machine whose rate of bf16 is so many times that of fp32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(precision, "_rate", lambda layer, dtype, device: 100e9 * (1 if dtype == torch.float32 else bf16))
        patch.setattr(precision, "_probe", lambda dtype, device: 1.0)
        precision.matrix_rates([Net(8, 16)], torch.device("cpu"))
    return {**environment(), "XDG_CACHE_HOME": str(folder)}


def train(runs: list[list[Any]], folder: Path, where: dict[str, str]) -> str:
    """All of `runs` in one launch of two processes; what was printed."""
    (folder / "todo.json").write_text(json.dumps([[str(argument) for argument in run] for run in runs]))
    line = command(TESTS / "support" / "many_runs.py", str(folder / "todo.json"), processes=2)
    done = subprocess.run(line, env=where, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def test_a_run_keeps_what_auto_became(toy_data: dict[str, str], tmp_path: Path) -> None:
    """Begun where bf16 wins, it continues where fp32 would, as a run that never stopped; and the other way round."""
    config = write_config(tmp_path / "c.yaml", toy_run(toy_data, tmp_path / "x", engine={"zero": 1}))
    fast, slow = machine(tmp_path / "fast", 3.0), machine(tmp_path / "slow", 1.2)
    folders = {name: tmp_path / name for name in ("auto", "bf16", "fp32", "slow_auto")}
    auto, whole = [config, f"run={folders['auto']}"], [config, "engine.dtype=bf16", f"run={folders['bf16']}"]
    told = train([[*auto, "steps=4"], whole], tmp_path, fast)
    assert told.count("engine.dtype: auto is bf16 here: 300 GFLOP/s, fp32 100 (3.00 x)") == 1
    [checkpoint] = resume.committed(folders["auto"])
    assert checkpoint.config["engine"]["dtype"] == "bf16"
    text = (folders["auto"] / "config.yaml").read_text()
    assert text.startswith("# engine.dtype: auto is bf16 here") and yaml.safe_load(text)["engine"]["dtype"] == "bf16"

    other = [config, f"run={folders['slow_auto']}"], [config, "engine.dtype=fp32", f"run={folders['fp32']}"]
    told = train([[*auto, "steps=8"], *other], tmp_path, slow)
    assert "engine.dtype: auto stays bf16, as the run began; here it would be fp32: bf16 has 120 GFLOP/s" in told
    assert "engine.dtype: auto is fp32 here: bf16 has 120 GFLOP/s, fp32 100 (1.20 x)" in told
    for one, two in (("auto", "bf16"), ("slow_auto", "fp32")):
        assert metrics(folders[one]) == metrics(folders[two])
        got, want = (load_file(folders[name] / "export" / "model.safetensors") for name in (one, two))
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert metrics(folders["bf16"]) != metrics(folders["fp32"])

    code, printed = run_here(PROGRAM, *auto, "engine.dtype=fp32")
    assert code == 2 and "saved with engine.dtype='bf16', this run has 'fp32'" in printed


def test_needed_by_the_optimizer(toy_data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is measured; at ZeRO 0 it is refused as ever."""
    tree = toy_run(toy_data, tmp_path / "run", optim={"model": {"kind": "adamw16", "lr": 0.1}}, engine={"zero": 1})
    config = configs.load(write_config(tmp_path / "c.yaml", tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "matrix_rates", lambda nets, device: pytest.fail("measured"))
        found, note = engine_precision.resolve(config, {"model": Net(8, 16)})
    assert found.engine.dtype == "bf16" and "optim.model.kind: adamw16 needs" in note
    assert note in capsys.readouterr().out
    with pytest.raises(UserError, match=r"adamw16 is for engine\.dtype=auto"):
        engine_precision.resolve(configs.load(tmp_path / "c.yaml", ["engine.zero=0"]), {"model": Net(8, 16)})


def test_what_was_kept_is_checked(toy_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configs.load(write_config(tmp_path / "c.yaml", toy_run(toy_data, tmp_path / "run", engine={"zero": 1})))
    monkeypatch.setattr(precision, "choose", lambda nets, device: precision.Choice("bf16", "so"))
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        engine_precision.resolve(config, {}, kept="fp16")
    same, note = engine_precision.resolve(config, {}, kept="bf16")
    assert same.engine.dtype == "bf16" and note == "engine.dtype: auto stays bf16, as the run began"
    named = engine_precision.replaced(config, "fp32")
    assert engine_precision.resolve(named, {}) == (named, "")


def test_dry_run_and_plan(toy_data: dict[str, str], tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", toy_run(toy_data, tmp_path / "run", engine={}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "choose", lambda nets, device: precision.Choice("bf16", "so"))
        code, printed = run_here(PROGRAM, config, "--dry-run")
        assert code == 0 and "auto is bf16 here: so" in printed and "dtype: bf16" in printed
    sizes = ("--nodes=1", "--gpus=2", "--memory-gib=1", "--flops=1e12", "--intra-gbps=1", "--inter-gbps=1")
    code, printed = run_here(ROOT / "launch" / "plan.py", config, *sizes)
    assert code == 0 and "assumed: engine.dtype: auto becomes bf16" in printed
