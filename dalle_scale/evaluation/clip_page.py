"""Output of launch/evaluate_clip.py: the same numbers as JSON and Markdown, a table to plot, and images."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalle_scale import io
from dalle_scale.data.decode import decode
from dalle_scale.data.manifest import Manifest
from dalle_scale.data.reader import Reader
from dalle_scale.data.transforms import square
from dalle_scale.evaluation.clip import RECALLS, TIE, Classes, Pairs, Row, Subject
from dalle_scale.evaluation.reconstruction import Images
from dalle_scale.io import digest
from dalle_scale.report import gallery, tables
from dalle_scale.report.page import GalleryImage

SHOWN_CAPTIONS, SHOWN_IMAGES = 16, 5

DEFINITIONS = {
    "image to text R@K": "share of images whose own caption is among the K nearest of the different captions; an "
    "equal caption of another image is the same one",
    "text to image R@K": "share of the different captions with an image of their own among the K nearest of all "
    "images; each caption counts once",
    "top-1, top-5": "share of images whose class is the nearest, or among the five nearest; chance: 1 / classes and "
    "5 / classes",
    "class": "mean of the unit vectors of its prompts, one a template, brought to length 1",
    "mean class accuracy": "mean over the classes of the share of their images that are right",
    "confusion": "right class -> predicted class -> images",
    "nearest": f"by cosine; a tie is never in favour of the right answer: what is closer to it than {TIE:g} stands "
    "before it",
    "chance": "of a random order",
    "cosine of pairs, of others": "mean over images with their own captions, with all other captions",
    "best of N": "mean over prompts of the expected CLIP score (cosine) of the best of N candidates, over all subsets "
    "of N; no bias for any N up to their number. Where one model ranks and judges, it grows in any case",
    "standard error": "of the mean, from how prompts differ; gain: over one candidate, error of the paired difference",
}


def about_data(folder: Path, images: Images, classes: Classes | None) -> Row:
    """Protocol of the evaluation of pairs."""
    return {
        "data_set": str(folder),
        "split": folder.absolute().name,
        "digest": images.digest,
        "samples": images.samples,
        "order": "of validation: one fixed shuffle",
        "resize": "centre square, area-resized to the model's image_size, then its own preprocessing",
        "classes": classes.source if classes else None,
        "templates": list(classes.templates) if classes else [],
        "tie": TIE,
    }


def about_samples(folder: Path, rows: Sequence[Row]) -> Row:
    """Description of the samples that were scored."""
    return {
        "folder": str(folder),
        "samples_jsonl_sha256": digest(folder / "samples.jsonl"),
        "images": len(rows),
        "prompts": len({row["prompt_index"] for row in rows}),
    }


def about_model(subject: Subject) -> Row:
    """Description of the model with these numbers. A collective."""
    return {
        "name": subject.name,
        "model": subject.model,
        "model_sha256": subject.digest,
        "image_size": subject.image_size,
        "truncated_captions": subject.truncated_captions(),
    }


def write(out: Path, numbers: Row) -> None:
    """Write `out`/clip.json and clip.md, and best_of.csv where samples were scored.

    Args:
        numbers: `protocol`, `models` (rows of `about_model` with `retrieval` and `classification`), `samples`,
            `best_of`; all but `models` may be missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    io.write_json(out / "clip.json", {"definitions": DEFINITIONS, **numbers}, allow_nan=False)
    io.write(out / "clip.md", markdown(numbers))
    (out / "best_of.csv").unlink(missing_ok=True)
    if "best_of" in numbers:
        lines = StringIO()
        writer = csv.DictWriter(lines, list(numbers["best_of"][0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(numbers["best_of"])
        io.write(out / "best_of.csv", lines.getvalue())


def markdown(numbers: Row) -> str:
    """The tables, how they came about, and what their numbers are."""
    models = numbers["models"]
    lines = ["# CLIP evaluated", ""]
    for row in models:
        known = f"sha256 {row['model_sha256'][:16]}" if row["model_sha256"] else "published weights"
        cut = f", {row['truncated_captions']:,} texts cut" if row["truncated_captions"] else ""
        lines.append(f"- {row['name']}: {row['model']} ({known}), images of {row['image_size']} pixels{cut}")
    if "protocol" in numbers:
        lines += ["", *_protocol(numbers["protocol"]), *_retrieval(models)]
        lines += _classification(models) if "classification" in models[0] else []
    if "best_of" in numbers:
        lines += _best_of(numbers["samples"], numbers["best_of"])
    lines += ["", "## What the numbers are", "", *(f"- {name}: {text}" for name, text in DEFINITIONS.items()), ""]
    return "\n".join(lines)


def _protocol(protocol: Row) -> list[str]:
    lines = [
        f"Data set {protocol['data_set']} (digest {protocol['digest'][:16]}), the first {protocol['samples']:,} "
        f"samples in the order {protocol['order']}. Resize: {protocol['resize']}."
    ]
    if protocol["classes"]:
        few = protocol["templates"][:3]
        more = f" and {len(protocol['templates']) - 3} more" if len(protocol["templates"]) > 3 else ""
        lines.append(f"Classes: {protocol['classes']}; templates: {', '.join(few)}{more}.")
    return lines


def _retrieval(models: Sequence[Row]) -> list[str]:
    names = [f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in RECALLS]
    titles = [f"{way} R@{k}" for way in ("image to text", "text to image") for k in RECALLS]
    head = ["model", "images", "lost", "captions", *titles, "cosine of pairs", "of others"]
    rows = []
    for model in models:
        row = model["retrieval"]
        counts = [f"{model['pairs']:,}", f"{model['pairs_lost']:,}", f"{row['captions']:,}"]
        cosines = [f"{row[f'cosine_of_{which}']:.4f}" for which in ("pairs", "others")]
        rows.append([model["name"], *counts, *(f"{row[name]:.1%}" for name in names), *cosines])
    chance = models[0]["retrieval"]
    rows.append(["chance", "", "", "", *(f"{chance[f'chance_{name}']:.1%}" for name in names), "", ""])
    return ["", "## Retrieval", "", *tables.markdown([head, *rows])]


def _classification(models: Sequence[Row]) -> list[str]:
    found = {model["name"]: model["classification"] for model in models}
    head = ["model", "classes", "images", "without class", "top-1", "top-5", "mean class accuracy"]
    rows = []
    for name, row in found.items():
        counts = [f"{row[key]:,}" for key in ("classes", "images", "images_without_class")]
        rows.append([name, *counts, *(f"{row[key]:.1%}" for key in ("top1", "top5", "mean_class_accuracy"))])
    first = models[0]["classification"]
    rows.append(["chance", "", "", "", f"{first['chance_top1']:.1%}", f"{first['chance_top5']:.1%}", ""])
    classes = []
    for name, cell in first["per_class"].items():
        shares = (row["per_class"][name]["accuracy"] for row in found.values())
        classes.append([name, f"{cell['images']:,}", *("–" if s is None else f"{s:.1%}" for s in shares)])
    lines = ["", "## Zero-shot classification", "", *tables.markdown([head, *rows]), ""]
    return [
        *lines,
        *tables.markdown([["class", "images", *found], *classes]),
        "",
        "The confusion matrices are in clip.json.",
    ]


def _best_of(samples: Row, rows: Sequence[Row]) -> list[str]:
    title = f"{samples['images']:,} samples for {samples['prompts']:,} prompts in {samples['folder']}"
    head = ["ranked by", "judged by", "N", "CLIP score", "standard error", "gain", "standard error"]
    names = ("score", "standard_error", "gain", "gain_standard_error")
    cells = [
        [row["ranked_by"], row["judged_by"], str(row["best_of"])]
        + ["–" if row[name] is None else f"{row[name]:.4f}" for name in names]
        for row in rows
    ]
    about = f"{title} (samples.jsonl {samples['samples_jsonl_sha256'][:16]}). To plot: best_of.csv."
    return ["", "## Best of N", "", about, "", *tables.markdown([head, *cells])]


def show(out: Path, subject: Subject, pairs: Pairs, folder: Path) -> Path:
    """Write a gallery of captions, each with the images of the data set `folder` that the model finds nearest."""
    captions = pairs.captions[:SHOWN_CAPTIONS]
    cosines = pairs.texts[: len(captions)] @ pairs.images.T
    best = cosines.topk(min(SHOWN_IMAGES, len(pairs.images)), dim=1)
    reader = Reader(Manifest.open(folder))

    def cell(place: int, caption: int, cosine: float) -> GalleryImage:
        pixels = square(decode(reader.read_image(int(pairs.ids[place]))), subject.image_size)
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
        return GalleryImage(image, bool(pairs.own[place] == caption), f"cosine {cosine:.3f}")

    rows = []
    for number, (caption, places, values) in enumerate(
        zip(captions, best.indices.tolist(), best.values.tolist(), strict=True)
    ):
        images = (cell(place, number, value) for place, value in zip(places, values, strict=True))
        rows.append(gallery.Row(caption, tuple(images)))
    reader.close()
    columns = ["nearest", *(f"no. {place}" for place in range(2, best.indices.shape[1] + 1))]
    notes = [
        f"{subject.model}: the nearest of {len(pairs.images):,} images of {folder} for {len(captions)} captions",
        "An image is right if it has this very caption.",
    ]
    target = out / f"examples_{subject.name.replace('/', '_')}"
    gallery.save(target, "What CLIP finds", columns, rows, notes)
    return target / "gallery.html"


def summary(numbers: dict[str, Any]) -> str:
    """The tables for the console."""
    return markdown(numbers).partition("\n## What the numbers are")[0]
