"""Output of a ranking: scores.jsonl, the best images, and a gallery of them."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from dalle_scale import io
from dalle_scale.report import gallery
from dalle_scale.report.page import GalleryImage
from dalle_scale.sampling import rejection, rerank
from dalle_scale.types import UserError

GALLERY_PROMPTS, GALLERY_COLUMNS = 64, 16  # shown in the gallery; best/ has all

Row = dict[str, Any]


@dataclass(frozen=True)
class Ranking:
    """Samples in order, and by whom."""

    samples: Path  # folder of launch/sample.py, below which the images lie
    rows: list[Row]  # as of `rerank.keep`
    clip: str  # the name that it was opened by
    classes: Path | None = None  # of a classifier, with its
    trade_off: Sequence[Row] = ()  # as of `rejection.trade_off`


def check_folder(out: Path) -> None:
    """Raises UserError where writing would replace what no ranking wrote."""
    if (out / "best").exists() and not (out / "scores.jsonl").is_file():
        raise UserError(f"--out: {out / 'best'} is there and not from an earlier ranking; take another folder")


def save(out: Path, ranking: Ranking) -> list[str]:
    """Write all of it, in place of an earlier ranking; returns the lines to say.

    scores.jsonl, best/<prompt>_<rank>.png, gallery.png, gallery.html, and of a classifier trade_off.json.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "trade_off.json").unlink(missing_ok=True)
    with io.replacing(out / "best") as best:
        for row in ranking.rows:
            if row["kept"]:
                name = f"{row['prompt_index']:05d}_{row['rank']:04d}.png"
                shutil.copyfile(ranking.samples / row["file"], best / name)
    io.write_rows(out / "scores.jsonl", ranking.rows)
    if ranking.trade_off:
        about = {"classifier": ranking.clip, "classes": str(ranking.classes)}
        document = {**about, "measures": rejection.MEASURES, "shares": ranking.trade_off}
        io.write_json(out / "trade_off.json", document)
    every, best_one = (
        fmean(row["score"] for row in ranking.rows if row["rank"] <= last) for last in (len(ranking.rows), 1)
    )
    lines = rejection.lines(ranking.trade_off)
    lines.append(f"mean score: all candidates {every:.4f}, the best of each prompt {best_one:.4f}")
    _show(out, ranking, lines)
    return [*lines, f"{out / 'gallery.png'}"]


def _show(out: Path, ranking: Ranking, lines: list[str]) -> None:
    """The gallery: a row for each prompt, its best candidates from left to right."""
    kept: dict[int, list[Row]] = defaultdict(list)
    for row in sorted((row for row in ranking.rows if row["kept"]), key=lambda row: (row["prompt_index"], row["rank"])):
        kept[row["prompt_index"]].append(row)
    width = min(GALLERY_COLUMNS, *map(len, kept.values()))
    table = []
    for members in list(kept.values())[:GALLERY_PROMPTS]:
        images = rerank.read_images([ranking.samples / row["file"] for row in members[:width]])
        shown = (GalleryImage(i, note=f"score {r['score']:.3f}") for i, r in zip(images, members, strict=False))
        table.append(gallery.Row(members[0]["prompt"], tuple(shown)))
    notes = [f"{len(ranking.rows)} candidates for {len(kept)} captions, ranked by {ranking.clip}", *lines]
    if len(kept) > len(table) or any(len(members) > width for members in kept.values()):
        notes.append(f"Up to {width} images of the first {len(table)} captions; all kept images are in best/")
    columns = ["best", *(f"no. {rank}" for rank in range(2, width + 1))]
    gallery.save(out, "Best candidates", columns, table, notes)
