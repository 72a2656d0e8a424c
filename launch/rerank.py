"""Which samples fit their captions best, by CLIP.

    python launch/rerank.py --samples runs/demo/samples --clip runs/demo/clip/export --keep 4 --out runs/demo/best
    python launch/rerank.py --samples runs/mine --clip ViT-B-32:openai --out runs/mine/best

Reads what launch/sample.py wrote. Writes <out>/scores.jsonl (each sample with its score, a cosine similarity, and its
rank among the candidates of its prompt, 1 = best), <out>/best/<prompt>_<rank>.png, and the best ones with their
captions as <out>/gallery.png and gallery.html. --clip takes an export of a clip run, a folder with a Hugging Face CLIP
model, or an open_clip model name with a tag of published weights or a checkpoint file after a colon.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from dalle_scale import dist, gallery, log, rerank
from dalle_scale.checkpoint import atomic
from dalle_scale.types import UserError

GALLERY_PROMPTS = 64  # shown in the gallery; best/ has all

Row = dict[str, Any]


def main() -> None:
    """Score, rank, write."""
    args = parse_args()
    rows = rerank.read_samples(args.samples)
    check(args, rows)
    scorer = rerank.open_scorer(args.clip, dist.device())
    ranked = rerank.rank(rows, rerank.score(scorer, args.samples, rows, args.batch))
    if scorer.truncated_captions:
        log.say(f"{scorer.truncated_captions} captions are longer than this CLIP reads: it saw only their beginning")
    write(args.out, args.samples, ranked, args.keep)
    show(args, ranked)
    every, best = (fmean(row["score"] for row in ranked if row["rank"] <= last) for last in (len(ranked), 1))
    log.say(f"mean score: all candidates {every:.4f}, the best of each prompt {best:.4f}")
    log.say(f"{args.out / 'gallery.png'}")


def check(args: argparse.Namespace, rows: list[Row]) -> None:
    """What can be wrong before the model is opened."""
    for name, value in (("keep", args.keep), ("batch", args.batch)):
        if value < 1:
            raise UserError(f"--{name}: {value}, but at least one is needed")
    fewest = min(Counter(row["prompt_index"] for row in rows).values())
    if args.keep > fewest:
        raise UserError(f"--keep: {args.keep}, but a prompt has only {fewest} candidates; keep at most {fewest}")
    if (args.out / "best").exists() and not (args.out / "scores.jsonl").is_file():
        raise UserError(f"--out: {args.out / 'best'} is there and not from an earlier ranking; take another folder")


def write(out: Path, folder: Path, ranked: list[Row], keep: int) -> None:
    """The scores and the best pictures, in place of those of an earlier ranking."""
    out.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(out / "best") as best:
        for row in ranked:
            if row["rank"] <= keep:
                shutil.copyfile(folder / row["file"], best / f"{row['prompt_index']:05d}_{row['rank']:04d}.png")
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in ranked)
    atomic.write(out / "scores.jsonl", "".join(lines))


def show(args: argparse.Namespace, ranked: list[Row]) -> None:
    """The gallery: a row for each prompt, its best candidates from left to right."""
    kept: dict[int, list[Row]] = defaultdict(list)
    for row in sorted(ranked, key=lambda row: (row["prompt_index"], row["rank"])):
        if row["rank"] <= args.keep:
            kept[row["prompt_index"]].append(row)
    shown = list(kept.values())[:GALLERY_PROMPTS]
    columns = ["best", *(f"no. {rank}" for rank in range(2, args.keep + 1))]
    table = []
    for members in shown:
        images = rerank.read_pictures([args.samples / row["file"] for row in members])
        pictures = [
            gallery.Picture(image, note=f"score {row['score']:.3f}") for image, row in zip(images, members, strict=True)
        ]
        table.append(gallery.Row(members[0]["prompt"], tuple(pictures)))
    notes = [f"{len(ranked)} candidates for {len(kept)} captions, ranked by {args.clip}"]
    if len(kept) > len(shown):
        notes.append(f"The first {len(shown)} captions; all pictures are in best/")
    gallery.save(args.out, "Best candidates", columns, table, notes)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, required=True, help="folder that launch/sample.py wrote")
    parser.add_argument("--clip", required=True, help="export, Hugging Face folder, or open_clip MODEL[:TAG|:FILE]")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--keep", type=int, default=1, help="best candidates a prompt to copy and show")
    parser.add_argument("--batch", type=int, default=64, help="pictures scored at a time")
    return parser.parse_args()


if __name__ == "__main__":
    log.guarded(main)
