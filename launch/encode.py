"""Encode a data set of images into a data set of image codes, captions carried over.

    deepspeed --num_gpus 8 launch/encode.py --tokenizer runs/dvae/export --data runs/data/train --out runs/codes/train

Training on codes then neither decodes an image nor runs the tokenizer. Each shard of images becomes one shard of
codes; ranks take the shards in turn and write the same files at any number of ranks. The same command resumes.
Images are centre squares, seen once: the paper augments before it encodes (arXiv 2102.12092, Sec. 2.3).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from dalle_scale import dist, io, log
from dalle_scale.arguments import Parser
from dalle_scale.checkpoint import export
from dalle_scale.curation import encode, shard_writer
from dalle_scale.data import codes, manifest
from dalle_scale.data.manifest import Manifest
from dalle_scale.nn import precision
from dalle_scale.types import UserError


def main() -> None:
    """Check, encode this rank's shards, then let rank 0 write the manifest."""
    args = parse_args()
    source = Manifest.open(args.data)
    there = begun(args.out)
    dtype = there.get("dtype", "fp32") if args.dtype == "auto" and there else args.dtype  # work continues as it began
    opened = export.load(args.tokenizer, dist.device(), dtype)
    tokenizer = export.tokenizer_of(opened)
    if not source.holds_images:
        raise UserError(f"{args.data}: no images in this data set; it holds: {', '.join(source.members)}")
    if tokenizer.vocab > codes.MAX_VOCAB:
        raise UserError(f"{args.tokenizer}: vocabulary {tokenizer.vocab}; code shards hold at most {codes.MAX_VOCAB}")
    info = {
        "kind": "codes",
        "vocab": tokenizer.vocab,
        "grids": list(tokenizer.grids),
        "image_size": tokenizer.image_size,
        "source": source.digest,
        "tokenizer": digest_of(args.tokenizer),
        **({"dtype": opened.dtype} if opened.dtype != "fp32" else {}),
    }
    if is_done(args.out, info):
        plan_path(args.out).unlink(missing_ok=True)  # a run that was stopped between its last two lines
        log.say(f"{args.out}: complete already")
        return
    dist.join()
    if dist.is_main():
        plan_path(args.out).parent.mkdir(parents=True, exist_ok=True)
        io.write_json(plan_path(args.out), info)
    dist.barrier()
    encode.encode_shards(
        source,
        args.out,
        tokenizer.image_size,
        lambda images: tokenizer.encode(images.to(dist.device())),
        args.batch_size,
        dist.rank(),
        dist.world_size(),
    )
    dist.barrier()
    if dist.is_main():
        encode.join_ledger(args.out)
        shard_writer.commit(args.out, info)
        plan_path(args.out).unlink()
        kept = Manifest.open(args.out).num_samples
        log.say(f"{args.out}: {kept:,} samples of {codes.describe(tokenizer.grids)}")
        if kept < source.num_samples:
            log.say(f"left out: {source.num_samples - kept:,}, see {args.out / 'ledger.jsonl'}")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="export of an image tokenizer")
    parser.add_data("folder of a data set with images")
    parser.add_out("folder of the data set of codes")
    parser.add_batch_size("images at once", 256)
    parser.add_device()
    parser.add_argument("--dtype", choices=precision.ASKED, default="fp32", help="of the tokenizer")
    parser.add_local_rank()
    return parser.parse_args()


def plan_path(out: Path) -> Path:
    """Says what unfinished work is about."""
    return out / "unfinished.json"


def begun(out: Path) -> Any:
    """Data set whose codes `out` holds or began to hold; None if there is none."""
    if (out / manifest.NAME).exists():
        return Manifest.open(out).info
    return json.loads(plan_path(out).read_text(encoding="utf-8")) if plan_path(out).exists() else None


def is_done(out: Path, info: dict[str, Any]) -> bool:
    """Whether `out` holds the finished result. Raises UserError if it holds anything else than this work."""
    if begun(out) not in (None, info):
        raise UserError(f"{out}: holds codes of other images or another tokenizer; delete it or choose another --out")
    return (out / manifest.NAME).exists()


def digest_of(folder: Path) -> str:
    """sha256 over the names and bytes of all files of an export."""
    sha = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sha.update(path.relative_to(folder).as_posix().encode())
        sha.update(path.read_bytes())
    return sha.hexdigest()


if __name__ == "__main__":
    log.guarded(main)
