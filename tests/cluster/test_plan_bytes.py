"""What the plan says goes over the wire is what two processes put there, within 1 %; see plan_bytes_checks.py."""

from __future__ import annotations

import pytest
from support import checks
from support.rank_checks import plan_bytes_checks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return checks.outcomes(plan_bytes_checks, 2, tmp_path_factory.mktemp("plan_bytes"))


@pytest.mark.parametrize("zero", checks.STAGES)
@pytest.mark.parametrize("check", checks.names(vars(plan_bytes_checks)))
def test_bytes(results: dict[str, str], check: str, zero: int) -> None:
    assert results[f"{check}-{zero}"] == "ok", results[f"{check}-{zero}"]
