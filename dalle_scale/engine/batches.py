"""Global batches as the loop sees them: the stream, the balance of weights over ranks, means of what is logged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from dalle_scale import dist
from dalle_scale.types import Batch, Losses


class Stream(Protocol):
    """Global batches, of which this rank delivers its micro-batches."""

    @property
    def num_samples(self) -> int:
        """Samples of the data set."""

    def batches(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Micro-batches of the global batches start .. stop - 1, on the CPU; weight 0 in empty slots, else 1."""

    def state(self, next_batch: int) -> dict[str, Any]:
        """The state to resume at `next_batch`."""


class Means:
    """Weighted means of loss terms over micro-batches and ranks, summed on the device until somebody looks."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, losses: Losses, weight: float = 1.0, prefix: str = "") -> None:
        """Count one micro-batch: its terms, and its total as "loss"."""
        for name, term in {"loss": losses.total.detach(), **losses.terms}.items():
            key = prefix + name
            self._sums[key] = self._sums.get(key, 0.0) + term * weight
            self._weights[key] = self._weights.get(key, 0.0) + weight

    def close(self) -> dict[str, float]:
        """The means over all ranks; start anew. Collective."""
        if not self._sums:
            return {}
        means = torch.stack([total.double() / self._weights[name] for name, total in self._sums.items()])
        values = dict(zip(self._sums, dist.all_reduce(means, "mean").tolist(), strict=True))
        self._sums, self._weights = {}, {}
        return values


def balance(micro_batches: list[Batch], global_batch_size: int, *flags: float) -> list[float]:
    """Scale the weights so that their mean over the global batch is 1: empty slots then change no mean. Collective.

    Returns:
        How many samples of the global batch are not empty, then each of `flags` summed over the ranks.
    """
    weight = sum(float(batch["weight"].sum()) for batch in micro_batches)
    samples, *sums = dist.sum_on_host([weight, *flags])
    if 0 < samples < global_batch_size:
        for batch in micro_batches:
            batch["weight"] = batch["weight"] * (global_batch_size / samples)
    return [samples, *sums]


def to_device(batch: Batch) -> Batch:
    """The batch where this rank computes."""
    return {key: tensor.to(dist.device(), non_blocking=True) for key, tensor in batch.items()}
