"""The program that runs the tests as other processors would: what it counts, what it stores and for which code."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import processors
import pytest

TEST = """
import os
import pytest

def test_good(): assert os.environ.get("MKL_CBWR") == "COMPATIBLE" and os.environ["OMP_NUM_THREADS"] == "1"
def test_bad(): assert False
@pytest.mark.skip
def test_skipped(): pass
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One with three tests, in place of this."""
    if not shutil.which("git"):
        pytest.skip("needs git")
    (tmp_path / "test_it.py").write_text(TEST, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  numerics:\n  long:\n", encoding="utf-8")
    (tmp_path / ".gitignore").write_text("__pycache__\n.pytest_cache\n", encoding="utf-8")
    monkeypatch.setattr(processors, "ROOT", tmp_path)
    monkeypatch.setattr(processors, "RESULTS", tmp_path / "benchmarks" / "results" / "processors.json")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    commit(tmp_path)
    return tmp_path


def commit(folder: Path) -> None:
    subprocess.run(["git", "add", "-A"], cwd=folder, check=True)
    line = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "x", "--allow-empty"]
    subprocess.run(line, cwd=folder, check=True)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["processors.py", *arguments])
    return processors.main()


def state(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, row: str) -> str:
    """What the table says of a row."""
    capsys.readouterr()
    assert run(monkeypatch) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith(row)]
    return line.strip().removeprefix(row).strip()


def test_an_outcome_holds_for_its_code(repository: Path, monkeypatch: Any, capsys: Any) -> None:
    assert state(capsys, monkeypatch, "compatible") == "not run"
    assert run(monkeypatch, "compatible", "--workers=1") == 1
    assert "missing here: native, compatible, sse" in (run(monkeypatch), capsys.readouterr().out)[1]
    [outcomes] = json.loads(processors.RESULTS.read_text(encoding="utf-8")).values()
    outcome = outcomes["compatible"]
    assert (outcome["passed"], outcome["failed"], outcome["skipped"]) == (1, 1, 1)
    assert outcome["failures"] == ["test_it::test_bad"] and outcome["command"].startswith("OMP_NUM_THREADS=1 MKL_CBWR=")
    commit(repository)  # of the result
    (repository / "x.md").write_text("prose", encoding="utf-8")
    assert state(capsys, monkeypatch, "compatible").startswith("this code  1 passed, 1 failed, 1 skipped")
    (repository / "test_it.py").write_text(TEST.replace("assert False", "pass"), encoding="utf-8")
    assert state(capsys, monkeypatch, "compatible").startswith("other code 1 passed")
    assert run(monkeypatch, "compatible", "--workers=1") == 0 and "not stored: files differ" in capsys.readouterr().out
    commit(repository)
    assert state(capsys, monkeypatch, "compatible").startswith("other code 1 passed")
    assert run(monkeypatch, "compatible", "--workers=1") == 0
    assert state(capsys, monkeypatch, "compatible").startswith("this code  2 passed, 0 failed")
    assert "compatible" not in (run(monkeypatch), capsys.readouterr().out.splitlines()[-1])[1]


def test_rows_are_apart(repository: Path, monkeypatch: Any, capsys: Any) -> None:
    """Native is without the variables of the others, and a part of a row is not the row."""
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert run(monkeypatch, "native", "--workers=1") == 1 and "test_it::test_good" in capsys.readouterr().out
    assert run(monkeypatch, "order", "--part=numerics", "--seed=7") == 5  # nothing has the mark
    assert "--random-order-seed=7 -m" in capsys.readouterr().out
    assert state(capsys, monkeypatch, "order") == "not run"
