"""Turn captioned images, however they lie around, into shards that training reads.

    python data_tools/build_shards.py SOURCE... --out runs/data [--size 64] [--valid-share 0.02] [--preset dalle]

A SOURCE is one of
    a folder of images, each with its caption beside it (x.jpg + x.txt), or with a captions file in it
    a tar of the same: captions.jsonl inside (file + caption), or x.txt beside x.jpg (webdataset, img2dataset's output)
    a folder of such tars
    a CSV, TSV, JSONL or parquet table with columns for path and caption; in parquet also the image bytes themselves
`--caption-template "a photo of a {folder}"` makes captions from folder names where there is no other caption.

Writes <out>/train and, with --valid-share, <out>/valid: samples go there by a hash of their name. Every input ends
either in a shard or, with the reason, as a line of <out>/ledger.jsonl; <out>/rows says more. The same input gives the
same bytes on every run, with any number of workers; a run that was stopped continues with the same command. Nothing is
downloaded.
"""

from __future__ import annotations

import argparse
import os
import warnings
from dataclasses import replace
from pathlib import Path

from dalle_scale import log
from dalle_scale.arguments import Parser, at_least, share
from dalle_scale.curation.build import build
from dalle_scale.curation.chunks import Recipe
from dalle_scale.curation.filters import LANGUAGES, Filters
from dalle_scale.curation.items import CAPTION_COLUMNS, IMAGE_COLUMNS, Options
from dalle_scale.types import UserError


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and build."""
    args = parse(arguments)
    warnings.filterwarnings("ignore", module="PIL")  # what Pillow only warns of it decodes; the rest is in the ledger
    recipe = make_recipe(args)
    options = Options(
        image_columns=(args.image_column,) if args.image_column else IMAGE_COLUMNS,
        caption_columns=(args.caption_column,) if args.caption_column else CAPTION_COLUMNS,
        other_columns=(*recipe.filters.columns, *recipe.keep_columns),
        root=args.root,
        caption_template=args.caption_template,
    )
    build(args.out, args.sources, options, recipe, args.workers, args.overwrite)


def make_recipe(args: argparse.Namespace) -> Recipe:
    """Recipe from the options of `add_output` and `add_filters`."""
    return Recipe(
        args.size,
        filters(args),
        args.valid_share,
        args.samples_per_shard,
        args.dedupe,
        args.near_bits,
        tuple(args.keep_column),
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser(__doc__)
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE")
    add_output(parser)
    reading = parser.add_argument_group("reading")
    reading.add_argument("--caption-template", help="caption where there is none; {folder} is the image's folder")
    reading.add_argument("--image-column", help=f"default: the first of {', '.join(IMAGE_COLUMNS)}")
    reading.add_argument("--caption-column", help=f"default: the first of {', '.join(CAPTION_COLUMNS)}")
    reading.add_argument("--root", type=Path, help="folder that relative paths start from; default: the table's own")
    add_filters(parser)
    return checked(parser.parse_args(arguments))


def add_output(parser: Parser) -> None:
    """The options that say what is written."""
    parser.add_out()
    parser.add_argument(
        "--size", type=at_least(1), help="store centre squares of this side, pixels (default: whole images)"
    )
    parser.add_argument("--valid-share", type=share, default=0.0, help="share of the samples that is held out")
    parser.add_argument("--samples-per-shard", type=at_least(1), default=10_000, help="input rows of a shard, at most")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--workers",
        type=at_least(1),
        default=max(2, cores),
        help="processes; default: %(default)s; 1 works in the program itself, which an image can then end",
    )
    parser.add_argument(
        "--keep-column", action="append", default=[], metavar="NAME", help="stored as JSON beside image and caption"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the data set that is there")


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """The options of `add_output` and of duplicates, if they make sense. Raises UserError."""
    if args.valid_share == 1:
        raise UserError("--valid-share: 1 leaves nothing to train on; take a smaller share")
    if args.near_bits is None:
        args.near_bits = Recipe.near_bits
    elif args.dedupe != "near" or not 0 <= args.near_bits <= 12:
        raise UserError(f"--near-bits {args.near_bits}: 0 to 12 bits of 64, and only with --dedupe near")
    return args


def add_filters(parser: Parser) -> None:
    """The options that leave rows out."""
    group = parser.add_argument_group("what is left out")
    group.add_argument("--preset", choices=("dalle",), help="filters of the DALL-E paper; single options change them")
    group.add_argument("--min-side", type=int, help="images with a shorter side, in pixels")
    group.add_argument("--max-aspect", type=float, help="images whose longer side is more than this times the shorter")
    group.add_argument("--min-caption-words", type=int)
    group.add_argument("--min-caption-characters", type=int)
    group.add_argument("--language", choices=LANGUAGES, help="captions that are surely in another language")
    group.add_argument(
        "--boilerplate", action=argparse.BooleanOptionalAction, help="captions of dates, file names and the like"
    )
    group.add_argument("--max-watermark", type=float, help="rows whose column pwatermark is above, or missing")
    group.add_argument("--max-nsfw", type=float, help="the same for punsafe, or NSFW (UNLIKELY 0, UNSURE 0.5, NSFW 1)")
    group.add_argument("--dedupe", choices=("none", "exact", "near"), default="none", help="repeated images")
    group.add_argument("--near-bits", type=int, help=f"of 64 that may differ; default: {Recipe.near_bits}")


def filters(args: argparse.Namespace) -> Filters:
    """The preset, changed by the single options. Raises UserError."""
    chosen = Filters.dalle() if args.preset == "dalle" else Filters()
    given = {name: getattr(args, name) for name in vars(chosen) if name != "boilerplate"}
    given["boilerplate"] = args.boilerplate
    chosen = replace(chosen, **{name: value for name, value in given.items() if value is not None})
    counts = {"min_side": 1, "max_aspect": 1, "min_caption_words": 0, "min_caption_characters": 0}
    for name, least in counts.items():
        if (value := getattr(chosen, name)) is not None and not value >= least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    for name in ("max_watermark", "max_nsfw"):
        if (share := getattr(chosen, name)) is not None and not 0 <= share <= 1:
            raise UserError(f"--{name.replace('_', '-')} {share}: a probability in 0 .. 1")
    return chosen


if __name__ == "__main__":
    log.guarded(main)
