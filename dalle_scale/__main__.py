"""The command `dalle-scale`: every program of launch/ and data_tools/, from any folder.

dalle-scale                                 list the programs
dalle-scale sample --help                   a program and its arguments
dalle-scale train --num_gpus 8 tiny/vae     flags of the deepspeed launcher, then a config and its settings
"""

from __future__ import annotations

import ast
import difflib
import os
import runpy
import shutil
import sys
from pathlib import Path

from dalle_scale import installed
from dalle_scale.types import UserError


def main() -> int:
    """Start the program that the command line names. Returns the exit code where it ends here."""
    try:
        return _start(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _start(arguments: list[str]) -> int:
    """Raises UserError: no such program; its packages are missing."""
    programs = installed.programs()
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, programs))
        print("usage: dalle-scale PROGRAM [arguments]\n")
        print("\n".join(f"  {name:<{width}}  {summary(path)}" for name, path in programs.items()))
        print("\ndalle-scale PROGRAM --help says more about one.")
        return 0
    name, *rest = arguments
    if name not in programs:
        near = difflib.get_close_matches(name, list(programs), n=1)
        hint = f"did you mean '{near[0]}'?" if near else "dalle-scale alone lists them"
        raise UserError(f"no program '{name}'; {hint}")
    if name == "train" and not {"-h", "--help"} & set(rest):
        return _train(programs[name], rest)
    path = programs[name]
    sys.argv = [str(path), *rest]
    sys.path[0] = str(path.parent)  # as if the file itself had been started
    from dalle_scale.extras import named

    with named():
        runpy.run_path(str(path), run_name="__main__")
    return 0


def _train(program: Path, arguments: list[str]) -> int:
    """Replace this process by the deepspeed launcher: what stands before the config is the launcher's."""
    at = next((number for number, one in enumerate(arguments) if installed.config(one)), None)
    if at is None:
        at = next((number for number, one in enumerate(arguments) if one.endswith(".yaml")), None)
    if at is None:
        near = [name for one in arguments for name in difflib.get_close_matches(one, installed.configs(), n=1)]
        hint = f"did you mean '{near[0]}'?" if near else "e.g. dalle-scale train --num_gpus 8 tiny/vae"
        raise UserError(f"train: no config among {' '.join(arguments) or 'no arguments'}; {hint}")
    launcher = shutil.which("deepspeed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if launcher is None:
        raise UserError("this needs the package deepspeed: pip install 'dalle_scale[train]'")
    config = installed.config(arguments[at]) or arguments[at]
    command = [launcher, *arguments[:at], str(program), str(config), *arguments[at + 1 :]]
    sys.stdout.flush()
    os.execv(launcher, command)


def summary(program: Path) -> str:
    """First line of a program's docstring, without its full stop."""
    docstring = ast.get_docstring(ast.parse(program.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].removesuffix(".")


if __name__ == "__main__":
    sys.exit(main())
