"""Joining the process group."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.processes import HANG_SECONDS, environment

PROGRAM = """
import sys
from pathlib import Path
from dalle_scale import rank_log
from dalle_scale.engine import build
rank_log.start(Path(sys.argv[1]))
build.start()
"""


def test_a_start_prints_nothing(tmp_path: Path) -> None:
    """Nor do compilers, which DeepSpeed tries when it is asked what it could compile."""
    line = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=HANG_SECONDS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
