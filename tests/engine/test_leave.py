"""The end of a program of several ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp

from dalle_scale import dist, log


def run(rank: int, folder: str) -> None:
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def main() -> None:
        dist.all_reduce(torch.ones(1))

    with pytest.raises(SystemExit) as ended:
        log.guarded(main)
    Path(folder, f"{rank}").write_text(f"{ended.value.code} {torch_dist.is_initialized()}")


def test_no_process_group_outlives_the_program(tmp_path):
    mp.spawn(run, (str(tmp_path),), nprocs=2)
    assert [(tmp_path / f"{rank}").read_text() for rank in range(2)] == ["0 False"] * 2
