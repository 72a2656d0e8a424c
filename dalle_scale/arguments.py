"""Command lines of all programs: one definition of each common argument, ranges, and one line for what is wrong."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dalle_scale.types import UserError

_RENAMED = {  # flags of 0.1
    "--shards": "--data",
    "--batch": "--batch-size",
    "--rerank": "--clip",
    "--machines": "--nodes",
    "--samples": "--limit",
    "--max-samples": "--limit",
    "--max-captions": "--limit",
    "--count": "--limit",
    "--max-reference": "--limit-reference",
}


def at_least(low: float) -> Callable[[str], int]:
    """Type of an argument: a whole number, `low` or more."""
    return _number(int, f"at least {low:g}", lambda value: value >= low)


def share(text: str) -> float:
    """Type of an argument: from 0 to 1."""
    return float(_number(float, "from 0 to 1", lambda value: 0 <= value <= 1)(text))


def above_zero(text: str) -> float:
    """Type of an argument: a finite number above 0."""
    return float(_number(float, "above 0", lambda value: 0 < value < float("inf"))(text))


def _number(kind: type[Any], wanted: str, fits: Callable[[Any], bool]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"{text}, but it has to be {wanted}")
        return value

    return parse


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows defaults, all in one style."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS, []) or "default" in text:
            return text
        return f"{text} (default: %(default)s)".strip()


class Parser(argparse.ArgumentParser):
    """Parser of a program, which gives its module's docstring. Flags are not abbreviated.

    Raises:
        UserError: from `parse_args`, in one line: an argument is missing, unknown, or out of its range.
    """

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False)

    def add_data(self, text: str = "folder of a data set", required: bool = True) -> None:
        """--data FOLDER."""
        self.add_argument("--data", type=Path, required=required, metavar="FOLDER", help=text)

    def add_out(self, text: str = "folder to write to", default: Path | None = None, required: bool = True) -> None:
        """--out FOLDER; required unless there is a default."""
        required = required and default is None
        self.add_argument("--out", type=Path, required=required, default=default, metavar="FOLDER", help=text)

    def add_limit(self, text: str, default: int | None = None, flag: str = "--limit") -> None:
        """--limit N: at most so many samples."""
        self.add_argument(flag, type=at_least(1), default=default, metavar="N", help=text)

    def add_batch_size(self, text: str, default: int | None = None) -> None:
        """--batch-size N."""
        self.add_argument("--batch-size", type=at_least(1), default=default, metavar="N", help=text)

    def add_clip(self, text: str = "export, Hugging Face folder, or open_clip MODEL[:TAG|:FILE]", **more: Any) -> None:
        """--clip CLIP: a CLIP model."""
        self.add_argument("--clip", metavar="CLIP", help=text, **more)

    def add_seed(self, text: str = "of all randomness") -> None:
        """--seed N."""
        self.add_argument("--seed", type=int, default=0, metavar="N", help=text)

    def add_workers(self, text: str = "processes; the result does not depend on them") -> None:
        """--workers N: one a core that the process may use unless given."""
        cores = len(os.sched_getaffinity(0))
        self.add_argument("--workers", type=at_least(1), default=cores, metavar="N", help=text)

    def add_device(self) -> None:
        """--device, which `dist.device` follows."""
        self.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="to compute on")

    def add_local_rank(self) -> None:
        """The argument that the deepspeed launcher adds."""
        self.add_argument("--local_rank", help=argparse.SUPPRESS)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """The arguments, those of the process by default. Positional ones may stand between flags."""
        given = sys.argv[1:] if args is None else args
        for flag in (one.partition("=")[0] for one in given):
            if flag.startswith("--") and flag not in self._option_string_actions:  # before what else is missing
                self.error(self._about(flag))
        found: argparse.Namespace = self.parse_intermixed_args(given, namespace)
        if getattr(found, "device", "auto") != "auto":
            os.environ["DS_ACCELERATOR"] = found.device
        return found

    def _about(self, unknown: str) -> str:
        """The line for an unknown argument, with the flag that was meant."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--") and flag != "--local_rank"]
        if _RENAMED.get(unknown) in flags:
            return f"{unknown} is called {_RENAMED[unknown]} since 0.2"
        near = difflib.get_close_matches(unknown, flags, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists the arguments"
        return f"unknown argument {unknown}; {hint}"

    def error(self, message: str) -> NoReturn:
        """Raise UserError in place of printing the usage."""
        message = message.removeprefix("argument ")
        missing = message.removeprefix("the following arguments are required: ")
        if missing == message:
            raise UserError(message)
        optional = {action.metavar or action.dest for action in self._actions if action.nargs == "*"}
        names = ", ".join(name for name in missing.split(", ") if name not in optional)
        raise UserError(f"missing: {names}; --help says more")
