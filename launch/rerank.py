"""Rank samples by how well they fit their captions, by CLIP.

    python launch/rerank.py --samples runs/demo/samples --clip runs/demo/clip/export --keep 4 --out runs/demo/best
    python launch/rerank.py --samples runs/a --clip ViT-B-32:openai --classes names.txt --keep-share 0.25 --out runs/b

Reads what launch/sample.py wrote. Writes <out>/scores.jsonl (each sample with its score, its rank in its prompt, 1 =
best, and whether it was kept), <out>/best/<prompt>_<rank>.png, and the kept ones with their captions as gallery.png and
gallery.html. --clip takes an export of a clip run, a folder with a Hugging Face CLIP model, or an open_clip model name
with a tag of published weights or a checkpoint file after a colon.

The score is the cosine similarity of image and caption. With --classes it is the probability that CLIP gives to the
sample's caption among all captions of the file: rejection sampling by a classifier, as in VQ-VAE-2. trade_off.json then
says for several shares how sure CLIP is of what is kept and how diverse that is; it judges its own choice.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from dalle_scale import dist, log
from dalle_scale.arguments import Parser, at_least
from dalle_scale.sampling import rejection, rerank, rerank_page
from dalle_scale.sampling.rerank_page import Ranking
from dalle_scale.types import UserError


def main() -> None:
    """Score, rank, write."""
    args = parse_args()
    rows = rerank.read_samples(args.samples)
    check(args, rows)
    classes = rejection.read_classes(args.classes, rows) if args.classes else []
    scorer = rerank.open_scorer(args.clip, dist.device())
    verdicts = rejection.classify(scorer, args.samples, rows, classes, args.batch_size) if classes else None
    scores = verdicts.probabilities if verdicts else rerank.score(scorer, args.samples, rows, args.batch_size)
    ranked = rerank.keep(rerank.rank(rows, scores), args.keep or 1, args.keep_share)
    table = rejection.trade_off(ranked, verdicts, args.keep_share) if verdicts else []
    if scorer.truncated_captions:
        log.say(f"{scorer.truncated_captions} captions are longer than this CLIP reads: it saw only their beginning")
    log.say("\n".join(rerank_page.save(args.out, Ranking(args.samples, ranked, args.clip, args.classes, table))))


def check(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Check the options before the model is opened."""
    if args.keep_share is not None and not 0 < args.keep_share <= 1:
        raise UserError(f"--keep-share: {args.keep_share:g}, but a share is above 0 and at most 1; 1 keeps all")
    if args.keep and args.keep_share:
        raise UserError("--keep and --keep-share: give a number of candidates or a share of them, not both")
    fewest = min(Counter(row["prompt_index"] for row in rows).values())
    if args.keep and args.keep > fewest:
        raise UserError(f"--keep: {args.keep}, but a prompt has only {fewest} candidates; keep at most {fewest}")
    rerank_page.check_folder(args.out)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--samples", type=Path, required=True, help="folder that launch/sample.py wrote")
    parser.add_clip(required=True)
    add("--classes", type=Path, metavar="FILE", help="score by the probability among these captions, one a line")
    parser.add_out()
    add("--keep", type=at_least(1), help="best candidates a prompt to copy and show (default 1)")
    add("--keep-share", type=float, metavar="SHARE", help="in place of --keep: this share of each prompt's candidates")
    parser.add_batch_size("images scored at a time", 64)
    parser.add_device()
    return parser.parse_args()


if __name__ == "__main__":
    log.guarded(main)
