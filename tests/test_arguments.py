"""Command lines: what is wrong is one line, which names the flag that was meant; --help shows defaults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import HANG_SECONDS, ROOT, environment

from dalle_scale.arguments import Parser, above_zero, at_least, share
from dalle_scale.types import UserError

PROGRAMS = sorted(path for folder in ("launch", "data_tools") for path in (ROOT / folder).glob("*.py"))


def run(program: Path, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    paths = {"PYTHONPATH": f"{ROOT}:{environment()['PYTHONPATH']}"}
    line = [sys.executable, str(program), *map(str, arguments)]
    options = {"cwd": folder, "env": environment() | paths, "capture_output": True, "text": True}
    return subprocess.run(line, timeout=HANG_SECONDS, **options)


def parser() -> Parser:
    found = Parser("Does something.")
    found.add_data()
    found.add_out(default=Path("out"))
    found.add_limit("samples", 9)
    found.add_batch_size("at once")
    found.add_argument("--share", type=share)
    found.add_argument("--rate", type=above_zero)
    found.add_argument("--steps", type=at_least(2))
    found.add_argument("--kind", choices=("red", "blue"))
    found.add_argument("options", nargs="*")
    return found


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "missing: --data; --help says more"),
        ("--data d --limit 0", "--limit: 0, but it has to be at least 1"),
        ("--data d --limit x", "--limit: x, but it has to be at least 1"),
        ("--data d --share 1.5", "--share: 1.5, but it has to be from 0 to 1"),
        ("--data d --share nan", "--share: nan, but it has to be from 0 to 1"),
        ("--data d --rate 0", "--rate: 0, but it has to be above 0"),
        ("--data d --rate inf", "--rate: inf, but it has to be above 0"),
        ("--data d --steps 1", "--steps: 1, but it has to be at least 2"),
        ("--data d --kind green", "--kind: invalid choice: 'green'"),
        ("--data d --limt 3", "unknown argument --limt; did you mean --limit?"),
        ("--data d --lim 3", "unknown argument --lim; did you mean --limit?"),
        ("--data d --batch=3", "--batch is called --batch-size since 0.2"),
        ("--shards d", "--shards is called --data since 0.2"),
        ("--no-such-flag", "unknown argument --no-such-flag"),
    ],
)
def test_what_is_wrong_is_one_line(line: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parser().parse_args(line.split())
    found = str(error.value)
    assert message in found and "\n" not in found


def test_flags_may_stand_between_positionals() -> None:
    args = parser().parse_args(["a=1", "--data", "d", "b=2", "--limit", "3", "c=3"])
    assert args.options == ["a=1", "b=2", "c=3"] and args.limit == 3 and args.out == Path("out")


def test_defaults_are_shown_in_one_style() -> None:
    text = " ".join(parser().format_help().split())
    assert "samples (default: 9)" in text and "(default: None)" not in text and "{red,blue}" in text


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_programs(program: Path, tmp_path: Path) -> None:
    """--help shows an example of the program itself; an unknown flag is one line and exit code 2."""
    helped = run(program, "--help", folder=tmp_path)
    assert helped.returncode == 0 and program.name in helped.stdout and "(default: None)" not in helped.stdout
    wrong = run(program, "--no-such-flag", folder=tmp_path)
    lines = [line for line in wrong.stderr.splitlines() if line]
    assert (
        wrong.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: unknown argument --no-such-flag")
    ), wrong.stderr
    assert not list(tmp_path.iterdir())
