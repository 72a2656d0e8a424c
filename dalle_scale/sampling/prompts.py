"""Captions to sample or to tell apart, out of files."""

from __future__ import annotations

import json
from pathlib import Path

from dalle_scale.types import UserError


def read(path: Path, what: str = "prompts") -> list[str]:
    """Captions of a text file, one a line, or of the rows of a .jsonl file, under "prompt"; without empty lines.

    Args:
        what: the captions are, for messages.

    Raises:
        UserError: the file cannot be read, or a row of it has no prompt.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the {what}: {error}") from None
    if path.suffix != ".jsonl":
        return lines
    try:
        return [str(json.loads(line)["prompt"]) for line in lines]
    except (ValueError, TypeError, KeyError):
        raise UserError(f'{path}: every line must be a JSON object with a "prompt"') from None
