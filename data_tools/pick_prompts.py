"""Captions of a data set as prompts, each with its image to compare with.

    python data_tools/pick_prompts.py --data runs/images/shards/valid --limit 64 --out runs/images/prompts

Writes <out>/prompts.jsonl (rows with "prompt", "key", "truth") for launch/sample.py --prompt-file, and the images as
<out>/truth/*.png. Captions are distinct; which ones is decided by hash, so the same command picks the same again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from dalle_scale import io, log
from dalle_scale.arguments import Parser, at_least
from dalle_scale.data.decode import BadSample, decode
from dalle_scale.data.manifest import Manifest
from dalle_scale.data.order import sample_seeds
from dalle_scale.data.reader import Reader
from dalle_scale.data.transforms import square
from dalle_scale.types import UserError


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, pick, write."""
    parser = Parser(__doc__)
    parser.add_data("folder of a data set with images and captions")
    parser.add_out()
    parser.add_limit("captions; fewer where there are not as many", 64)
    parser.add_argument(
        "--size", type=at_least(1), help="side of the images' centre squares in pixels; default: as they are"
    )
    parser.add_seed()
    args = parser.parse_args(arguments)
    (args.out / "truth").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for key, caption, pixels in pick(Manifest.open(args.data), args.limit, args.seed):
        file = f"truth/{len(rows):05d}.png"
        Image.fromarray(pixels if args.size is None else square(pixels, args.size)).save(args.out / file)
        rows.append({"prompt": caption, "key": key, "truth": file})
    if not rows:
        raise UserError(f"{args.data}: none of its samples can be read")
    io.write_rows(args.out / "prompts.jsonl", rows)
    log.say(f"{args.out / 'prompts.jsonl'}: {len(rows)} captions")


def pick(manifest: Manifest, count: int, seed: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """(key, caption, pixels [H, W, 3]) of up to `count` samples with distinct captions; unreadable ones are passed
    over.

    Raises:
        UserError: the data set holds no images or no captions.
    """
    if not manifest.holds_images or "txt" not in manifest.members:
        raise UserError(f"{manifest.folder}: prompts need images and captions (txt); it holds {[*manifest.members]}")
    captions: set[str] = set()
    reader = Reader(manifest)
    for sample in np.argsort(sample_seeds(seed, 0, np.arange(manifest.num_samples)), kind="stable").tolist():
        if len(captions) == count:
            break
        try:
            caption = reader.read(sample, "txt").decode()
            if caption in captions:
                continue
            pixels = decode(reader.read_image(sample))
        except (BadSample, UnicodeDecodeError):
            continue
        captions.add(caption)
        yield manifest.key(sample), caption, pixels
    reader.close()


if __name__ == "__main__":
    log.guarded(main)
