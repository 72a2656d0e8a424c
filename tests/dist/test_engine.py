"""Engines at ZeRO 0 to 3 with 1 and 2 processes against plain PyTorch; see engine_checks.py."""

from __future__ import annotations

import json
from pathlib import Path

import engine_checks
import pytest
from conftest import TESTS, command, environment

CHECKS = [name.removeprefix("check_") for name in vars(engine_checks) if name.startswith("check_")]


@pytest.fixture(scope="module", params=[1, 2], ids=["1_process", "2_processes"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Outcome of every check, the worst of all ranks."""
    import subprocess

    out: Path = tmp_path_factory.mktemp("engine") / "results.json"
    line = command(TESTS / "dist" / "engine_checks.py", str(out), processes=request.param)
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    by_rank = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(request.param)]
    return {name: max((rank[name] for rank in by_rank), key=len) for name in by_rank[0]}


@pytest.mark.parametrize("zero", engine_checks.STAGES)
@pytest.mark.parametrize("check", CHECKS)
def test_engine(results: dict[str, str], check: str, zero: int) -> None:
    assert results[f"{check}-{zero}"] == "ok", results[f"{check}-{zero}"]
