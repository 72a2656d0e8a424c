"""What programs do and write does not depend on the user's locale, and takes the cores that they may use."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.processes import HANG_SECONDS, ROOT, environment

from dalle_scale import config
from dalle_scale.types import UserError

FILES = sorted(path for part in ("dalle_scale", "launch", "data_tools") for path in (ROOT / part).rglob("*.py"))
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # what a locale of one language is like
WORDS = "ein schöner Würfel → 猫"


def opens_text(call: ast.Call) -> bool:
    """Whether this opens a text file in the encoding of the locale."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if any(keyword.arg in ("encoding", None) for keyword in call.keywords):
        return False
    if name in ("read_text", "write_text"):
        return len(call.args) < (1 if name == "read_text" else 2)
    mode = call.args[0 if isinstance(call.func, ast.Attribute) else 1 :][:1]
    is_mode = bool(mode) and isinstance(mode[0], ast.Constant) and str(mode[0].value).strip("+b") in list("rwax")
    return name == "open" and is_mode and "b" not in mode[0].value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_files_say_their_encoding(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if opens_text(call)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_cores_are_those_of_this_process(path: Path) -> None:
    assert "cpu_count" not in path.read_text("utf-8"), "counts cores that taskset or a job's cpuset has taken away"


def run(*line: object, **variables: str) -> str:
    """What a program prints; it must succeed."""
    done = subprocess.run(
        [sys.executable, *map(str, line)], env=environment() | variables, capture_output=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode("utf-8", errors="strict")


def test_a_config_is_read_as_utf_8(tmp_path: Path) -> None:
    tree = yaml.safe_load((ROOT / "configs" / "tiny" / "vae.yaml").read_text("utf-8")) | {"run": f"{tmp_path}/{WORDS}"}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    code = "import sys; from dalle_scale import config; print(ascii(config.load(sys.argv[1]).run))"
    assert run("-c", code, path, **ASCII).strip() == ascii(f"{tmp_path}/{WORDS}")


def test_what_a_terminal_cannot_show_stops_no_program() -> None:
    code = f"from dalle_scale import log; log.guarded(lambda: (log.say({WORDS!a}), print({WORDS!a})))"
    expected = WORDS.encode("ascii", errors="backslashreplace").decode()
    assert run("-c", code, **ASCII).splitlines() == [expected] * 2
    name = os.fsdecode(b"\xff")  # of a file, not UTF-8
    assert run("-c", f"from dalle_scale import log; log.guarded(lambda: print({name!a}))").strip() == r"\udcff"


def test_small_files_are_written_as_utf_8(tmp_path: Path) -> None:
    code = "import sys, pathlib; from dalle_scale import io; "
    run("-c", f"{code} io.write(pathlib.Path(sys.argv[1]), {WORDS!a})", tmp_path / "file", **ASCII)
    assert (tmp_path / "file").read_bytes() == WORDS.encode()


def test_a_config_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes("stage: vae  # schön".encode("latin-1"))
    with pytest.raises(UserError, match=r"c\.yaml: not UTF-8 text, byte 17; save it as UTF-8"):
        config.load(tmp_path / "c.yaml")
