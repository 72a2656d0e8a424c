"""Engines at ZeRO 0 to 3 with 1 and 2 processes against plain PyTorch; see engine_checks.py."""

from __future__ import annotations

import pytest
from support import checks
from support.rank_checks import engine_checks


@pytest.fixture(scope="module", params=[1, 2], ids=["1_process", "2_processes"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return checks.outcomes(engine_checks, request.param, tmp_path_factory.mktemp("engine"))


@pytest.mark.parametrize("zero", checks.STAGES)
@pytest.mark.parametrize("check", checks.names(vars(engine_checks)))
def test_engine(results: dict[str, str], check: str, zero: int) -> None:
    assert results[f"{check}-{zero}"] == "ok", results[f"{check}-{zero}"]
