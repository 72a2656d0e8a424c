"""Codes used and perplexity against brute force, in one process and over two ranks."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
from support.processes import in_ranks
from torch import Tensor

from dalle_scale import dist
from dalle_scale.nn.codebook_stats import UsageWindow, perplexity, psnr_db, used_share

VOCAB = 12


def micro_batch(index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [4, 9], mse [4], valid [4] of one seeded micro-batch, with an empty slot in some."""
    generator = torch.Generator().manual_seed(index)
    codes = (torch.rand(4, 9, generator=generator) ** 2 * (VOCAB - 2)).long()
    valid = torch.tensor([True, True, True, index % 2 == 0])
    return codes, 10 + 5 * torch.rand(4, generator=generator), valid


def brute_force(indices: list[int]) -> dict[str, float]:
    counts: Counter[int] = Counter()
    errors: list[float] = []
    for codes, mse, valid in map(micro_batch, indices):
        counts.update(codes[valid].flatten().tolist())
        errors += mse[valid].tolist()
    total = sum(counts.values())
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    psnr = 20 * math.log10(255) - 10 * math.log10(sum(errors) / len(errors))
    return {"codes_used": len(counts) / VOCAB, "perplexity": math.exp(entropy), "psnr_db": psnr}


def floats(values: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def test_perplexity_and_share() -> None:
    assert float(perplexity(torch.tensor([5, 5, 5, 5]))) == pytest.approx(4)
    assert float(perplexity(torch.tensor([9, 0, 0]))) == pytest.approx(1)
    assert float(used_share(torch.tensor([9, 0, 1, 0]))) == 0.5
    assert float(psnr_db(torch.tensor(255.0**2 / 100))) == pytest.approx(20)


def test_counts_valid_samples_of_all_micro_batches() -> None:
    window = UsageWindow(VOCAB, samples=1000)
    for index in range(3):
        window.add(*micro_batch(index))
    assert floats(window.close_chunk()) == pytest.approx(brute_force([0, 1, 2]))
    window.add(*micro_batch(3))
    assert floats(window.close_chunk()) == pytest.approx(brute_force([0, 1, 2, 3]))


def test_window_forgets_whole_chunks_that_it_does_not_need() -> None:
    window = UsageWindow(VOCAB, samples=8)
    for index in range(6):  # chunks of 4, 3, 4, 3, 4, 3 samples
        window.add(*micro_batch(index))
        values = window.close_chunk()
    assert floats(values) == pytest.approx(brute_force([3, 4, 5]))  # 4 + 3 would be too few


def test_levels_are_counted_apart() -> None:
    """Two levels of one and three codes a side, in one window, against a window for each."""
    both, top, bottom = UsageWindow(VOCAB, 8, grids=(1, 3)), UsageWindow(VOCAB, 8), UsageWindow(VOCAB, 8)
    for index in range(4):
        codes, mse, valid = micro_batch(index)
        both.add(torch.cat([codes[:, :1] // 2, codes], dim=1), mse, valid)
        top.add(codes[:, :1] // 2, mse, valid)
        bottom.add(codes, mse, valid)
        values, coarse, fine = (floats(window.close_chunk()) for window in (both, top, bottom))
        assert values.pop("psnr_db") == coarse.pop("psnr_db") == fine.pop("psnr_db")
        assert values == {f"{k}_1": v for k, v in coarse.items()} | {f"{k}_3": v for k, v in fine.items()}
        assert coarse != fine


def count_on_rank(rank: int, folder: str) -> None:
    """One of two ranks: even micro-batches on rank 0, odd ones on rank 1."""
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    window = UsageWindow(VOCAB, samples=1000)
    for index in range(rank, 6, 2):
        window.add(*micro_batch(index))
    torch.save(floats(window.close_chunk()), f"{folder}/{rank}.pt")
    dist.leave()


def test_is_global_over_ranks(tmp_path: Path) -> None:
    in_ranks(count_on_rank, str(tmp_path))
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True) == pytest.approx(brute_force(list(range(6))))
