"""Keep the outcome of a finished `make demo` as a result: the report with where and when, and the gallery.

python benchmarks/demo.py --run runs/demo
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from environment import describe

from dalle_scale import log
from dalle_scale.types import UserError

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Copy report and gallery to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    run = parser.parse_args().run
    if not (run / "report.json").is_file():
        raise UserError(f"{run}: no report.json; run `make demo` first")
    report = json.loads((run / "report.json").read_text())
    result = {"demo": "make demo", **report, **describe()}
    (RESULTS / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    shutil.copyfile(run / "gallery.png", RESULTS / "demo.png")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    log.guarded(main)
