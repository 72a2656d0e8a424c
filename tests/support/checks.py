"""Many checks in one launch, because a launch costs ten seconds: functions `check_<name>(zero)` of a module that the
deepspeed launcher starts, each at every ZeRO stage.

The module ends in `run(globals())`. A test collects what happened with `outcomes`, and names the checks with `names`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from support.processes import HANG_SECONDS, environment, short_command

from dalle_scale import dist
from dalle_scale.engine import build

STAGES = (0, 1, 2, 3)
_outcomes: dict[tuple[str, int], dict[str, str]] = {}


def names(found: dict[str, Any]) -> list[str]:
    """The checks among the variables of a module."""
    return [name.removeprefix("check_") for name in found if name.startswith("check_")]


def run(found: dict[str, Any]) -> None:
    """On each rank: all checks. Writes `{"<check>-<stage>": "ok" or what went wrong}` to the file named last on the
    command line, with the number of the rank behind its name."""
    build.start()
    results = {}
    for name in names(found):
        for zero in STAGES:
            try:
                found[f"check_{name}"](zero)
                outcome = "ok"
            except Exception:
                outcome = traceback.format_exc()
            wrong = dist.sum_on_host([outcome != "ok"])[0]
            results[f"{name}-{zero}"] = outcome if outcome != "ok" or not wrong else "wrong on another rank"
    Path(f"{sys.argv[-1]}.{dist.rank()}").write_text(json.dumps(results))
    dist.leave()


def outcomes(checks: ModuleType, processes: int, folder: Path) -> dict[str, str]:
    """Launch a module with its checks and wait; of each outcome the worst of all ranks. Once for each number of
    processes: in random order pytest sets a fixture with parameters up again and again."""
    key = (str(checks.__file__), processes)
    if key not in _outcomes:
        out = folder / "results.json"
        launch(Path(key[0]), out, processes)
        by_rank = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(processes)]
        _outcomes[key] = {name: max((rank[name] for rank in by_rank), key=len) for name in by_rank[0]}
    return _outcomes[key]


def launch(script: Path, argument: Path, processes: int) -> None:
    """Run a script through the deepspeed launcher; it must succeed."""
    line = short_command(script, str(argument), processes=processes)
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
