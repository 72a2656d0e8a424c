"""Started by test_train.py through the deepspeed launcher: runs launch/train.py for many command lines in one launch,
because a launch costs ten seconds. The file named on the command line holds a JSON list of argument lists."""

import json
import runpy
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "launch" / "train.py"


def main() -> None:
    for arguments in json.loads(Path(sys.argv[-1]).read_text()):
        sys.argv = [str(PROGRAM), *arguments]
        try:
            runpy.run_path(str(PROGRAM), run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise


if __name__ == "__main__":
    main()
