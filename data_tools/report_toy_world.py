"""Judge the demo's samples and make its gallery and report.

    python data_tools/report_toy_world.py --run runs/demo

Reads <run>/world/prompts.jsonl, <run>/samples, <run>/reranked and the dVAE's export; writes <run>/report.json,
<run>/gallery.png and <run>/gallery.html. An image counts as right when the judge (dalle_scale/curation/toy/judge.py)
reads every attribute of the caption's scene from it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from dalle_scale import io, log
from dalle_scale.arguments import Parser
from dalle_scale.checkpoint import export
from dalle_scale.config import DataConfig
from dalle_scale.curation.toy import judge
from dalle_scale.curation.toy.world import Scene, Thing
from dalle_scale.data.pipeline import open_stream
from dalle_scale.report import gallery
from dalle_scale.report.page import GalleryImage
from dalle_scale.stages import dvae
from dalle_scale.types import UserError

ROWS_OF_GROUP = 9  # captions of each group that the gallery shows
TITLES = {
    "one_object/seen": "One object, combinations seen in training",
    "one_object/held_out": "One object, a combination never seen",
    "two_objects/seen": "Two objects, combinations seen in training",
    "two_objects/held_out": "Two objects, a combination never seen",
}


def main() -> None:
    """Judge, write the report, draw the gallery."""
    parser = Parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run of launch/demo.py")
    run = parser.parse_args().run
    prompts = read_rows(run / "world" / "prompts.jsonl")
    candidates: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in read_rows(run / "reranked" / "scores.jsonl"):
        candidates[row["prompt_index"]].append(row)

    report: dict[str, Any] = defaultdict(dict)
    rows: list[gallery.Row] = []
    for group, title in TITLES.items():
        members = [index for index, prompt in enumerate(prompts) if prompt["group"] == group]
        judged = [judged_prompt(run, prompts[index], candidates[index]) for index in members]
        objects, split = group.split("/")
        report[objects][split] = {
            "captions": len(members),
            "first": round(fmean(bool(first.right) for _, first, _ in judged), 4),
            "best_of_16": round(fmean(bool(best.right) for _, _, best in judged), 4),
        }
        shown = zip(members[:ROWS_OF_GROUP], judged, strict=False)
        rows += [gallery.Row(prompts[index]["prompt"], images, title) for index, images in shown]
    report["tokenizer"] = tokenizer_quality(run)
    io.write_json(run / "report.json", report)
    columns = ("true scene", "first candidate", "best of 16")
    gallery.save(run, "Text to image on a small world", columns, rows, notes=summary(report))


def judged_prompt(run: Path, prompt: dict[str, Any], candidates: list[dict[str, Any]]) -> tuple[GalleryImage, ...]:
    """Return the true image, the first candidate and the one that CLIP ranks first, marked by the judge."""
    fields = prompt["scene"]
    things = tuple(Thing(**thing) for thing in fields["things"])
    scene = Scene(things, fields["relation"], fields["background"])

    def show(path: Path) -> GalleryImage:
        image = np.array(Image.open(path).convert("RGB"))
        return GalleryImage(torch.from_numpy(image).permute(2, 0, 1), judge.same(scene, judge.read(image)))

    if len(candidates) != 16:
        raise UserError(f"{run}/reranked: '{prompt['prompt']}' has {len(candidates)} candidates, the report needs 16")
    first = next(row for row in candidates if row["candidate"] == 0)
    best = next(row for row in candidates if row["rank"] == 1)
    return show(run / "world" / prompt["truth"]), *(show(run / "samples" / row["file"]) for row in (first, best))


def tokenizer_quality(run: Path) -> dict[str, float]:
    """PSNR, share of codes used and perplexity of the dVAE's hard codes on the held-out images."""
    opened = export.load(run / "dvae" / "export")
    stage = cast(dvae.Stage, opened.stage)
    source = str(run / "world" / "valid")
    batch = {"global_batch_size": 128, "micro_batch_size": 128, "rank": 0, "world_size": 1}
    config = DataConfig(train=source)
    stream = open_stream(config, source, stage.inputs, seed=0, train=False, ledger=None, **batch)
    with torch.inference_mode():
        batches = (batch for parts in stream.batches(0, stream.batches_per_epoch) for batch in parts)
        quality = stage.evaluate(opened.nets, batches)
    return {name: quality[name] for name in ("psnr_db", "codes_used", "perplexity")}


def summary(report: dict[str, Any]) -> list[str]:
    """The report in a few lines below the gallery's title."""
    lines = [
        f"{title}: first candidate {scores['first']:.0%} right, best of 16 by CLIP {scores['best_of_16']:.0%} "
        f"({scores['captions']} captions)"
        for group, title in TITLES.items()
        for scores in [report[group.split("/")[0]][group.split("/")[1]]]
    ]
    tokenizer = report["tokenizer"]
    return [*lines, f"Tokenizer: PSNR {tokenizer['psnr_db']:.1f} dB, {tokenizer['codes_used']:.0%} of the codes used"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file.

    Raises:
        UserError: there is no such file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; run the steps of launch/demo.py before this one")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    log.guarded(main)
