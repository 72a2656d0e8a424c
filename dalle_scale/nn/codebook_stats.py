"""Codebook usage: counts of codes over a window of samples and over all ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from dalle_scale import dist


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy) of the code frequencies: [K] counts -> scalar in 1..K; K when all are used equally often."""
    p = counts.double() / counts.sum()
    return torch.exp(-torch.special.xlogy(p, p).sum())


def used_share(counts: Tensor) -> Tensor:
    """Share of the K codes that occur at all: [K] counts -> scalar in 0..1."""
    return (counts > 0).double().mean()


class UsageWindow:
    """Code counts and squared error of the last `samples` samples or a little more, over all ranks.

    `add` collects on this rank without communication or waiting; `close_chunk` sums over the ranks once and forgets
    what is older than the window. The window is not part of a checkpoint: it starts empty on resume.
    """

    def __init__(self, vocab: int, samples: int, grids: Sequence[int] = ()) -> None:
        """grids: codes along a side of each level, where there are several; the values' names then end in these."""
        self.vocab = vocab
        self.samples = samples
        self._endings = [f"_{grid}" for grid in grids] or [""]
        self._sizes = [grid**2 for grid in grids]
        # float64 [levels K + 2]: counts of each level, sum of the samples' mean squared errors, samples
        self._chunk: Tensor | None = None
        self._chunks: deque[Tensor] = deque()

    def add(self, codes: Tensor, mse: Tensor, valid: Tensor) -> None:
        """Count a micro-batch: codes int64 [B, N] (level after level), mse [B] on the 0..255 scale, valid bool [B]
        (False = empty slot)."""
        if self._chunk is None:
            self._chunk = torch.zeros(len(self._endings) * self.vocab + 2, dtype=torch.float64, device=codes.device)
        counted = valid.double()
        for level, part in enumerate(codes.split(self._sizes or codes.shape[1], dim=1)):
            places = level * self.vocab + part.flatten()
            self._chunk.index_add_(0, places, counted[:, None].expand_as(part).flatten())
        self._chunk[-2] += (mse.double() * counted).sum()
        self._chunk[-1] += counted.sum()

    def close_chunk(self) -> dict[str, Tensor]:
        """Sum over all ranks (a collective) and describe the window: codes_used (share) and perplexity of each level,
        psnr_db."""
        assert self._chunk is not None, "nothing was counted"
        self._chunks.append(dist.all_reduce(self._chunk))
        self._chunk = None
        sizes = torch.stack([chunk[-1] for chunk in self._chunks]).tolist()
        while sum(sizes[1:]) >= self.samples:
            self._chunks.popleft()
            sizes.pop(0)
        total = torch.stack(list(self._chunks)).sum(dim=0)
        values: dict[str, Tensor] = {}
        for ending, counts in zip(self._endings, total[:-2].split(self.vocab), strict=True):
            values |= {f"codes_used{ending}": used_share(counts), f"perplexity{ending}": perplexity(counts)}
        return {**values, "psnr_db": psnr_db(total[-2] / total[-1])}


def psnr_db(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in decibels from a mean squared error on the 0..255 scale; inf when it is 0."""
    return 10 * torch.log10(255.0**2 / mse)
