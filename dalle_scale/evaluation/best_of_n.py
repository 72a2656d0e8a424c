"""Gain of choosing by CLIP: the CLIP score of the best of N samples, as a function of N.

launch/sample.py samples C candidates for each prompt. What the best of N < C would score is estimated without sampling
subsets: of a random subset of N, the candidate in place k of C is the best with probability

    comb(C - k, N - 1) / comb(C, N)

so the mean over all subsets is a weighted sum over the ranked candidates (the expectation of an order statistic). It
has no bias for any N <= C: every subset of N independent candidates is itself a sample of N. The model that ranks and
the one that judges may differ; where they are the same, the score grows with N whatever the images look like.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_scale import dist, log
from dalle_scale.evaluation.clip import Row, Subject, embed_texts
from dalle_scale.sampling import rerank


def best_of_weights(candidates: int, number: int) -> Tensor:
    """Probability, float64 [candidates], that the candidate of each place, best first, is the best of a random subset
    of `number`; they add up to 1."""
    assert 1 <= number <= candidates, f"the best of {number} out of {candidates}"
    behind = torch.arange(candidates - 1, 0, -1, dtype=torch.float64)  # candidates after each place but the last
    ratios = (behind - number + 1) / behind  # of the next probability to this one: the binomials cancel
    first = torch.tensor([number / candidates], dtype=torch.float64)
    return torch.cat([first, ratios.clamp(min=0)]).cumprod(dim=0)


def numbers_of(candidates: int) -> list[int]:
    """1, 2, 4, ... and `candidates` itself."""
    powers = [2**power for power in range(candidates.bit_length()) if 2**power < candidates]
    return [*powers, candidates]


def score_samples(subject: Subject, folder: Path, rows: Sequence[dict[str, Any]], batch: int) -> Tensor:
    """Cosines float32 [R] of samples (`rerank.read_samples`) and their prompts (a collective).

    Raises:
        UserError: an image cannot be read; the vector of a prompt is not finite.
    """
    starts = range(0, len(rows), batch)[dist.rank() :: dist.world_size()]
    parts = {}
    for start in log.progress(starts, subject.name, f"batches of {batch}", len(starts)):
        images = rerank.read_images([folder / row["file"] for row in rows[start : start + batch]])
        parts[start] = subject.scorer.image_vectors(images)
    width = torch.tensor(max((part.shape[1] for part in parts.values()), default=0))
    dimensions = int(dist.all_reduce(width, "max"))  # a rank may have had nothing to do
    texts = embed_texts(subject, [row["prompt"] for row in rows], dimensions, batch)
    scores = torch.zeros(len(rows))
    for start, part in parts.items():
        scores[start : start + len(part)] = (part * texts[start : start + len(part)]).sum(dim=1)
    return dist.all_reduce(scores)


def best_of(rows: Sequence[dict[str, Any]], scores: Mapping[str, Tensor]) -> list[Row]:
    """The score of the best of N for N = 1, 2, 4, ... up to the candidates of the prompt that has the fewest.

    Args:
        rows: samples.
        scores: name of the model -> scores [R]. Each model ranks once and judges once.

    Returns:
        A row for each model that ranks, model that judges, and N: `ranked_by`, `judged_by`, `best_of`; `score`, the
        mean over prompts; `standard_error` of it, from how it differs between prompts; `gain`, how much more it is than
        that of one candidate, and `gain_standard_error`. The errors are None where there is one prompt.

    Raises:
        UserError: a score is NaN.
    """
    prompts: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        prompts.setdefault(row["prompt_index"], []).append(place)
    numbers = numbers_of(min(map(len, prompts.values())))
    table = []
    for ranked_by, keys in scores.items():
        ranked = [[p[k] for k in rerank.order(keys[p], [rows[i]["seed"] for i in p])] for p in prompts.values()]
        for judged_by, values in scores.items():
            one = _expected(values, ranked, 1)
            for number in numbers:
                per_prompt = _expected(values, ranked, number)
                row = {"ranked_by": ranked_by, "judged_by": judged_by, "best_of": number}
                row |= {"score": float(per_prompt.mean()), "standard_error": _error(per_prompt)}
                row |= {"gain": float((per_prompt - one).mean()), "gain_standard_error": _error(per_prompt - one)}
                table.append(row)
    return table


def _expected(values: Tensor, ranked: Sequence[Sequence[int]], number: int) -> Tensor:
    """Expected value float64 [prompts] of the best of a random `number`, of places ranked best first."""
    means = [(best_of_weights(len(places), number) * values[places].double()).sum() for places in ranked]
    return torch.stack(means)


def _error(per_prompt: Tensor) -> float | None:
    """Standard error of the mean over prompts."""
    return float(per_prompt.std() / math.sqrt(len(per_prompt))) if len(per_prompt) > 1 else None
