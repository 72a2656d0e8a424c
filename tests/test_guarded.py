"""The end of a program: what a user can fix is one line of its own, whatever was on the screen."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import HANG_SECONDS, ROOT, environment

BAR = "[next(bar) for bar in [log.progress(range(9), 'read', 'rows')] for _ in range(3)]"
CASES = {
    "raise UserError('the value is wrong')": (2, "error: the value is wrong"),
    "open('/dev/full', 'w').write('x' * 100000)": (2, "error: a file could not be written: No space left on device"),
    "Path('file').touch(); Path('file/folder').mkdir()": (2, "error: file/folder: Not a directory"),
    "Path('file').touch(); Path('file').mkdir()": (2, "error: file: File exists"),
    "import pyarrow.nothing": (1, "ModuleNotFoundError: No module named 'pyarrow.nothing'"),
    "1 / 0": (1, "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("bar", ["", BAR], ids=["alone", "below_a_bar"])
@pytest.mark.parametrize("code", CASES)
def test_one_line(code: str, bar: str, tmp_path: Path) -> None:
    lines = ("from pathlib import Path", "from dalle_scale import log", "from dalle_scale.types import UserError")
    program = "\n".join([*lines, "def main():", f"    {bar}", f"    {code}", "log.guarded(main)"])
    paths = {"PYTHONPATH": f"{ROOT}:{environment()['PYTHONPATH']}"}
    options = {"cwd": tmp_path, "env": environment() | paths, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", program], timeout=HANG_SECONDS, **options)
    exit_code, line = CASES[code]
    assert done.returncode == exit_code, done.stderr
    shown = done.stderr.replace("\r", "\n").splitlines() if exit_code == 1 else done.stderr.split("\n")
    assert shown[-1 if shown[-1] else -2] == line
    assert exit_code == 1 or "Traceback" not in done.stderr
