"""The fused update of AdamW16: interpreted on a CPU the bits of the plain form, compiled only operations that round."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.processes import HANG_SECONDS, environment
from support.rank_checks import adam16_kernel_checks

PROGRAM = Path(adam16_kernel_checks.__file__)
# Every operation of PTX on fp32 whose result is not exact; each rounds to nearest, keeps subnormal numbers, and `.rn`
# forbids ptxas to join it with another
ROUNDING = {f"{name}.rn.f32" for name in ("add", "sub", "mul", "div", "sqrt")}
EXACT = ("ld", "st", "mov", "selp.f32", "setp")


def outcomes(what: str, folder: Path, **variables: str) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, str(PROGRAM), what],
        env=environment() | {"TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": "0"} | variables,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return outcomes("bits", tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def assembly(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return outcomes("assembly", tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("name", [*map("-".join, adam16_kernel_checks.COMBINATIONS), "far"])
def test_the_bits_of_the_plain_form(differences: dict[str, str], name: str) -> None:
    assert differences[name] == ""


def operations(ptx: str) -> set[str]:
    """Instructions that are not exact, of all that name a type of floating point."""
    found = set(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z]\w*(?:\.\w+)*)\s", ptx, re.MULTILINE))
    return {one for one in found if re.search(r"\.b?f\d", one) and not one.startswith(EXACT)}


@pytest.mark.parametrize("name", adam16_kernel_checks.VARIANTS)
def test_compiled_it_has_only_operations_that_round_as_ieee_754_says(assembly: dict[str, str], name: str) -> None:
    assert operations(assembly[name]) == ROUNDING


def test_without_its_options_the_kernel_would_be_fused(assembly: dict[str, str]) -> None:
    assert "fma.rn.f32" in operations(assembly["fused"])
