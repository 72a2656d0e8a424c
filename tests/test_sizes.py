"""Functions and files stay short enough to be read at once."""

import ast
from pathlib import Path

from support.processes import ROOT

FUNCTION_LINES = 60
FILE_LINES = {"dalle_scale": 400, "launch": 120, "data_tools": 400}
EXCEPTIONS: dict[str, str] = {}  # "path" or "path:function" -> the reason why it may be longer


def files(folder: str) -> list[Path]:
    """The Python files below a folder of the repository."""
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, folder
    return found


def lengths(folder: str) -> dict[str, int]:
    """Lines of each file, as "path", and of each function, as "path:function"."""
    found = {}
    for path in files(folder):
        text, place = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        found[place] = len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                name = f"{place}:{node.name}"
                found[name] = max(lines, found.get(name, 0))  # several classes may have a function of that name
    return found


def test_functions_and_files_are_short() -> None:
    long = {}
    for folder, most in FILE_LINES.items():
        for name, lines in lengths(folder).items():
            if lines > (FUNCTION_LINES if ":" in name else most):
                long[name] = lines
    assert long.keys() - EXCEPTIONS.keys() == set(), long
    assert EXCEPTIONS.keys() - long.keys() == set(), "exceptions that are no longer needed"
