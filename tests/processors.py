"""Run the tests as another processor would, and keep what came of it: one row of a table after the other.

    python tests/processors.py                          the table, and which rows are missing at this code
    python tests/processors.py sse                      all tests under one row; the outcome is stored
    python tests/processors.py sse --part numerics      the numerical tests alone; nothing is stored
    python tests/processors.py order --seed 7           a row with a seed, as it ran before

Outcomes lie in benchmarks/results/processors.json by processor and row, each with its commit and a digest of the code.
They hold for every commit with the same code: all tracked files but prose and results. While one of these differs from
the commit nothing is stored. Variables that a processor or a library does not know change nothing there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from environment import describe  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "processors.json"
CODE = (".", ":(exclude)*.md", ":(exclude)docs", ":(exclude)benchmarks/results", ":(exclude)LICENSE")
XDIST = ("--dist=loadfile", "--no-loadscope-reorder")
QUIET = {"OMP_WAIT_POLICY": "PASSIVE"}  # with more threads than cores those that wait must not spin


class Row(NamedTuple):
    """How the tests run. `{seed}` in variables and options is drawn anew each time."""

    variables: dict[str, str] = {}  # noqa: RUF012 - never changed
    options: tuple[str, ...] = ()
    workers: int | None = None  # None: as many as asked for
    numerics: bool = False  # the tests with this mark alone


SSE = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
ROWS = {
    "native": Row(),
    "compatible": Row({"MKL_CBWR": "COMPATIBLE"}),
    "sse": Row(SSE),
    "onednn-avx2": Row({"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "aten-avx2": Row({"ATEN_CPU_CAPABILITY": "avx2"}),
    "threads-4": Row({"OMP_NUM_THREADS": "4", **QUIET}, workers=1),
    "threads-16": Row({"OMP_NUM_THREADS": "16", **QUIET}, workers=1, numerics=True),
    "hash-seed": Row({"PYTHONHASHSEED": "{seed}"}),
    "order": Row(options=("--random-order", "--random-order-seed={seed}")),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="?", choices=ROWS)
    parser.add_argument("--workers", type=int, default=2, help="of pytest, where the row does not say")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32), help="default: drawn")
    parser.add_argument("--part", choices=("all", "numerics"), default="all")
    args = parser.parse_args()
    if args.row is None:
        table()
        return 0
    before = code()
    outcome = run(ROWS[args.row], args.workers, args.seed, args.part == "numerics")
    print(json.dumps(outcome, indent=1))
    if args.part != "all" or before is None or code() != before:
        print("not stored: " + ("a part of the row" if args.part != "all" else "files differ from the commit"))
        return int(outcome["exit_code"])
    outcomes = stored()
    outcomes.setdefault(outcome["processor"], {})[args.row] = outcome | {"code": before}
    RESULTS.write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
    return int(outcome["exit_code"])


def run(row: Row, workers: int, seed: int, numerics: bool) -> dict[str, Any]:
    """The outcome of a row: command, counts, names of what failed, exit code of pytest, time, processor."""
    variables = {key: value.format(seed=seed) for key, value in ({"OMP_NUM_THREADS": "1"} | row.variables).items()}
    line = ["pytest", f"--numprocesses={row.workers or workers}", *XDIST]
    line += [option.format(seed=seed) for option in row.options]
    line += ["-m", "numerics and not long"] if row.numerics or numerics else []
    command = shlex.join([*(f"{key}={value}" for key, value in variables.items()), *line])
    print(command, flush=True)
    ours = {key for other in ROWS.values() for key in other.variables}  # native is without them
    environment = {key: value for key, value in os.environ.items() if key not in ours} | variables
    environment.setdefault("DS_ACCELERATOR", "cpu")
    began = time.monotonic()
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = subprocess.run([sys.executable, "-m", *line, f"--junitxml={report}"], cwd=ROOT, env=environment)
        found = counts(report) if report.exists() else {"passed": 0, "failed": 0, "skipped": 0}
    took = {"exit_code": done.returncode, "seconds": round(time.monotonic() - began)}
    return {**describe(), "processor": processor(), "command": command, **found, **took}


def counts(report: Path) -> dict[str, Any]:
    """Numbers of tests passed, failed and skipped in a JUnit file, and the names of those that failed."""
    passed, skipped, failures = 0, 0, []
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failures.append(f"{case.get('classname')}::{case.get('name')}")
        else:
            is_skipped = case.find("skipped") is not None
            passed, skipped = passed + (not is_skipped), skipped + is_skipped
    return {"passed": passed, "failed": len(failures), "skipped": skipped, "failures": sorted(failures)}


def processor() -> str:
    """Name with family, model and stepping, as the kernel tells them."""
    info = Path("/proc/cpuinfo")
    pairs = [line.partition(":") for line in info.read_text().splitlines()] if info.exists() else []
    told = {key.strip(): value.strip() for key, _, value in reversed(pairs)}
    keys = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part")  # the last two are ARM's
    return " ".join(told[key] for key in keys if key in told) or platform.processor()


def code() -> str | None:
    """Digest of the tracked code; None where it differs from the commit, or where there is no repository."""
    changed = subprocess.run(["git", "status", "--porcelain", "--", *CODE], cwd=ROOT, capture_output=True)
    if changed.returncode or changed.stdout:
        return None
    files = subprocess.run(["git", "ls-files", "--stage", "--", *CODE], cwd=ROOT, capture_output=True, check=True)
    return hashlib.sha256(files.stdout).hexdigest()[:16]


def stored() -> dict[str, dict[str, Any]]:
    """Outcomes by processor and row: the last of each."""
    return dict(json.loads(RESULTS.read_text(encoding="utf-8"))) if RESULTS.exists() else {}


def table() -> None:
    """Print each row's outcome on this processor and on others that have some, and what is missing on this one."""
    now, here, outcomes = code(), processor(), stored()
    missing = []
    for place in dict.fromkeys([here, *outcomes]):
        print(f"{place}{' (this one)' if place == here else ''}")
        for name in ROWS:
            found = outcomes.get(place, {}).get(name)
            valid = found is not None and found["code"] == now
            if place == here and not (valid and not found["exit_code"]):
                missing.append(name)
            counted = "{passed} passed, {failed} failed, {skipped} skipped, {seconds} s, {commit}, {date}"
            state = "this code" if valid else "other code" if found else "not run"
            print(f"  {name:12} {state:10} {counted.format(**found) if found else ''}".rstrip())
    print(f"missing here: {', '.join(missing) or 'nothing'}")
    if now is None:
        print("files differ from the commit: no outcome holds for them")


if __name__ == "__main__":
    sys.exit(main())
