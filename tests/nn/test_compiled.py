"""C files compiled for this machine: kept, built anew where broken, by several processes at once, or done without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dalle_scale.nn import compiled

ROOT = Path(__file__).parents[2]
SOURCES = [path for path in (ROOT / "dalle_scale").rglob("*.c*") if path.suffix in compiled._WAYS]
CALL = "import sys; from pathlib import Path; from dalle_scale.nn import compiled; "
CALL += "print(compiled._loaded(Path(sys.argv[1])).answer())"
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="no C compiler")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of one function, and a cache that is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DALLE_SCALE_COMPILE", raising=False)
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }\n")
    return path


def begin(source: Path) -> subprocess.Popen[str]:
    """Another process that loads the file and prints what its function returns."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CALL, str(source)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@needs_compiler
def test_compiled_once(source: Path) -> None:
    assert compiled._loaded(source).answer() == 42
    [path] = (source.parent / "cache" / "dalle_scale").iterdir()
    written = path.stat().st_mtime_ns
    assert compiled._loaded(source).answer() == 42
    assert path.stat().st_mtime_ns == written
    source.write_text("int answer(void) { return 43; }\n")
    assert compiled._loaded(source).answer() == 43


@needs_compiler
@pytest.mark.parametrize("kept", [0, 10, 32, 5000])
def test_a_broken_file_is_built_anew(kept: int, source: Path) -> None:
    assert begin(source).communicate()[0] == "42\n"
    [path] = (source.parent / "cache" / "dalle_scale").iterdir()
    path.write_bytes(path.read_bytes()[:kept])
    assert compiled._loaded(source).answer() == 42
    assert compiled._whole(path)


@needs_compiler
def test_processes_at_once(source: Path) -> None:
    processes = [begin(source) for _ in range(3)]
    assert [process.communicate()[0] for process in processes] == ["42\n"] * 3
    assert len(list((source.parent / "cache" / "dalle_scale").iterdir())) == 1


@pytest.mark.parametrize("missing", ["switched off", "compiler", "working compiler", "folder", "system"])
def test_done_without(missing: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = source.parent / "programs"
    programs.mkdir()
    if missing == "switched off":
        monkeypatch.setenv("DALLE_SCALE_COMPILE", "0")
    elif missing == "folder":
        (source.parent / "cache").write_text("a file")
    elif missing == "system":
        monkeypatch.setattr(sys, "platform", "darwin")
    else:
        monkeypatch.setenv("PATH", str(programs))
        if missing == "working compiler":
            (programs / "cc").write_text("#!/bin/sh\nexit 1\n")
            (programs / "cc").chmod(0o755)
    assert compiled.library.__wrapped__("winograd_transforms.c") is None


@needs_compiler
def test_the_package_ships_what_it_compiles(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert {path.name for path in (tmp_path / "dalle_scale" / "nn").glob("*.c*")} == {path.name for path in SOURCES}


@needs_compiler
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_what_is_shipped_compiles(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nobody would notice, but for the time that everything takes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled._loaded(path)
