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
    parser.add_argument("--minutes", type=int, default=8, help="what it was run with: make demo MINUTES=...")
    options = parser.parse_args()
    run, name = options.run, "demo" if options.minutes == 8 else f"demo_{options.minutes}_minutes"
    if not (run / "report.json").is_file():
        raise UserError(f"{run}: no report.json; run `make demo` first")
    report = json.loads((run / "report.json").read_text())
    result = {"demo": f"make demo MINUTES={options.minutes}", **report, **describe()}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    shutil.copyfile(run / "gallery.png", RESULTS / f"{name}.png")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    log.guarded(main)
