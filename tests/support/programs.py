"""Programs of launch/ in this process, alone or as one of two ranks."""

from __future__ import annotations

import importlib.util
import io
import os
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.processes import ROOT, TESTS


def run_here(program: Path, *options: object) -> tuple[int, str]:
    """Exit code, everything it printed."""
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(printed),
        redirect_stderr(printed),
        pytest.raises(SystemExit) as end,
    ):
        patch.setattr(sys, "argv", [str(program), *map(str, options)])
        runpy.run_path(str(program), run_name="__main__")
    return int(end.value.code or 0), printed.getvalue()


def run_rank(rank: int, port: int, program: Path, options: list[str]) -> None:
    """One of two ranks, as the launcher starts it."""
    sys.path.insert(0, str(TESTS))  # stages of tests/support
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    code, printed = run_here(program, f"--local_rank={rank}", *options)
    assert not code, printed


def load_program(name: str) -> ModuleType:
    """A program of data_tools as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "data_tools" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module
