"""Where and on what a figure was measured: part of every result file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

from dalle_scale.steps import Programs

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "deepspeed", "numpy", "open-clip-torch", "sentencepiece")


def describe() -> dict[str, object]:
    """Command, hardware, versions, commit and date of this process."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "command": Programs(ROOT).typed(["python", *sys.argv]),
        "hardware": f"{os.cpu_count()} x {_processor()}",
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "commit": commit.stdout.strip(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()
