"""Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence


def markdown(rows: Sequence[Sequence[str]], text_columns: Collection[int] = (0,)) -> list[str]:
    """Return the lines of a Markdown table.

    Args:
        rows: the first holds the titles; `|` and line breaks in a cell are escaped.
        text_columns: indices of the columns that stand at the left; all others hold numbers.
    """
    head, *body = (f"| {' | '.join(map(_escape, row))} |" for row in rows)
    rule = ("---" if column in text_columns else "---:" for column in range(len(rows[0])))
    return [head, f"| {' | '.join(rule)} |", *body]


def _escape(cell: str) -> str:
    return re.sub(r"\r\n|[\r\n]", "<br>", re.sub(r"(\\*)\|", r"\1\1\\|", cell))
