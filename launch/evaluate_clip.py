"""Evaluate CLIP models: retrieval, zero-shot classification, and the gain of choosing by them.

    python launch/evaluate_clip.py --clip runs/clip/export --data runs/data/valid --out runs/clip_evaluated
    deepspeed --num_gpus 8 launch/evaluate_clip.py --clip runs/clip/export --clip ViT-B-32:openai --data runs/d --out o
    python launch/evaluate_clip.py --clip runs/clip/export --data runs/d --classes names.txt --templates t.txt --out o
    python launch/evaluate_clip.py --clip runs/clip/export --samples runs/dalle/samples --out runs/best_of

With --data: retrieval of captions by images and of images by captions (R@1, 5, 10), and zero-shot classification.
Classes are the lines of --classes, or the captions themselves where they are few; --templates makes several prompts of
each class, whose vectors are averaged. With --samples, what launch/sample.py wrote: the CLIP score of the best of N
candidates for N = 1, 2, 4, ... up to all of them; several models also judge each other's choice.

Writes <out>/clip.json, clip.md, best_of.csv (to plot), and for each model examples_<name>/gallery.html. The numbers are
the same for any number of ranks. What cannot be read is left out, counted, and listed in ledger.jsonl.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dalle_scale import dist, log
from dalle_scale.arguments import Parser, at_least
from dalle_scale.evaluation import best_of_n, clip, clip_page
from dalle_scale.evaluation.clip import Classes, Subject
from dalle_scale.sampling import rejection, rerank
from dalle_scale.types import UserError


def main() -> None:
    """Check, open, measure one model after the other, write."""
    args = parse_args()
    check(args)
    templates = clip.read_templates(args.templates) if args.templates else ("{}",)
    names = rejection.read_classes(args.classes, []) if args.classes else []
    classes = Classes(tuple(names), templates, str(args.classes)) if names else None
    rows = rerank.read_samples(args.samples) if args.samples else []
    subjects = clip.open_subjects(args.clip, dist.device(), args.image_size)
    dist.join()
    if dist.is_main():
        args.out.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    numbers = data_numbers(args, subjects, classes, templates) if args.data else {}
    if rows:
        numbers |= sample_numbers(args, subjects, rows)
    about = [clip_page.about_model(subject) for subject in subjects]
    numbers["models"] = [model | row for model, row in zip(about, numbers.get("models", about), strict=True)]
    if dist.is_main():
        clip_page.write(args.out, numbers)
        log.say(clip_page.summary(numbers))
        log.say(f"{args.out / 'clip.md'}")


def data_numbers(
    args: argparse.Namespace, subjects: list[Subject], classes: Classes | None, templates: tuple[str, ...]
) -> dict[str, Any]:
    """Retrieval and classification on a data set; writes the examples. A collective."""
    ledger, models, numbers = args.out / "ledger.jsonl", [], {}
    for subject in subjects:
        images = clip.open_pairs(args.data, subject, args.limit, args.batch_size, ledger)
        pairs = clip.embed(subject, args.data, images, args.batch_size, ledger, dist.device())
        row = {"pairs": len(pairs.own), "pairs_lost": pairs.lost, "retrieval": clip.retrieval(pairs)}
        kinds = classes or clip.caption_classes(pairs.captions, len(pairs.own), templates)
        if kinds:
            vectors = clip.embed_classes(subject, kinds, pairs.images.shape[1], args.batch_size)
            row["classification"] = clip.classification(pairs, kinds, vectors)
        if dist.is_main():
            log.say(f"{clip_page.show(args.out, subject, pairs, args.data)}")
        models.append(row)
        numbers = {"protocol": clip_page.about_data(args.data, images, kinds), "models": models}
    return numbers


def sample_numbers(args: argparse.Namespace, subjects: list[Subject], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The score of the best of N samples. A collective."""
    scores = {s.name: best_of_n.score_samples(s, args.samples, rows, args.batch_size) for s in subjects}
    table = best_of_n.best_of(rows, scores)
    return {"samples": clip_page.about_samples(args.samples, rows), "best_of": table}


def check(args: argparse.Namespace) -> None:
    """Check the options before anything is opened."""
    if not args.data and not args.samples:
        raise UserError("nothing to evaluate on: give --data FOLDER, --samples FOLDER or both")
    if (args.classes or args.templates) and not args.data:
        raise UserError("--classes and --templates are for --data: name a data set")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out: {args.out} is a file; name a folder")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    parser.add_clip(action="append", required=True)
    parser.add_data("folder of a data set with images and captions", required=False)
    add("--samples", type=Path, help="folder that launch/sample.py wrote")
    parser.add_out()
    add("--classes", type=Path, metavar="FILE", help="classes, one a line (default: the captions, where they are few)")
    add("--templates", type=Path, metavar="FILE", help="prompts, one a line, with {} for the class; default: {}")
    parser.add_limit("evaluate at most so many pairs (default: all)")
    add("--image-size", type=at_least(1), help="read images at this size (default: an export's own, or 224)")
    parser.add_batch_size("images or captions at once on each rank", 64)
    parser.add_device()
    parser.add_local_rank()
    return parser.parse_args()


if __name__ == "__main__":
    log.guarded(main)
