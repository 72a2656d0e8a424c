"""Compare image tokenizers on one data set.

    python launch/evaluate.py --data runs/data/valid --out runs/compared runs/dvae/export runs/vqvae/export
    deepspeed --num_gpus 8 launch/evaluate.py --data runs/data/valid --out runs/compared runs/dvae/export
    python launch/evaluate.py --data runs/data/valid --out runs/compared runs/vqvae/export --prior runs/prior/export

Takes exports of any stage that makes codes of images, each at its own image size, and exports of stages that
evaluate themselves on images. Measures PSNR, SSIM, use of the codebook, bits an image and bits per dimension, the
same for any number of ranks. With --prior codes cost what their prior says: the export of `dalle` that was trained on
them, or those of `vqvae2_prior` of all levels, one --prior for each.

Writes <out>/comparison.json, .md and .html (the page shows the same images for all), and reconstructions_<name>.png
for each export. What cannot be read is left out, counted, and listed in ledger.jsonl.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle_scale import dist, log
from dalle_scale.arguments import Parser
from dalle_scale.data.manifest import Manifest
from dalle_scale.evaluation import reconstruction, reconstruction_page
from dalle_scale.nn import precision
from dalle_scale.types import UserError

SHOWN = 16  # images on the page


def main() -> None:
    """Check, measure one export after the other, write."""
    args = parse_args()
    check(args)
    ledger, device = args.out / "ledger.jsonl", dist.device()
    subjects = reconstruction.open_subjects(args.exports, device, args.prior, args.text_tokenizer, args.dtype)
    data = [
        reconstruction.open_images(
            args.data, subject.image_size, args.limit, args.batch_size, ledger, prior=subject.prior
        )
        for subject in subjects
    ]
    dist.join()
    if dist.is_main():
        args.out.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    rows = [reconstruction.measure(*pair, device) for pair in zip(subjects, data, strict=True)]
    if not dist.is_main():
        return
    shown = {}
    for subject in subjects:
        few = min(SHOWN, data[0].samples)
        images = reconstruction.open_images(args.data, subject.image_size, few, few, ledger, alone=True)
        shown[subject.name] = reconstruction.examples(subject, images, device)
    numbers = reconstruction_page.document(args.data, data[0], rows)
    reconstruction_page.write(args.out, numbers, shown)
    log.say(reconstruction_page.markdown(numbers))
    log.say(f"{args.out / 'comparison.html'}")


def check(args: argparse.Namespace) -> None:
    """Check the options before anything is opened."""
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out: {args.out} is a file; name a folder")
    source = Manifest.open(args.data)
    if not source.num_samples:
        raise UserError(f"{args.data}: this data set holds no samples")
    if not source.holds_images:
        raise UserError(f"{args.data}: no images in this data set; it holds: {', '.join(source.members)}")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("exports", nargs="+", type=Path, metavar="EXPORT", help="export of an image tokenizer")
    parser.add_data("folder of a data set with images")
    parser.add_out()
    parser.add_argument(
        "--prior", action="append", default=[], type=Path, help="export of a prior of codes; repeatable"
    )
    parser.add_argument("--text-tokenizer", help="of the priors' captions: file, folder or name (default: their own)")
    parser.add_limit("evaluate at most so many images (default: all)")
    parser.add_batch_size("images at once on each rank", 64)
    parser.add_device()
    parser.add_argument("--dtype", choices=precision.ASKED, default="fp32", help="of the exports, not of their priors")
    parser.add_local_rank()
    return parser.parse_args()


if __name__ == "__main__":
    log.guarded(main)
