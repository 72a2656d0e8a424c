"""Shards of image codes, made of shards of images by a frozen tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle_scale import io, log
from dalle_scale.curation.shard_writer import Shard
from dalle_scale.data import codes as image_codes
from dalle_scale.data.decode import BadSample, decode
from dalle_scale.data.manifest import Manifest, index_path
from dalle_scale.data.reader import Reader, ahead
from dalle_scale.data.transforms import square


def encode_shards(
    source: Manifest,
    out: Path,
    image_size: int,
    encode: Callable[[Tensor], Tensor],
    batch_size: int,
    rank: int,
    world_size: int,
) -> None:
    """Make a shard of codes from every world_size-th shard of images, starting at `rank`; those that exist stay.

    Images are centre squares, uint8 [B, 3, S, S]. Captions are carried over. What cannot be read is left out and
    becomes a row of the shard's part of the ledger; `join_ledger` puts the parts together.

    Args:
        encode: images -> codes int64 [B, N].
    """
    batches = []  # (shard, samples, whether they are its last)
    for number in range(rank, source.num_shards, world_size):
        if not index_path(out, number).exists():
            samples = list(source.samples(number))
            chunks = [samples[at : at + batch_size] for at in range(0, len(samples), batch_size)]
            batches += [(number, chunk, chunk is chunks[-1]) for chunk in chunks]
    reader = Reader(source)
    shard: Shard | None = None
    lost: list[dict[str, Any]] = []  # of this shard
    with ThreadPoolExecutor(max_workers=1) as pool:
        loaded = ahead(pool, lambda batch: _load(reader, source, batch[1], image_size), batches)
        progress = log.progress(loaded, "encode", f"batches of {batch_size}", total=len(batches))
        for (number, _, last), (rows, images, bad) in zip(batches, progress, strict=True):
            shard = shard or Shard(out, number)
            values = encode(images).cpu().numpy() if rows else ()
            for (key, members), codes in zip(rows, values, strict=True):
                shard.add(key, {**members, image_codes.MEMBER: image_codes.pack(codes)})
            lost += bad
            if last:
                rows_left_out = "".join(json.dumps(row) + "\n" for row in lost)
                io.write(_ledger_part(out, number), rows_left_out)  # first: an index says that all is there
                shard.close()
                shard, lost = None, []
    reader.close()


def join_ledger(out: Path) -> None:
    """Make <out>/ledger.jsonl of the shards' parts, in their order, and remove the parts."""
    parts = sorted(_ledger_part(out, 0).parent.glob("*.jsonl"))
    io.write(out / "ledger.jsonl", "".join(part.read_text(encoding="utf-8") for part in parts))
    for part in parts:
        part.unlink()


def _ledger_part(out: Path, number: int) -> Path:
    return index_path(out, number).with_suffix(".jsonl")


def _load(
    reader: Reader, source: Manifest, samples: list[int], size: int
) -> tuple[list[tuple[str, dict[str, bytes]]], Tensor, list[dict[str, Any]]]:
    """Keys and captions of the good samples, their images, and ledger rows of the others."""
    rows, images, bad = [], [], []
    for sample in samples:
        try:
            members = {"txt": reader.read(sample, "txt")} if "txt" in source.members else {}
            images.append(square(decode(reader.read_image(sample)), size))
            rows.append((source.key(sample), members))
        except BadSample as error:
            bad.append({"shard": source.shard_url(sample), "key": source.key(sample), "reason": str(error)})
    stacked = np.stack(images) if images else np.zeros((0, size, size, 3), np.uint8)
    return rows, torch.from_numpy(stacked).permute(0, 3, 1, 2), bad
