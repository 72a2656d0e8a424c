"""Count lines of code: without comments, blank lines and docstrings.

    python tests/count_lines.py                     the working tree, a row for each room
    python tests/count_lines.py --against COMMIT    the commit beside it, and the ratio

Counted are Python, C, C++, templates, styles and scripts of dalle_scale, launch and data_tools that git knows.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import tokenize
from collections import Counter
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("dalle_scale", "launch", "data_tools")
SILENT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip
COMMENTS = {  # suffix -> comments of its language
    ".c": r"/\*.*?\*/|//[^\n]*",
    ".cpp": r"/\*.*?\*/|//[^\n]*",
    ".js": r"/\*.*?\*/|^\s*//[^\n]*",
    ".css": r"/\*.*?\*/",
    ".html": r"<!--.*?-->|\{#.*?#\}",
    ".j2": r"<!--.*?-->|\{#.*?#\}",
}


def python_lines(text: str) -> int:
    """Lines of Python that hold a token other than a comment or a docstring."""
    strings = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr)]
    strings = [node for node in strings if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)]
    documented = {line for node in strings for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in SILENT]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - documented)


def code_lines(path: str, text: str) -> int:
    """Lines of code of one file, 0 for files of other kinds."""
    suffix = PurePosixPath(path).suffix
    if suffix == ".py":
        return python_lines(text)
    if suffix not in COMMENTS:
        return 0
    return sum(bool(line.strip()) for line in re.sub(COMMENTS[suffix], "", text, flags=re.S | re.M).splitlines())


def room(path: str) -> str:
    """The folder of a file; below dalle_scale, the folder or file there."""
    parts = path.split("/")
    return "/".join(parts[:2]) if parts[0] == "dalle_scale" else parts[0]


def count(commit: str | None = None) -> Counter[str]:
    """Lines of code by room, of the working tree or of a commit."""
    listing = ("ls-files",) if commit is None else ("ls-tree", "-r", "--name-only", commit)
    lines: Counter[str] = Counter()
    for path in git(*listing, *(("--",) if commit is None else ()), *FOLDERS).splitlines():
        if PurePosixPath(path).suffix not in {".py", *COMMENTS} or (commit is None and not (ROOT / path).exists()):
            continue
        text = (ROOT / path).read_text(encoding="utf-8") if commit is None else git("show", f"{commit}:{path}")
        lines[room(path)] += code_lines(path, text)
    return lines


def git(*arguments: str) -> str:
    """Standard output of a git command in the repository."""
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="count this commit as well")
    args = parser.parse_args()
    counts = [count(args.against), count()] if args.against else [count()]
    for name in sorted(set().union(*counts)):
        print(f"{name:32}" + "".join(f"{lines[name]:8,}" for lines in counts))
    totals = [lines.total() for lines in counts]
    ratio = f"   ratio {totals[-1] / totals[0]:.3f}" if args.against else ""
    print(f"{'total':32}" + "".join(f"{total:8,}" for total in totals) + ratio)


if __name__ == "__main__":
    main()
