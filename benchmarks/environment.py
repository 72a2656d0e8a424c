"""Where and on what a figure was measured: part of every result file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import sysconfig
from datetime import datetime, timezone
from pathlib import Path

from dalle_scale.programs import Programs

ROOT = Path(__file__).resolve().parents[1]
# Of the vectors and matrices that a processor computes with; the last four are ARM's
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "sve", "bf16", "svebf16")
PACKAGES = ("torch", "deepspeed", "numpy", "open-clip-torch", "sentencepiece")


def describe() -> dict[str, object]:
    """Command, hardware, versions, commit and date of this process."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "command": Programs(ROOT).typed(["python", *sys.argv]),
        "hardware": f"{os.cpu_count()} x {processor()[0]}",
        "processor_flags": processor()[1],
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "commit": commit.stdout.strip(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def peer(name: str, *requirements: str) -> Path:
    """The Python of an environment in which a peer is installed beside what this project has; made when it is missing.

    The peer's own requirements win there, and nothing changes in the project's environment.
    """
    folder = Path("runs/benchmarks/environments") / name
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        print(f"installing {', '.join(requirements)} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        [packages] = folder.glob("lib/python*/site-packages")
        (packages / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *requirements], check=True)
        ready.touch()
    return python.absolute()


def processor() -> tuple[str, list[str]]:
    """Name of the processor, and those of FLAGS that it has."""
    from dalle_scale.nn import precision

    name, flags = precision.processor()
    return name, [flag for flag in FLAGS if flag in flags]
