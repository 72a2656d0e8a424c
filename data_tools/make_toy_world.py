"""Draw the toy world: captioned shards to train on and prompts to judge by.

    python data_tools/make_toy_world.py --out runs/demo/world

Writes <out>/train and <out>/valid (tar shards with a manifest, through the same writer as real data) and
<out>/prompts.jsonl: for each group of the report, captions with the scene they ask for and a true image of it in
<out>/truth/. Training shows no held-out combination (see dalle_scale/curation/toy/world.py).
"""

from __future__ import annotations

import random
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from dalle_scale import io, log
from dalle_scale.arguments import Parser, at_least, share
from dalle_scale.curation.shard_writer import ShardWriter
from dalle_scale.curation.toy import world as world
from dalle_scale.types import UserError

GROUPS = {  # group of prompts: (objects, whether the combination is held out)
    "one_object/seen": (1, False),
    "one_object/held_out": (1, True),
    "two_objects/seen": (2, False),
    "two_objects/held_out": (2, True),
}


def main() -> None:
    """Read the command line and write everything."""
    parser = Parser(__doc__)
    parser.add_out()
    parser.add_argument("--train", type=at_least(1), default=24_000, help="training samples")
    parser.add_argument(
        "--valid", type=at_least(1), default=1_024, help="held-out samples of the training distribution"
    )
    parser.add_argument("--prompts", type=at_least(1), default=128, help="captions of each group")
    parser.add_argument("--two-objects", type=share, default=0.55, help="share of training scenes with two objects")
    parser.add_seed()
    options = parser.parse_args()
    if not 0 <= options.two_objects <= 1:
        raise UserError(f"--two-objects: {options.two_objects} is not a share; take a number from 0 to 1")
    for number, (split, count) in enumerate((("train", options.train), ("valid", options.valid))):
        rng = random.Random(f"{options.seed} {number}")
        write_split(options.out / split, count, options.two_objects, rng)
    write_prompts(options.out, options.prompts, random.Random(f"{options.seed} prompts"))


def write_split(folder: Path, count: int, two_objects: float, rng: random.Random) -> None:
    """Write `count` captioned images without held-out combinations as shards."""
    with ShardWriter(folder, samples_per_shard=4096) as writer:
        for index in log.progress(range(count), f"rendering {folder.name}", "images", count):
            scene = world.sample_scene(rng, 2 if rng.random() < two_objects else 1, held_out=False)
            text = world.caption(scene, rng)
            image = png(Image.fromarray(world.render(scene, rng)))
            writer.add(f"{index:08d}", {"png": image, "txt": text.encode()})


def write_prompts(out: Path, count: int, rng: random.Random) -> None:
    """Write `count` distinct captions of each group with their scenes and true images."""
    (out / "truth").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for group, (num_things, held_out) in GROUPS.items():
        captions: set[str] = set()
        while len(captions) < count:
            scene = world.sample_scene(rng, num_things, held_out)
            text = world.caption(scene, rng)
            if text in captions:
                continue
            captions.add(text)
            file = f"truth/{len(rows):05d}.png"
            Image.fromarray(world.render(scene, rng)).save(out / file)
            rows.append({"prompt": text, "group": group, "scene": asdict(scene), "truth": file})
    io.write_rows(out / "prompts.jsonl", rows)


def png(image: Image.Image) -> bytes:
    """The image as the bytes of a PNG file."""
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


if __name__ == "__main__":
    log.guarded(main)
