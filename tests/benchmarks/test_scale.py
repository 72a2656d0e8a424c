"""A data set a thousand times larger costs little more to open, and reading on does not grow memory."""

import json
import subprocess
import sys

import pytest
from support.processes import ROOT, environment


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    command = [sys.executable, ROOT / "benchmarks" / "data_scale.py", f"--folder={folder / 'data'}"]
    command += [f"--out={folder / 'result.json'}", "--shards=5000", "--flat-samples=40000", "--epochs=20"]
    subprocess.run(command, check=True, env=environment(), capture_output=True)
    return json.loads((folder / "result.json").read_text())


def test_cost_of_state_and_opening(measured):
    small, large = measured["resume"]["10000"], measured["resume"]["50000000"]
    assert large["state_bytes"] <= 1024
    assert large["memory_mib"] - small["memory_mib"] < 100


def test_memory_and_files_stay_flat(measured):
    for rows in measured["flat"].values():
        later = rows[len(rows) // 2 :]
        assert later[-1]["memory_mib"] - later[0]["memory_mib"] < 8
        assert later[-1]["open_files"] <= later[0]["open_files"] + 4, "a shard more, and no more"
