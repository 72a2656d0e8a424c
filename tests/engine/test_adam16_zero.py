"""AdamW16 below DeepSpeed at ZeRO 1 to 3 with 2 processes; see adam16_checks.py."""

from __future__ import annotations

import pytest
from support import checks
from support.rank_checks import adam16_checks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return checks.outcomes(adam16_checks, 2, tmp_path_factory.mktemp("adam16"))


@pytest.mark.parametrize("zero", (1, 2, 3))
@pytest.mark.parametrize("check", checks.names(vars(adam16_checks)))
def test_adam16(results: dict[str, str], check: str, zero: int) -> None:
    assert results[f"{check}-{zero}"] == "ok", results[f"{check}-{zero}"]
