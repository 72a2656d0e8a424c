"""Sampling the images of a store, each batch while the one before it is decoded, scored and saved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from dalle_scale import dist, log
from dalle_scale.sampling import rerank
from dalle_scale.sampling.output_folder import Place, Store
from dalle_scale.sampling.rerank import Scorer
from dalle_scale.sampling.sampler import Batch, Sampler
from dalle_scale.types import StrictModel

SCORED_TOGETHER = 64  # images; as launch/rerank.py does
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"


@dataclass
class Scores:
    """CLIP scores of the images of a store, as far as they are known to this rank."""

    scorer: Scorer
    store: Store
    values: Tensor = field(init=False)  # float32 [images of the store], 0 where not known

    def __post_init__(self) -> None:
        self.values = torch.zeros(len(self.store.places))

    def add(self, batch: Batch, images: Tensor) -> None:
        """Score images uint8 [B, 3, H, W]."""
        at = self._at(zip(batch.prompt_index, batch.candidate, strict=True))
        captions = [self.store.prompts[index] for index in batch.prompt_index]
        for start in range(0, len(at), SCORED_TOGETHER):
            part = slice(start, start + SCORED_TOGETHER)
            self.values[at[part]] = self.scorer.score(images[part], captions[part])

    def add_saved(self, places: Sequence[Place]) -> None:
        """Score images that are there from their files. Raises UserError."""
        if at := self._at(places):
            rows = self.store.rows()
            self.values[at] = rerank.score(self.scorer, self.store.folder, [rows[i] for i in at], SCORED_TOGETHER)

    def _at(self, places: Iterable[Place]) -> list[int]:
        return [index * self.store.candidates + candidate for index, candidate in places]

    def collected(self) -> Tensor:
        """The scores of all ranks, each of which knows other ones (a collective). Says if captions were cut."""
        if any(dist.sum_on_host([self.scorer.truncated_captions])):
            log.say("some captions are longer than this CLIP reads: it saw only their beginning")
        return dist.all_reduce(self.values)


def sample(
    sampler: Sampler,
    options: StrictModel,
    store: Store,
    missing: Sequence[Place],
    scores: Scores | None = None,
    batch_size: int | None = None,
    prime: Tensor | None = None,
) -> None:
    """Sample and save this rank's share of what is missing, and score its share of all images.

    On a GPU a thread with a stream of its own decodes, scores and saves one batch while the next is sampled. On CPUs
    all that computes wants the same cores, so there the thread only saves.

    Raises:
        Exception: that of the thread, once the batch in work is sampled.
    """
    if scores is not None:
        scores.add_saved(_share(sorted(set(store.places) - set(missing))))
    batches = sampler.batches(store.prompts, _share(missing), store.seed, options, batch_size, prime)
    on_gpu = sampler.device.type == "cuda"
    stream = torch.cuda.Stream(sampler.device) if on_gpu else None  # type: ignore[no-untyped-call]

    def develop(batch: Batch, sampled: Tensor) -> Tensor:
        images = sampler.decode(sampled)
        if scores is not None:
            scores.add(batch, images)
        return images

    def save(batch: Batch, images: Tensor) -> None:
        for image in zip(batch.prompt_index, batch.candidate, images, strict=True):
            store.save(*image)

    def develop_and_save(batch: Batch, sampled: Tensor) -> None:
        with torch.cuda.stream(stream):
            images = develop(batch, sampled)
        save(batch, images)

    earlier: Future[None] | None = None
    with ThreadPoolExecutor(max_workers=1) as thread, progress_bar(sum(len(batch.seed) for batch in batches)) as bar:
        for batch in batches:
            on_code = partial(advance, bar, bar.n, len(batch.seed))
            sampled = sampler.sample_batch(batch, on_code)
            on_code(1, 1)  # for samplers that do not call it
            job = partial(develop_and_save, batch, sampled) if on_gpu else partial(save, batch, develop(batch, sampled))
            if earlier is not None:
                earlier.result()
            earlier = thread.submit(job)
        if earlier is not None:
            earlier.result()


def _share(items: Sequence[Place]) -> Sequence[Place]:
    """Share of this rank."""
    rank, world_size = dist.rank(), dist.world_size()
    return items[rank * len(items) // world_size : (rank + 1) * len(items) // world_size]


def progress_bar(samples: int) -> tqdm[NoReturn]:
    """A bar of images sampled, with their rate and the time left; counts parts of images too."""
    return tqdm(
        desc="sample", unit=" images", total=samples, disable=not dist.is_main(), mininterval=0.5, bar_format=_BAR
    )


def advance(bar: tqdm[NoReturn], before: float, samples: int, sampled: int, num_codes: int) -> None:
    """Show that `sampled` of `num_codes` codes of a batch of images are done, and `before` images before it."""
    bar.update(before + samples * sampled / num_codes - bar.n)
