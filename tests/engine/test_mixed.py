"""16-bit matrices beside fp32 under DeepSpeed, with 2 processes at ZeRO 1 to 3; see mixed_checks.py."""

from __future__ import annotations

import pytest
from support import checks
from support.rank_checks import mixed_checks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return checks.outcomes(mixed_checks, 2, tmp_path_factory.mktemp("mixed"))


@pytest.mark.parametrize("zero", (1, 2, 3))
@pytest.mark.parametrize("check", checks.names(vars(mixed_checks)))
def test_mixed(results: dict[str, str], check: str, zero: int) -> None:
    assert results[f"{check}-{zero}"] == "ok", results[f"{check}-{zero}"]
