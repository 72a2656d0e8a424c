"""Kept memory of CPU tensors: nothing is given out twice, what is free grows together again, the rest stays as it was.
Each test has a process of its own, because a process keeps its allocator."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import HANG_SECONDS

ROOT = Path(__file__).parents[2]
BEGIN = """
import random, threading
import numpy as np
import torch
from dalle_scale.nn.kept_memory import keep_memory
torch.set_num_threads(1)  # OpenMP does not outlive a fork
before = torch.arange(2**18)
assert keep_memory() and keep_memory()
MIB = 2**20

def block(mib):
    return torch.empty(int(mib * MIB), dtype=torch.uint8)
"""
NOT_TWICE = """
def work(seed):
    draw, live = random.Random(seed), {}
    for number in range(1500):
        if live and draw.random() < 0.45 + 0.1 * (number % 300 > 150):
            mark, tensor = live.pop(draw.choice(list(live)))
            assert (tensor == mark).all()
        else:
            mark = draw.randrange(256)
            live[number] = mark, torch.full((int(2 ** draw.uniform(10, 20)),), mark, dtype=torch.uint8)
    for mark, tensor in live.values():
        assert (tensor == mark).all()
    done.append(seed)

done = []
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert sorted(done) == [0, 1, 2]
"""
GROWS_TOGETHER = """
whole = block(16)
start = whole.data_ptr()
del whole
for order in ([0, 1, 2, 3], [3, 1, 0, 2], [1, 3, 2, 0]):
    quarters = dict(enumerate(block(4) for _ in range(4)))
    assert [quarter.data_ptr() - start for quarter in quarters.values()] == [0, 4 * MIB, 8 * MIB, 12 * MIB]
    for index in order:
        del quarters[index]
    whole = block(16)
    assert whole.data_ptr() == start
    del whole
"""
SMALLEST_THAT_FITS = """
blocks = [block(mib) for mib in (8, 1, 4, 1, 2, 1)]
places = [one.data_ptr() for one in blocks]
for index in (0, 2, 4):
    blocks[index] = None
assert [block(mib).data_ptr() for mib in (1.5, 3, 5)] == [places[4], places[2], places[0]]
"""
OTHER_WAYS = """
array = block(1).fill_(7).numpy()
assert (array == 7).all()  # its tensor is gone
grown = block(1).fill_(5)
grown.resize_(3 * MIB)
assert (grown[:MIB] == 5).all()
torch.from_numpy(np.zeros(MIB)).sum()
assert torch.empty(0).numel() == 0 and torch.zeros(2).sum() == 0
assert before.sum() == 2**17 * (2**18 - 1)
del before, grown
try:
    torch.empty(2**60, dtype=torch.uint8)
except RuntimeError as error:
    assert "allocate" in str(error)
else:
    raise AssertionError
(torch.randn(500, 500) @ torch.randn(500, 500)).sum()
"""
FORK = """
import os
kept = block(2).fill_(3)
stop = threading.Event()

def busy():
    while not stop.is_set():
        block(0.1)

thread = threading.Thread(target=busy, daemon=True)  # a failure ends the program
thread.start()
for number in range(30):
    child = os.fork()
    if child == 0:
        other = block(2).fill_(4)
        os._exit(0 if (kept == 3).all() and (other == 4).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
thread.join()
"""
PROFILER = """
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
    one = block(2)
    del one
sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
assert 2 * MIB in sizes and -2 * MIB in sizes
"""
CASES = {name: text for name, text in globals().items() if name.isupper() and isinstance(text, str) and name != "BEGIN"}


def run(program: str, **environment: str) -> None:
    line = [sys.executable, "-c", program]
    limits = {"capture_output": True, "text": True, "timeout": HANG_SECONDS}
    done = subprocess.run(line, cwd=ROOT, env=os.environ | environment, **limits)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("c++") is None or sys.platform != "linux", reason="no C++ compiler")
@pytest.mark.parametrize("case", CASES)
def test_kept_memory(case: str) -> None:
    run(BEGIN + CASES[case], DALLE_SCALE_COMPILE="1")


def test_done_without() -> None:
    program = "from dalle_scale.nn.kept_memory import keep_memory; assert not keep_memory()"
    run(program, DALLE_SCALE_COMPILE="0")
