"""Started by tests through the deepspeed launcher: runs launch/train.py for many command lines in one launch,
because a launch costs ten seconds. The file named on the command line holds a JSON list of argument lists.

All of them share one process group: DeepSpeed keeps groups that it made in the first run, which end with the first.
"""

import json
import runpy
import sys
from pathlib import Path

from dalle_scale import dist

PROGRAM = Path(__file__).parents[2] / "launch" / "train.py"


def main() -> None:
    leave, dist.leave = dist.leave, dist.barrier
    for arguments in json.loads(Path(sys.argv[-1]).read_text()):
        sys.argv = [str(PROGRAM), *arguments]
        try:
            runpy.run_path(str(PROGRAM), run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise
    leave()


if __name__ == "__main__":
    main()
