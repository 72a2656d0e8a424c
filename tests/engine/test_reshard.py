"""Checkpoints of 2 processes with 1 and 4 processes, from every ZeRO stage to every other; see reshard_checks.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import checks
from support.rank_checks import reshard_checks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what 2 processes have saved."""
    folder = tmp_path_factory.mktemp("reshard")
    outcomes = checks.outcomes(reshard_checks, reshard_checks.WRITERS, folder)
    assert set(outcomes.values()) == {"ok"}, outcomes
    return folder


@pytest.fixture(scope="module", params=[1, 4], ids=["1_process", "4_processes"])
def results(request: pytest.FixtureRequest, saved: Path) -> dict[str, str]:
    return checks.outcomes(reshard_checks, request.param, saved)


@pytest.mark.parametrize("zero", checks.STAGES)
@pytest.mark.parametrize("check", checks.names(vars(reshard_checks)))
def test_reshard(results: dict[str, str], check: str, zero: int) -> None:
    assert results[f"{check}-{zero}"] == "ok", results[f"{check}-{zero}"]
