"""The words of tests/words.txt are used nowhere, and docstrings begin as CONTRIBUTING.md asks."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from support.processes import ROOT

FOLDERS = ("dalle_scale", "launch", "data_tools", "configs", "docs")
KINDS = {".py", ".yaml", ".md", ".html", ".css", ".sbatch", ".c", ".cpp"}
HISTORY = ROOT / "docs" / "log.md"
CLAUSE = re.compile(r"(What|How|Who|Where|When|Which|Whom|Whose|Why|Whether)\b")


def rules() -> tuple[list[tuple[re.Pattern[str], str]], dict[str, re.Pattern[str]]]:
    """(pattern, the word in its place), and what a file may hold nevertheless."""
    words, allowed = [], {}
    for line in (ROOT / "tests" / "words.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        first, second, *pattern = line.split("\t")
        if first == "except":
            allowed[second] = re.compile(pattern[0])
        else:
            words.append((re.compile(first), second))
    return words, allowed


def texts() -> list[Path]:
    """All files that the words are held against."""
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in KINDS]
    return [path for path in (*found, ROOT / "README.md") if path != HISTORY]


def test_replaced_words_are_used_nowhere() -> None:
    words, allowed = rules()
    found = []
    for path in texts():
        place = path.relative_to(ROOT).as_posix()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if place in allowed and allowed[place].search(line):
                continue
            found += [f"{place}:{number}: {m[0]!r}, say {word}" for rule, word in words for m in rule.finditer(line)]
    assert len(texts()) > 200 and len(words) > 40
    assert not found, "\n".join(found)


def test_a_replaced_word_would_be_found() -> None:
    words, _ = rules()
    line = "a picture is drawn every update by players in turn: what comes out goes on"
    assert sum(bool(rule.search(line)) for rule, _ in words) >= 6


def functions(node: ast.AST, public: bool = True) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Functions of modules and classes, and whether they are public; not those inside of functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child, public and not child.name.startswith("_")
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, public and not child.name.startswith("_"))


def test_docstrings() -> None:
    """95 % of the public functions have one; none begins with a clause, except "Whether" of a bool."""
    documented, clauses = [], []
    for path in (path for path in texts() if path.suffix == ".py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = dict(functions(tree))
        documented += [bool(ast.get_docstring(function)) for function, public in found.items() if public]
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                opening = CLAUSE.match(ast.get_docstring(node) or "")
                if opening and not (opening[0] == "Whether" and isinstance(node, ast.FunctionDef)):
                    clauses.append(f"{path.relative_to(ROOT)}: {getattr(node, 'name', 'module')}")
    assert not clauses, "\n".join(clauses)
    assert len(documented) > 500 and sum(documented) >= 0.95 * len(documented)
