"""Run every program on small data and record losses, weights, codes, images and metrics; compare two such records.

    python tests/golden/golden.py --work /tmp/golden --out before.json
    python tests/golden/golden.py --compare before.json after.json

A change that should compute nothing else than before is proved by two records of one machine, made at the commit before
it and at the commit after: all values must be equal, to the last bit. Each commit runs its own copy of this program,
because names of programs, flags and settings may have changed; what a record calls otherwise than the older one stands
in renames.json, old name to new, as regular expressions that are applied in their order to the older record's names;
null is for what is no longer recorded. Codes know the digest of their tokenizer's export, which chooses the order of
samples; the name of a setting in that export must not, so each step that encodes leaves a fixed digest behind.

Between machines hashes say nothing: --rtol compares numbers alone, to that share of each. --metrics-rtol is for the
steps that evaluate, where a library may add in another order.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from contents import Value, of_output
from PIL import Image
from steps import Step, all_steps
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
RENAMES = Path(__file__).with_name("renames.json")
EVALUATIONS = ("evaluate_", "fidelity")  # how names of steps begin whose metrics --metrics-rtol is for
SHOWN = 20  # differences printed
Record = dict[str, dict[str, Value]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="empty folder to run in")
    parser.add_argument("--out", type=Path, help="the record, JSON")
    parser.add_argument("--only", nargs="+", default=[""], metavar="START", help="steps whose names begin like this")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLDER", "NEWER"))
    parser.add_argument("--rtol", type=float, help="of numbers, for records of two machines; default: equal bits")
    parser.add_argument("--metrics-rtol", type=float, default=0.0, help="of numbers of evaluations")
    args = parser.parse_args()
    if args.compare:
        older, newer = (json.loads(path.read_text(encoding="utf-8")) for path in args.compare)
        found = list(differences(renamed(older), newer, args.rtol, args.metrics_rtol))
        for line in found[:SHOWN]:
            print(line)
        print(f"{sum(map(len, older.values()))} values, {len(found)} differences")
        return 1 if found else 0
    if args.work is None or args.out is None:
        parser.error("--work and --out, or --compare OLDER NEWER")
    if args.work.exists() and any(args.work.iterdir()):
        parser.error(f"--work: {args.work} is not empty")
    record = run(args.work, [step for step in all_steps(ROOT) if step.name.startswith(tuple(args.only))])
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out}: {sum(map(len, record.values()))} values of {len(record)} steps")
    return 0


def run(work: Path, steps: list[Step]) -> Record:
    """Run steps in `work`; the values that each has left."""
    work.mkdir(parents=True, exist_ok=True)
    make_folder(work / "folder")
    record: Record = {}
    bar = tqdm(steps, unit="step")
    for step in bar:
        bar.set_postfix_str(step.name)
        execute(step, work)
        if step.program == "launch/encode.py":
            fix_order(work / step.outputs[0] / "manifest.parquet")
        record[step.name] = {}
        for output in step.outputs:
            record[step.name] |= of_output(work / output)
    return record


def fix_order(manifest: Path) -> None:
    """Replace the digest of the tokenizer in the manifest of a data set of codes."""
    table = pq.read_table(manifest)
    document = json.loads(table.schema.metadata[b"dalle_scale"])
    assert document["info"]["tokenizer"]
    document["info"]["tokenizer"] = "fixed"
    metadata = {b"dalle_scale": json.dumps(document, sort_keys=True).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), manifest)


def execute(step: Step, work: Path) -> None:
    """Run one program to its end.

    Raises:
        RuntimeError: it failed.
    """
    program = str(ROOT / step.program)
    line = [sys.executable, program, *step.arguments]
    if step.ranks:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        line = [launcher, "-q", f"--num_gpus={step.ranks}", f"--master_port={port}", program, *step.arguments]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=work, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{step.name} failed: {shlex.join(line)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def make_folder(folder: Path) -> None:
    """Captioned images as a user has them: two kinds of file, some too small, equal, or without a caption."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(0)
    for index in range(40):
        side = 12 if index % 10 == 3 else 40 + index
        values = np.random.default_rng(index - index % 7 // 6).integers(0, 256, (side, 48, 3), dtype=np.uint8)
        image = Image.fromarray(values).resize((48, side), Image.Resampling.BICUBIC)
        image.save(folder / f"{index:03}.{'png' if index % 2 else 'bmp'}")
        if index % 9:
            words = rng.choices(["a red house", "two cats", "near the sea", "häuser", "数"], k=3)
            (folder / f"{index:03}.txt").write_text(" ".join(words), encoding="utf-8")


def renamed(record: Record) -> Record:
    """An older record under today's names."""
    rules = [(re.compile(old), new) for old, new in json.loads(RENAMES.read_text(encoding="utf-8")).items()]

    def today(name: str) -> str | None:
        for old, new in rules:
            if new is None and old.search(name):
                return None
            name = old.sub(new or "", name)
        return name

    return {
        str(today(step)): {new: value for name, value in values.items() if (new := today(name)) is not None}
        for step, values in record.items()
    }


def differences(older: Record, newer: Record, rtol: float | None, metrics_rtol: float) -> Iterator[str]:
    """A line for each value that only one has, or that differs; in the order of the steps."""
    for step in older | newer:
        if step not in older or step not in newer:
            yield f"{step}: only in the {'older' if step in older else 'newer'} record"
            continue
        allowed = max(rtol or 0.0, metrics_rtol if step.startswith(EVALUATIONS) else 0.0)
        for name in older[step] | newer[step]:
            if name not in older[step] or name not in newer[step]:
                yield f"{step}: {name}: only in the {'older' if name in older[step] else 'newer'} record"
                continue
            pair = older[step][name], newer[step][name]
            if not (rtol is not None and isinstance(pair[0], str)) and not same(*pair, allowed):
                yield f"{step}: {name}: {pair[0]} and {pair[1]}"


def same(older: Value, newer: Value, rtol: float) -> bool:
    """Whether two values are equal, numbers to a share of the larger."""
    if isinstance(older, float) and isinstance(newer, float):
        return older == newer or math.isclose(older, newer, rel_tol=rtol) or (older != older and newer != newer)
    return older == newer


if __name__ == "__main__":
    sys.exit(main())
