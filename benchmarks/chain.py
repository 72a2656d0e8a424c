"""The whole text-to-image chain on real images: from a source of captioned images to reranked samples.

    python benchmarks/chain.py noto_emoji_64 noto_emoji.tar
    python benchmarks/chain.py cifar10_32 cifar10_train.tar

Runs the recipes configs/{dvae,dalle,clip}/<name>.yaml and the programs between them, each as one would type it, below
runs/<name>. Writes benchmarks/results/chain_<name>.json (seconds of each step, validation losses, how often CLIP finds
an image's caption among the prompts) and .png (true image, first candidate, best of 16). CLIP also chose the best
of 16, so their share says how far reranking reaches, not how good an image is to anyone else.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from environment import ROOT, describe
from torch import Tensor

from dalle_scale import log
from dalle_scale.data.manifest import Manifest
from dalle_scale.programs import Command, Programs
from dalle_scale.report import gallery
from dalle_scale.report.page import GalleryImage
from dalle_scale.sampling import rerank
from dalle_scale.types import UserError

RESULTS = Path(__file__).parent / "results"
PROGRAMS = Programs(ROOT)
CANDIDATES = 16
PROMPTS = 64  # of each split, if it has as many captions
SHOWN = 10  # of each split, in the image


@dataclass(frozen=True)
class Recipe:
    """What the configs do not say."""

    build: tuple[str, ...]  # options of build_shards.py
    vocab: int  # of the text tokenizer
    splits: dict[str, str]  # split that prompts come from -> heading in the gallery


RECIPES = {
    "noto_emoji_64": Recipe(
        build=("--size=64", "--valid-share=0.05"),
        vocab=1024,
        splits={"train": "Captions seen in training", "valid": "Captions never seen"},
    ),
    "cifar10_32": Recipe(
        build=("--caption-template=a photo of a {folder}", "--valid-share=0.02"),
        vocab=320,
        splits={"valid": "The ten captions, beside images never seen"},
    ),
}


def main() -> None:
    """Run every step, then judge and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("source", type=Path, help="what data_tools/build_shards.py takes")
    parser.add_argument("--steps", type=int, help="of each training, in place of the recipes'; for a quick look")
    args = parser.parse_args()
    recipe, run = RECIPES[args.name], Path("runs") / args.name
    if run.exists():
        raise UserError(f"{run}: is there already; delete it, the figures are of a run from nothing")
    seconds = PROGRAMS.run(steps(args.name, recipe, run, args.source, args.steps))
    rows, found = judge(run, recipe)
    result = {
        "images": {split: Manifest.open(run / "shards" / split).num_samples for split in ("train", "valid")},
        "seconds": seconds,
        **{stage: last_validation(run / stage) for stage in ("dvae", "dalle", "clip")},
        "caption_found_by_clip": found,
        **describe(),
        "command": f"python benchmarks/chain.py {args.name} {args.source.name}",
    }
    columns = ("true image", "first candidate", f"best of {CANDIDATES}")
    gallery.save(run, args.name, columns, rows, notes=notes(found))
    print(json.dumps(result, indent=1))
    if args.steps is None:
        (RESULTS / f"chain_{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
        shutil.copyfile(run / "gallery.png", RESULTS / f"chain_{args.name}.png")


def steps(name: str, recipe: Recipe, run: Path, source: Path, steps: int | None) -> dict[str, Command]:
    """The commands, by the name of the step."""
    python = PROGRAMS.python
    shards, codes = run / "shards", run / "codes"

    def train(stage: str) -> Command:
        overrides = [] if steps is None else [f"steps={steps}"]
        return PROGRAMS.deepspeed("launch/train.py", str(ROOT / f"configs/{stage}/{name}.yaml"), *overrides)

    def encode(split: str) -> Command:
        return python(
            "launch/encode.py", f"--tokenizer={run}/dvae/export", f"--data={shards / split}", f"--out={codes / split}"
        )

    commands = {
        "shards": python("data_tools/build_shards.py", str(source), f"--out={shards}", *recipe.build),
        "text_tokenizer": python(
            "data_tools/train_tokenizer.py", f"--data={shards}/train", f"--vocab={recipe.vocab}", f"--out={run}"
        ),
        "dvae": train("dvae"),
        "encode": encode("train"),
        "encode_valid": encode("valid"),
        "transformer": train("dalle"),
        "clip": train("clip"),
    }
    for split in recipe.splits:
        prompts, samples = f"{run}/prompts/{split}", f"{run}/samples/{split}"
        commands |= {
            f"prompts_{split}": python(
                "data_tools/pick_prompts.py", f"--data={shards}/{split}", f"--limit={PROMPTS}", f"--out={prompts}"
            ),
            f"sample_{split}": python(
                "launch/sample.py",
                f"--model={run}/dalle/export",
                f"--prompt-file={prompts}/prompts.jsonl",
                f"--candidates={CANDIDATES}",
                f"--out={samples}",
            ),
            f"rerank_{split}": python(
                "launch/rerank.py", f"--samples={samples}", f"--clip={run}/clip/export", f"--out={run}/best/{split}"
            ),
        }
    return commands


def judge(run: Path, recipe: Recipe) -> tuple[list[gallery.Row], dict[str, dict[str, Any]]]:
    """Rows of the gallery; for each split and kind of image the share whose own caption CLIP scores highest among
    the split's prompts."""
    scorer = rerank.open_scorer(str(run / "clip" / "export"))
    rows: list[gallery.Row] = []
    found: dict[str, dict[str, Any]] = {}
    for split, title in recipe.splits.items():
        lines = (run / "prompts" / split / "prompts.jsonl").read_text().splitlines()
        prompts = [json.loads(line) for line in lines]
        captions = [prompt["prompt"] for prompt in prompts]
        candidates: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for line in (run / "best" / split / "scores.jsonl").read_text().splitlines():
            row = json.loads(line)
            candidates[row["prompt_index"]].append(row)

        def read_samples(files: list[str], split: str = split) -> Tensor:
            return rerank.read_images([run / "samples" / split / file for file in files])

        truth = rerank.read_images([run / "prompts" / split / prompt["truth"] for prompt in prompts])
        every = read_samples([row["file"] for index in range(len(prompts)) for row in candidates[index]])
        first = every[::CANDIDATES]
        best = read_samples([min(candidates[i], key=lambda row: row["rank"])["file"] for i in range(len(prompts))])
        own = torch.arange(len(prompts))
        found[split] = {
            "captions": len(prompts),
            "true_images": share_found(scorer, truth, captions, own),
            "all_candidates": share_found(scorer, every, captions, own.repeat_interleave(CANDIDATES)),
            f"best_of_{CANDIDATES}": share_found(scorer, best, captions, own),
        }
        cells = list(zip(captions, truth, first, best, strict=True))[:SHOWN]
        rows += [gallery.Row(caption, tuple(map(GalleryImage, images)), title) for caption, *images in cells]
    return rows, found


def notes(found: dict[str, dict[str, Any]]) -> list[str]:
    """The shares in words, a line a split."""
    return [
        f"CLIP finds the caption among {shares['captions']} ({split}): of true images {shares['true_images']:.0%}, "
        f"of all candidates {shares['all_candidates']:.0%}, of the best of {CANDIDATES} "
        f"{shares[f'best_of_{CANDIDATES}']:.0%}"
        for split, shares in found.items()
    ]


def share_found(scorer: rerank.Scorer, images: Tensor, captions: list[str], own: Tensor) -> float:
    """Share of the images [N, 3, H, W] whose caption number `own` [N] scores highest among all `captions`."""
    right = [
        int(scorer.score(image.expand(len(captions), -1, -1, -1), captions).argmax()) == index
        for image, index in zip(images, own.tolist(), strict=True)
    ]
    return round(sum(right) / len(right), 4)


def last_validation(run: Path) -> dict[str, float]:
    """Updates and the last validation of a training run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "valid/loss" in row][-1]
    return {"steps": last["step"]} | {key: round(value, 4) for key, value in last.items() if key[:6] == "valid/"}


if __name__ == "__main__":
    log.guarded(main)
