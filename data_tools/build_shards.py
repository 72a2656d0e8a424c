"""Turn captioned images, however they lie around, into shards that training reads.

    python data_tools/build_shards.py SOURCE... --out runs/data [--size 64] [--valid-share 0.02]

A SOURCE is one of
    a folder of images, each with its caption beside it (x.jpg + x.txt), or with a captions file in it
    a tar of the same: captions.jsonl inside (file + caption), or x.txt beside x.jpg (webdataset, img2dataset's output)
    a folder of such tars
    a CSV, TSV, JSONL or parquet table with columns for path and caption; in parquet also the image bytes themselves
`--caption-template "a photo of a {folder}"` makes captions from folder names where there is no other caption.

Writes <out>/train and, with --valid-share, <out>/valid: samples go there by a hash of their name. Every input ends
either in a shard or, with the reason, as a line of <out>/ledger.jsonl. The same input gives the same bytes on every
run. Nothing is downloaded; img2dataset does that well, and its output is a source.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from PIL import Image

from dalle_scale import log
from dalle_scale.data.decode import Pixels, decode, extension
from dalle_scale.data.reader import BadSample
from dalle_scale.data.shards import ShardWriter
from dalle_scale.data.sources import CAPTION_COLUMNS, IMAGE_COLUMNS, Item, Options, expand, read_source
from dalle_scale.data.transforms import square
from dalle_scale.types import UserError

JPEG_QUALITY = 95


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--size", type=int, help="store centre squares of this side in pixels; default: as they are")
    parser.add_argument("--min-side", type=int, default=1, help="leave out images with a shorter side, in pixels")
    parser.add_argument("--valid-share", type=float, default=0.0, help="share of the samples that is held out")
    parser.add_argument("--samples-per-shard", type=int, default=10_000)
    parser.add_argument("--caption-template", help="caption where there is none; {folder} is the image's folder")
    parser.add_argument("--image-column", help=f"default: the first of {', '.join(IMAGE_COLUMNS)}")
    parser.add_argument("--caption-column", help=f"default: the first of {', '.join(CAPTION_COLUMNS)}")
    parser.add_argument("--root", type=Path, help="folder that relative paths start from; default: the table's own")
    parser.add_argument("--overwrite", action="store_true", help="replace the data set that is there")
    args = parser.parse_args(arguments)
    if not 0 <= args.valid_share < 1 or min(args.size or 1, args.min_side, args.samples_per_shard) < 1:
        raise UserError("--valid-share is a share in [0, 1); --size, --min-side and --samples-per-shard are at least 1")
    options = Options(
        image_columns=(args.image_column,) if args.image_column else IMAGE_COLUMNS,
        caption_columns=(args.caption_column,) if args.caption_column else CAPTION_COLUMNS,
        root=args.root,
        caption_template=args.caption_template,
    )
    warnings.filterwarnings("ignore", module="PIL")  # what Pillow only warns of it decodes; the rest is in the ledger
    build(args, options)


def build(args: argparse.Namespace, options: Options) -> None:
    """Read all sources, write shards and ledger, print the counts."""
    reasons: Counter[str] = Counter()
    keys: set[str] = set()
    with ExitStack() as stack:
        info = {"kind": "images", "size": args.size}
        writers = {
            split: stack.enter_context(ShardWriter(args.out / split, args.samples_per_shard, info, args.overwrite))
            for split in (("train", "valid") if args.valid_share else ("train",))
        }
        ledger = stack.enter_context((args.out / "ledger.jsonl").open("w"))
        for path, name, item in every_item(args.sources, options):
            try:
                members = make_members(*item.load(), args.size, args.min_side)
            except BadSample as error:
                reasons[str(error).partition(":")[0]] += 1
                row = {"source": str(path), "name": item.name, "reason": str(error)}
                ledger.write(json.dumps(row) + "\n")
            else:
                stem = os.path.splitext(name)[0]
                key = make_key(stem, name, keys)
                keys.add(key)
                writers["valid" if share_of(stem) < args.valid_share else "train"].add(key, members)
        for reason, count in reasons.most_common():
            log.say(f"left out: {count:,} x {reason}")
    for split, writer in writers.items():
        log.say(f"{args.out / split}: {writer.num_samples:,} samples")


def every_item(sources: Iterable[Path], options: Options) -> Iterator[tuple[Path, str, Item]]:
    """(source, name among all sources, row) for all rows, with one progress bar a source."""
    paths = list(expand(sources))
    for number, path in enumerate(paths, start=1):
        total, items = read_source(path, options)
        several = len(paths) > 1
        what = f"{path.name} ({number} of {len(paths)})" if several else path.name
        for item in log.progress(items, what, "images", total=total):
            yield path, f"{path.stem}/{item.name}" if several else item.name, item


def make_key(stem: str, name: str, taken: set[str]) -> str:
    """A key from the name without extension; a hash is added where characters had to go or the key is taken (x.jpg and
    x.png; a table with several captions an image)."""
    key = clean = re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:100]
    for repeat in itertools.count():
        if key not in taken and (key == stem or repeat):
            return key
        key = f"{clean}-{hashlib.sha256(f'{name}#{repeat}'.encode()).hexdigest()[:12]}"
    raise AssertionError("unreachable")


def share_of(stem: str) -> float:
    """A number in [0, 1) that depends on the name only: all captions of an image go to one side."""
    return int.from_bytes(hashlib.blake2b(stem.encode(), digest_size=6).digest(), "big") / (1 << 48)


def make_members(data: bytes, caption: str, size: int | None, min_side: int) -> dict[str, bytes]:
    """The members of a sample. Every image is decoded once, strictly; its bytes stay as they are where they can.

    Raises:
        BadSample: empty caption, image damaged, of no known format, or too small.
    """
    if not caption.strip():
        raise BadSample("empty caption")
    kind = extension(data)
    if not kind:
        raise BadSample("unknown image format")
    pixels = decode(data)
    height, width, _ = pixels.shape
    if min(height, width) < min_side:
        raise BadSample(f"too small: {width} x {height}")
    if size is not None and (height, width) != (size, size):
        kind, data = encode(square(pixels, size), kind)
    return {kind: data, "txt": caption.strip().encode()}


def encode(pixels: Pixels, kind: str) -> tuple[str, bytes]:
    """Pixels as a file: JPEG where the original was one, else PNG, which loses nothing."""
    file = io.BytesIO()
    if kind == "jpg":
        Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        kind = "png"
        Image.fromarray(pixels).save(file, "PNG")
    return kind, file.getvalue()


if __name__ == "__main__":
    log.guarded(main)
