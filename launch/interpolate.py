"""Interpolate between images, in the latents of a VAE or of a diffusion model (DDIM).

    python launch/interpolate.py --model runs/cifar10_32/ddpm/export --out runs/between steps=50
    python launch/interpolate.py --model runs/cifar10_32/ddpm/export --out runs/between steps=50 --images a.png b.png

Without --images the ends are sampled from nothing. With --images each image goes to latents and back, and there is a
path from each to the next; the error of that round trip is reported as in Table 2 of the paper of DDIM: the mean
squared error of values from 0 to 1. Writes <out>/grid.png, a row for each path, and <out>/interpolation.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dalle_scale import dist, io, log
from dalle_scale.arguments import Parser, at_least
from dalle_scale.checkpoint import export
from dalle_scale.sampling import interpolate
from dalle_scale.sampling.sampler import read_image
from dalle_scale.types import UserError


def main() -> None:
    """Open, walk, write."""
    args = parse_args()
    if args.images and len(args.images) < 2:
        raise UserError("--images: one image, but a path has two ends; name at least two")
    opened = export.load(args.model, dist.device())
    space = interpolate.open_space(opened, args.options)
    if args.images:
        images = torch.stack([read_image(path, space.codec.image_size) for path in args.images])
        paths = interpolate.between_images(space, images, args.count)
    else:
        seeds = torch.arange(args.seed, args.seed + args.paths + 1, device=dist.device())
        paths = interpolate.between_seeds(space, seeds, args.count)
    args.out.mkdir(parents=True, exist_ok=True)
    log.grid(paths.images.flatten(0, 1), args.count).save(args.out / "grid.png")
    record = {
        "model": str(args.model),
        "images": [str(path) for path in args.images],
        "seed": None if args.images else args.seed,
        "count": args.count,
        **space.options.model_dump(),
        "round_trip_mse": paths.round_trip_mse,
    }
    io.write_json(args.out / "interpolation.json", record)
    if paths.round_trip_mse is not None:
        log.say(f"there and back: mean squared error {paths.round_trip_mse:.4f} of values from 0 to 1")
    log.say(f"{len(paths.images)} paths: {args.out / 'grid.png'}")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="export of a vae or a ddpm run")
    parser.add_out()
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="image files; a path from each to the next")
    parser.add_argument("--paths", type=at_least(1), default=6, help="how many, without --images")
    parser.add_argument("--count", type=at_least(2), default=11, help="images of a path, both ends included")
    parser.add_argument("options", nargs="*", metavar="key=value", help="of a diffusion model: steps, spacing")
    parser.add_seed("of the ends, without --images")
    parser.add_device()
    return parser.parse_args()


if __name__ == "__main__":
    log.guarded(main)
