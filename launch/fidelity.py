"""Compare images with a data set: FID, KID, Inception Score, precision and recall.

    python launch/fidelity.py --samples runs/samples --reference runs/data/train --inception FILE --out runs/fidelity
    deepspeed --num_gpus 8 launch/fidelity.py --samples runs/samples --reference runs/data/train --inception FILE ...
    python launch/fidelity.py --samples runs/data/valid --reconstruct runs/vqgan/export --reference runs/data/valid ...
    python launch/fidelity.py --samples runs/samples --reference runs/data/train --clip runs/clip/export --out ...

--samples is a folder that launch/sample.py wrote, or a data set; with --reconstruct it is what an image tokenizer makes
of the images of that data set (rFID). The reference is brought to the size of the samples. FILE holds the weights of
the Inception that FID is defined by, weights-inception-2015-12-05-6726825d.pth of torch-fidelity (pip install
'dalle_scale[eval]'); nothing is downloaded. Any other weights, and CLIP, measure distances of other names.

Writes <out>/fidelity.json and .md: the numbers, and beside them everything that they depend on. The same numbers for
any number of ranks. What cannot be read is left out, counted, and listed in ledger.jsonl.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle_scale import dist, log
from dalle_scale.arguments import Parser, at_least
from dalle_scale.checkpoint import export
from dalle_scale.evaluation import feature_extractors, fidelity, image_sets, result_schema
from dalle_scale.types import UserError


def main() -> None:
    """Check, describe both sets, compare, write."""
    args = parse_args()
    check(args)
    device, ledger = dist.device(), args.out / "ledger.jsonl"
    if args.inception:
        extractor = feature_extractors.open_inception(args.inception, args.layer, device)
    else:
        extractor = feature_extractors.open_clip(args.clip, device)
    measures = fidelity.pick_measures(args.measures, extractor)
    tokenizer = (args.reconstruct, export.open_tokenizer(args.reconstruct, device)) if args.reconstruct else None
    source = image_sets.open_source(
        args.samples, args.image_size, args.limit, args.batch_size, ledger, args.scores, tokenizer
    )
    size = source.about.image_size
    reference: fidelity.Statistics | image_sets.Source
    if args.reference.is_file():
        reference = fidelity.load_statistics(args.reference, extractor, size)
    else:
        reference = image_sets.open_data(args.reference, size, args.limit_reference, args.batch_size, ledger)
    fidelity.check_counts(measures, extractor, source.about.samples, reference.about.samples, args.subset)
    dist.join()
    if dist.is_main():
        args.out.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    if isinstance(reference, image_sets.Source):
        reference = fidelity.collect(reference, extractor, device)
    samples = fidelity.collect(source, extractor, device)
    fidelity.check_counts(measures, extractor, samples.about.samples, reference.about.samples, args.subset)
    if not dist.is_main():
        return
    if args.save_reference:
        fidelity.save_statistics(args.save_reference, reference, extractor)
    result = fidelity.compare(samples, reference, extractor, measures, args.subset, args.batch_size)
    result_schema.write(args.out, result)
    log.say(result_schema.markdown(result))
    log.say(f"{args.out / 'fidelity.json'}")


def check(args: argparse.Namespace) -> None:
    """Check the options before anything is opened."""
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out: {args.out} is a file; name a folder")
    for name in ("save_reference", "limit_reference"):
        if args.reference.is_file() and getattr(args, name):
            raise UserError(
                f"--{name.replace('_', '-')}: goes with a data set; {args.reference} is finished statistics"
            )


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--samples", type=Path, required=True, help="folder of launch/sample.py, or a data set")
    add("--reconstruct", type=Path, metavar="EXPORT", help="image tokenizer that the images go through first")
    add("--scores", type=Path, metavar="FILE", help="scores.jsonl of launch/rerank.py: only the samples it kept")
    add("--reference", type=Path, required=True, help="data set, or what --save-reference wrote")
    add("--save-reference", type=Path, metavar="FILE", help="write the reference's statistics (.safetensors)")
    parser.add_out()
    extractor = parser.add_mutually_exclusive_group(required=True)
    extractor.add_argument("--inception", type=Path, metavar="FILE", help="weights of FID's Inception")
    extractor.add_argument("--clip", help="export of a clip run, Hugging Face folder, or open_clip MODEL:FILE")
    add(
        "--layer",
        choices=feature_extractors.LAYERS,
        default=feature_extractors.LAYERS[0],
        help="of the Inception, by its channels",
    )
    add("--measures", nargs="+", choices=fidelity.MEASURES, help="default: all that the extractor offers")
    add("--subset", type=at_least(2), default=fidelity.SUBSET_SAMPLES, help="images in a subset of the kernel distance")
    add("--image-size", type=at_least(1), help="side in pixels, where --samples is a data set")
    parser.add_limit("at most so many of the samples (default: all)")
    parser.add_limit("at most so many of the reference (default: all)", flag="--limit-reference")
    parser.add_batch_size("images at once on each rank", 64)
    parser.add_device()
    parser.add_local_rank()
    return parser.parse_args()


if __name__ == "__main__":
    log.guarded(main)
