"""Delivers batches of a stream and writes down what they hold: the program that test_exactly_once.py kills.

    python -m support.deliver FOLDER TEXT_MODEL OUT --world-size 2 --workers 1 --stop 40

All ranks are built in this process. Goes on from the state in <out>/state.json, which is saved every third batch; each
batch becomes a line "number sha256" of <out>/digests, each bad sample a row of <out>/ledger.jsonl. --killed-after 5 is
for SIGKILL to it and all processes of its group when it has written five lines.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
from pathlib import Path

import torch

from dalle_scale.config import DataConfig
from dalle_scale.data.pipeline import Stream, open_stream
from dalle_scale.types import Batch, BatchSpec

BATCH_SIZE = 168  # divides by every world size of the tests
INPUTS = BatchSpec(
    image_size=8, augment="dvae", text_length=6, text_vocab=300, bpe_dropout=0.2, num_codes=9, code_vocab=50
)


def open_ranks(
    folder: str,
    text_model: str,
    world_size: int,
    workers: int,
    micro: int,
    ledger: Path | None = None,
    threads: int = 1,
) -> list[Stream]:
    """The streams of all ranks."""
    config = DataConfig(
        train=folder,
        text_tokenizer=text_model,
        workers=workers,
        threads=threads,
        max_bad_share=1.0,
        window_shards=3,
    )
    return [
        open_stream(
            config,
            folder,
            INPUTS,
            seed=1,
            global_batch_size=BATCH_SIZE,
            micro_batch_size=micro,
            rank=rank,
            world_size=world_size,
            train=True,
            ledger=ledger,
        )
        for rank in range(world_size)
    ]


def merged(ranks: list[list[Batch]]) -> Batch:
    """A global batch, put together from the micro-batches of all ranks."""
    parts = [rank[micro] for micro in range(len(ranks[0])) for rank in ranks]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def digest(batch: Batch) -> str:
    """sha256 of everything a batch holds."""
    sha = hashlib.sha256()
    for key in sorted(batch):
        sha.update(key.encode() + batch[key].contiguous().numpy().tobytes())
    return sha.hexdigest()


def main() -> None:
    """Go on until the batch --stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("text_model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--world-size", type=int)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--stop", type=int)
    parser.add_argument("--killed-after", type=int)
    args = parser.parse_args()
    ranks = open_ranks(
        args.folder,
        args.text_model,
        args.world_size,
        args.workers,
        BATCH_SIZE // args.world_size,
        args.out / "ledger.jsonl",
    )
    path = args.out / "state.json"
    start = 0
    if path.exists():
        state = json.loads(path.read_text())
        for rank in ranks:
            rank.check(state)
        start = state["next_batch"]
    iterators = [rank.batches(start, args.stop) for rank in ranks]
    with (args.out / "digests").open("a") as lines:
        for number in range(start, args.stop):
            batch = merged([next(iterator) for iterator in iterators])
            lines.write(f"{number} {digest(batch)}\n")
            lines.flush()
            if number - start + 1 == args.killed_after:
                os.killpg(0, signal.SIGKILL)
            if number % 3 == 2 or number + 1 == args.stop:
                temporary = path.with_suffix(".tmp")
                temporary.write_text(json.dumps(ranks[0].state(number + 1)))
                temporary.replace(path)


if __name__ == "__main__":
    main()
