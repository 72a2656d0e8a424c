"""Rules of the tests themselves: marks are complete, helpers lie in support/, lines are counted as code lines."""

import ast
import subprocess
from multiprocessing import Process

import conftest
import count_lines
import pytest
from support import checks, processes
from support.marks import reached, refuse_processes
from support.processes import TESTS, in_ranks


def _starts_a_program() -> None:
    subprocess.run(["true"])


class _Indirect:
    def begin(self) -> None:
        def inner() -> None:
            _starts_a_program()

        inner()


def _uses_a_class() -> None:
    _Indirect().begin()


def _starts_ranks_of_a_module() -> None:
    processes.in_ranks(print)


def _starts_nothing() -> None:
    print(TESTS)


def test_marks_follow_functions_classes_and_modules() -> None:
    assert reached(_starts_nothing) == set()
    assert reached(_starts_a_program) == reached(_uses_a_class) == {"slow"}
    assert "distributed" in reached(_starts_ranks_of_a_module)
    assert "distributed" in reached(in_ranks) & reached(checks.outcomes)


def test_a_process_without_a_mark_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_processes(monkeypatch)
    with pytest.raises(pytest.fail.Exception, match="mark the test `slow`"):
        subprocess.run(["true"])
    with pytest.raises(pytest.fail.Exception, match="mark the test `slow`"):
        Process(target=print).start()


def test_files_that_are_named_exist() -> None:
    for place in (*conftest.LONGEST, *conftest.NUMERICS, *conftest.SLOW):
        file, _, test = place.partition("::")
        found = list(TESTS.glob(file + "*"))
        assert found and (not test or f"\ndef {test}" in found[0].read_text(encoding="utf-8")), place


def test_no_test_file_imports_another() -> None:
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(part.startswith("test_") for name in names for part in name.split(".")), path


def test_lines_of_code() -> None:
    python = '"""Module."""\n\nimport os  # a comment\n\n\n'
    python += 'def f(a,\n      b):\n    """Doc."""\n    # none\n    return """x\ny"""\n'
    assert count_lines.code_lines("a.py", python) == 5
    assert count_lines.code_lines("a.css", "/* of\ntwo lines */\na { b: c; }\n\n") == 1
    assert count_lines.code_lines("a.md", "prose") == 0
    assert (
        count_lines.room("dalle_scale/nn/conv.py") == "dalle_scale/nn" and count_lines.room("launch/a.py") == "launch"
    )
