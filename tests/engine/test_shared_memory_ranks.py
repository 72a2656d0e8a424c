"""Collectives of real ranks through shared memory: see shared_memory_checks.py."""

from __future__ import annotations

import pytest
from support import checks
from support.rank_checks import shared_memory_checks


@pytest.fixture(scope="module", params=[2, 3], ids=["2_processes", "3_processes"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return checks.outcomes(shared_memory_checks, request.param, tmp_path_factory.mktemp("shared_memory"))


@pytest.mark.parametrize("zero", checks.STAGES)
@pytest.mark.parametrize("check", checks.names(vars(shared_memory_checks)))
def test_shared_memory(results: dict[str, str], check: str, zero: int) -> None:
    assert results[f"{check}-{zero}"] == "ok", results[f"{check}-{zero}"]
