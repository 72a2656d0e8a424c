"""Processes that read batches may die, hang or fail: batches come in order, once each, or one clear error does."""

import os
import signal
import time

import pytest

from dalle_scale.data import pool
from dalle_scale.data.pool import Pool
from dalle_scale.types import UserError

ROWS = 4


class IntArray:
    """Batch n is [n * ROWS ...]; `trouble` says what happens at which (batch, row), the first so many times."""

    def __init__(self, folder, trouble=None):
        self.folder = folder
        self.trouble = trouble or {}

    def read(self, number, retry_mode):
        values = []
        if number in self.trouble:
            os._exit(3)
        for row in range(ROWS):
            if retry_mode:
                if row in retry_mode.skip:
                    values.append(retry_mode.skip[row])
                    continue
                retry_mode.at_row(row)
            kind, times = self.trouble.get((number, row), ("", 0))
            if kind and self.met(number, row) <= times:
                self.act(kind)
            values.append(number * ROWS + row)
        return number, values, os.getpid()

    def met(self, number, row) -> int:
        """How often any process was here."""
        path = self.folder / f"{number}_{row}"
        with path.open("a") as file:
            file.write("x")
        return path.stat().st_size

    def act(self, kind):
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "exit":
            os._exit(3)
        if kind == "hang":
            time.sleep(3600)
        if kind == "user":
            raise UserError("this is wrong; do that")
        raise ValueError("a bug")


def run(reader, workers=2, start=0, stop=12):
    with Pool(reader, workers, preload=(pool.__name__,)) as processes:
        return list(processes.batches(start, stop))


def values(results):
    return [value for _, batch, _ in results for value in batch]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_come_in_order(tmp_path, workers):
    results = run(IntArray(tmp_path), workers, 3, 15)
    assert [number for number, _, _ in results] == list(range(3, 15))
    assert values(results) == list(range(3 * ROWS, 15 * ROWS))
    assert len({process for _, _, process in results}) == workers


@pytest.mark.parametrize("kind", ["die", "exit"])
def test_a_dead_process_is_replaced_and_nothing_is_lost(tmp_path, kind):
    reader = IntArray(tmp_path, {(2, 1): (kind, 1), (5, 0): (kind, 1), (11, 3): (kind, 1)})
    assert values(run(reader)) == list(range(12 * ROWS))


def test_what_was_sent_arrives_though_its_process_has_died_since(tmp_path):
    """Batch 3 ends every process that reads it, right after batch 2 was sent and before anybody took it."""
    trouble = {(3, row): ("die", 99) for row in range(ROWS)}
    with Pool(IntArray(tmp_path, trouble), 1, preload=(pool.__name__,)) as processes:
        results = []
        for result in processes.batches(0, 6):
            results.append(result)
            time.sleep(0.2)
    assert [number for number, _, _ in results] == list(range(6))
    assert [value for value in values(results) if isinstance(value, int)] == [*range(12), *range(16, 24)]


def test_processes_killed_from_outside_change_nothing(tmp_path):
    with Pool(IntArray(tmp_path), 2, preload=(pool.__name__,)) as processes:
        results = []
        for result in processes.batches(0, 40):
            results.append(result)
            if len(results) % 7 == 3:
                os.kill(result[2], signal.SIGKILL)
    assert values(results) == list(range(40 * ROWS))


def test_a_sample_that_ends_processes_again_and_again_is_left_out(tmp_path):
    results = run(IntArray(tmp_path, {(4, 2): ("die", 99), (6, 1): ("exit", 99)}))
    expected = list(range(12 * ROWS))
    expected[4 * ROWS + 2] = "ended the process that read it: signal 9"
    expected[6 * ROWS + 1] = "ended the process that read it: exit code 3"
    assert values(results) == expected


def test_a_hanging_process_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "PATIENCE_SECONDS", 4.0)  # a busy machine takes a second or two to start a process
    monkeypatch.setattr(pool, "_TICK_SECONDS", 0.2)
    assert values(run(IntArray(tmp_path, {(3, 0): ("hang", 1)}))) == list(range(12 * ROWS))


def test_what_cannot_be_mended_is_one_error(tmp_path):
    with pytest.raises(UserError, match=r"^this is wrong; do that$"):
        run(IntArray(tmp_path, {(1, 0): ("user", 99)}))
    with pytest.raises(AssertionError, match="a bug"):
        run(IntArray(tmp_path, {(1, 0): ("fail", 99)}))
    with pytest.raises(UserError, match=r"data\.workers: .* died 6 times in a row \(exit code 3\)"):
        run(IntArray(tmp_path, {7: "ends before its first row"}))


def test_many_fatal_samples_are_all_left_out(tmp_path):
    fatal = {(number, row): ("exit", 99) for number in (1, 2) for row in range(ROWS)}
    left = [value for value in values(run(IntArray(tmp_path, fatal), stop=4)) if isinstance(value, int)]
    assert left == [*range(ROWS), *range(3 * ROWS, 4 * ROWS)]


def test_nothing_stays_behind(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with Pool(IntArray(tmp_path), 2, preload=(pool.__name__,)) as processes:
            running = [worker.process.pid for worker in processes._workers]
            next(processes.batches(0, 1000))
        assert not any(os.path.exists(f"/proc/{pid}") for pid in running)
    assert len(os.listdir("/proc/self/fd")) <= before + 4, "the fork server stays, its workers' pipes do not"
