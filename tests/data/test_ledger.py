"""The ledger: one row a lost sample, whoever writes and however often the sample is met again."""

import json
import multiprocessing

from dalle_scale.data.ledger import Ledger, read


def row(key: int, epoch: int = 0) -> dict:
    return {"shard": "s.tar", "key": str(key), "reason": "r", "epoch": epoch, "step": key}


def test_a_sample_is_written_once_an_epoch(tmp_path):
    path = tmp_path / "run" / "ledger.jsonl"
    Ledger(path).add([])
    assert not path.exists() and read(path) == []
    ledger = Ledger(path)
    ledger.add([row(1), row(2)])
    ledger.add([row(2), row(2, epoch=1)])
    Ledger(path).add([row(1), row(3), row(2, epoch=1)])
    assert [(r["key"], r["epoch"]) for r in read(path)] == [("1", 0), ("2", 0), ("2", 1), ("3", 0)]
    Ledger(None).add([row(1)])


def test_a_row_cut_in_the_middle_is_written_again(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).add([row(1), row(2)])
    path.write_bytes(path.read_bytes()[:-9])
    Ledger(path).add([row(1), row(2), row(3)])
    assert [r["key"] for r in read(path)] == ["1", "2", "3"]
    assert len(path.read_text().splitlines()) == 4, "the half row stands alone"


def write_many(path, first):
    ledger = Ledger(path)
    for key in range(first, first + 300):
        ledger.add([row(key)])


def test_processes_share_the_file(tmp_path):
    path = tmp_path / "ledger.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(path, first)) for first in (0, 1000, 2000)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 900
