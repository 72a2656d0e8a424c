"""Marks of tests that start processes, by the functions and fixtures that they use."""

from __future__ import annotations

import subprocess
import types
from collections.abc import Callable, Iterator
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import pytest
from support import processes

RANKS = frozenset({processes.in_ranks, processes.command, processes.short_command})
STARTERS = frozenset({"subprocess", "multiprocessing", "ProcessPoolExecutor", "forkserver", "Popen"})
COMPILERS = frozenset({"cc", "gcc", "g++", "clang", "c++"})  # of dalle_scale/nn/compiled.py, once a machine


@cache
def reached(function: Callable[..., Any]) -> frozenset[str]:
    """The marks of a function below tests/: `distributed` if it can start ranks, `slow` if it can start a process.

    Follows every function and class of tests/ that it names, at any depth.
    """
    return frozenset(mark for used in _reachable(function) for mark in _own_marks(used))


def marks_of(item: pytest.Item) -> set[str]:
    """The marks of a collected test, those of its fixtures included."""
    definitions = item._fixtureinfo.name2fixturedefs if isinstance(item, pytest.Function) else {}
    functions = [fixture.func for fixtures in definitions.values() for fixture in fixtures]
    functions += [item.function] if isinstance(item, pytest.Function) else []
    return {mark for function in functions for mark in reached(function)}


def refuse_processes(patch: pytest.MonkeyPatch) -> None:
    """Let the test fail at the line that starts a process, compilers excepted."""
    popen = subprocess.Popen.__init__

    def start(self: Any, args: Any, *rest: Any, **options: Any) -> None:
        program = args.split()[0] if isinstance(args, str) else str(next(iter(args)))
        if Path(program).name.split("-")[-1] not in COMPILERS:
            refuse()
        popen(self, args, *rest, **options)

    def refuse(*_: Any, **__: Any) -> NoReturn:
        pytest.fail("starts a process: mark the test `slow`, or `distributed` if it starts ranks")

    patch.setattr(subprocess.Popen, "__init__", start)
    patch.setattr(BaseProcess, "start", refuse)


def _reachable(function: Callable[..., Any]) -> set[types.FunctionType]:
    """Functions below tests/ that `function` names, itself included."""
    found: set[types.FunctionType] = set()
    waiting: list[Any] = [function]
    while waiting:
        named = waiting.pop()
        named = getattr(named, "__wrapped__", named)
        if isinstance(named, type):
            waiting += [method for method in vars(named).values() if isinstance(method, types.FunctionType)]
        elif isinstance(named, types.FunctionType) and named not in found and _below_tests(named):
            found.add(named)
            names = _names(named.__code__)
            values = [named.__globals__[name] for name in names if name in named.__globals__]
            modules = [value for value in values if isinstance(value, types.ModuleType)]
            waiting += values + [vars(module)[name] for module in modules for name in names if name in vars(module)]
    return found


def _below_tests(function: types.FunctionType) -> bool:
    """Whether a function is one of the tests' own; this file starts nothing."""
    file = Path(function.__code__.co_filename)
    return file.is_relative_to(processes.TESTS) and file != Path(__file__)


def _own_marks(function: types.FunctionType) -> Iterator[str]:
    if function in RANKS:
        yield "distributed"
    if not STARTERS.isdisjoint(_names(function.__code__)):
        yield "slow"


def _names(code: types.CodeType) -> set[str]:
    """Global names and attributes of a function, and of the functions inside of it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))
