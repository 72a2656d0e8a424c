"""Sources can be entered at any row, and give what filters ask for."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.sources import write_files, write_tar

from dalle_scale.curation import sources, tables
from dalle_scale.curation.items import Lost, Options


def csv_table(folder: Path) -> Path:
    rows = [{"path": f"{n}.png", "caption": f'says "{n}",\r\non two lines' if n % 3 else f"é {n}"} for n in range(50)]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["path", "caption"])
    writer.writeheader()
    for number, row in enumerate(rows):
        writer.writerow(row)
        text.write("\n" * (number % 4 == 1))
    path = folder / "table.csv"
    path.write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())
    return path


def jsonl_table(folder: Path) -> Path:
    path = folder / "table.jsonl"
    lines = [
        json.dumps({"file": f"{n}.png", "text": f"é {n}"}, ensure_ascii=False) + "\n" * (1 + n % 3) for n in range(50)
    ]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def parquet_table(folder: Path) -> Path:
    path = folder / "table.parquet"
    columns = {"image": [{"bytes": bytes([n]), "path": None} for n in range(50)], "text": [f"é {n}" for n in range(50)]}
    pq.write_table(pa.table({**columns, "unused": range(50)}), path, row_group_size=7)
    return path


def mixed_tar(folder: Path) -> Path:
    pairs = ({f"{n:02d}.png": bytes([n]), f"{n:02d}.txt": f"é {n}".encode()} for n in range(49))
    return write_tar(
        folder / "in.tar", {name: data for pair in pairs for name, data in pair.items()} | {"x.txt": b"lost"}
    )


@pytest.mark.parametrize("make", [csv_table, jsonl_table, parquet_table, mixed_tar])
def test_a_source_can_be_entered_at_any_row(make, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_STRIDE", 8)
    monkeypatch.setattr(tables, "_BATCH", 3)
    monkeypatch.setattr(sources, "_LISTING_ROWS", 8)
    path = make(tmp_path)
    opened = sources.Sources.open([path, path], tmp_path / "listing", Options())
    assert opened.num_rows == 100

    def told(start: int, stop: int) -> list[tuple]:
        rows = opened.rows(start, stop)
        return [(row.number, row.name, row.reason if isinstance(row, Lost) else row.caption) for row in rows]

    rows = told(0, 100)
    assert [row[0] for row in rows] == list(range(100)) and [row[1:] for row in rows[:50]] == [
        row[1:] for row in rows[50:]
    ]
    assert len({row[2] for row in rows}) == 50 and rows[3][2].endswith("3") and rows[48][2].endswith("48")
    if make is csv_table:
        assert rows[4][2] == 'says "4",\r\non two lines'
    rng = np.random.default_rng(0)
    for start, stop in [
        (0, 1),
        (7, 9),
        (49, 51),
        (99, 100),
        (50, 50),
        *np.sort(rng.integers(0, 101, (40, 2))).tolist(),
    ]:
        assert told(start, stop) == rows[start:stop]


def test_columns_for_filters_come_from_wherever_they_are(tmp_path):
    options = Options(other_columns=("punsafe",))
    beside = {"a.png": b"1", "a.txt": b"a", "a.json": b'{"punsafe": 0.5, "other": 1}', "b.png": b"2", "b.txt": b"b"}
    line = json.dumps({"file": "a.png", "caption": "a", "punsafe": 0.5, "other": 1}) + "\n"
    in_file = {"a.png": b"1", "captions.jsonl": line.encode()}
    (tmp_path / "c.csv").write_text("path,caption,punsafe,other\na.png,a,0.5,1\n")
    for number, path in enumerate(
        [write_files(tmp_path / "a", beside), write_files(tmp_path / "b", in_file), tmp_path / "c.csv"]
    ):
        opened = sources.Sources.open([path], tmp_path / str(number), options)
        first = next(opened.rows(0, 1))
        assert first.caption == "a" and {name: float(value) for name, value in first.columns.items()} == {
            "punsafe": 0.5
        }
