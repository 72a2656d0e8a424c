"""Images of a data set from the network: the `Fetch` that chunks.py takes, on top of fetch.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from dalle_scale.curation.download.client import FetchOptions, fetch
from dalle_scale.curation.download.policy import may_pass
from dalle_scale.curation.items import Row, pick
from dalle_scale.types import UserError


@dataclass(frozen=True)
class Downloads:
    """Fetches the url that each row has in its columns. Is pickled to worker processes."""

    url_columns: tuple[str, ...]  # the first that has a value
    options: FetchOptions
    retried: Path | None = None  # a finished data set of the same rows: only what failed there is fetched

    def __call__(self, rows: Iterator[Row]) -> Iterator[tuple[Row, bytes | str]]:
        """Each row, in order, with the body or the reason why there is none.

        Raises:
            UserError: the data set in `retried` has other rows.
        """
        chunk = list(rows)
        reasons = dict(self._not_retried(chunk)) if self.retried else {}
        urls = [(row.number, pick(row.columns, self.url_columns)) for row in chunk if row.number not in reasons]
        with closing(fetch(urls, self.options)) as results:
            for row in chunk:
                if row.number in reasons:
                    yield row, reasons[row.number]
                else:
                    result = next(results)
                    yield row, result.body or result.reason

    def _not_retried(self, chunk: list[Row]) -> Iterator[tuple[int, str]]:
        """Number and reason of the rows that are in the data set, or whose failure will not pass."""
        assert self.retried is not None
        place = -1
        table: list[dict[str, str]] = []
        for row in chunk:
            number, position = divmod(row.number, rows_per_table(self.retried))
            if number != place:
                path = rows_table(self.retried, number)
                columns = ["name", "status"]
                table = pq.read_table(path, columns=columns, use_threads=False).to_pylist() if path.exists() else []
                place = number
            if position >= len(table) or table[position]["name"] != row.name:
                raise UserError(f"{self.retried}: not made of this list: its row {row.number} is not {row.name[:100]}")
            status = table[position]["status"]
            if not may_pass(status):
                yield row.number, f"not retried: {status}"


def rows_table(folder: Path, number: int) -> Path:
    """Path of a table with the fates of some rows of a data set."""
    return folder / "rows" / f"{number:06d}.parquet"


def rows_per_table(folder: Path) -> int:
    """Number of rows of each of these tables; the last may have fewer. Raises UserError if there are none."""
    path = rows_table(folder, 0)
    if not path.exists():
        raise UserError(f"{folder}: no finished data set: {path} is missing")
    return max(1, int(pq.read_metadata(path).num_rows))
