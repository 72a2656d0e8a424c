"""Rejection sampling by a classifier (VQ-VAE-2, arXiv 1906.00446, Sec. 3.3): less diversity for more quality.

A classifier that was trained apart gives each class-conditional sample the probability of the class it was sampled for;
only the best share of each class stays. The classifier here is CLIP without further training (arXiv 2103.00020,
Sec. 3.1): classes are captions, their probabilities

    softmax over c of  exp(logit_scale) * cosine(image, caption c)

    classes = read_classes(Path("classes.txt"), rows)
    verdicts = classify(open_scorer("runs/clip/export"), folder, rows, classes, images_per_batch=64)
    ranked = rerank.rank(rows, verdicts.probabilities)
    kept = rerank.keep(ranked, share=0.25)
    table = trade_off(ranked, verdicts)

The classifier that chooses also judges here: its probabilities rise by construction, whatever the images look like.
A judge of the images is another model, or people. Diversity, too, is measured in the classifier's own space.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from dalle_scale.sampling import prompts
from dalle_scale.sampling.rerank import Scorer, batches, keep
from dalle_scale.types import UserError

SHARES = (1.0, 0.5, 0.25, 0.1)  # of the table
CAVEAT = "The classifier that chooses also judges: that its own figures get better proves nothing."
MEASURES = {
    "probability": "of the right class: mean over the kept samples of a class, then over classes",
    "accuracy": "share of kept samples whose most probable class is the right one; mean over classes",
    "diversity": "mean cosine distance of two kept samples of a class in the classifier's space; mean over classes",
    "caveat": CAVEAT,
}


@dataclass(frozen=True)
class Verdicts:
    """Verdicts of a classifier on N samples."""

    probabilities: Tensor  # float64 [N], of the class that the sample was sampled for
    right: Tensor  # bool [N]: no other class is more probable
    vectors: Tensor  # float32 [N, E], the classifier's unit vectors of the images


def read_classes(path: Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Class captions of a file, one a line, or under "prompt" in the rows of a .jsonl file, for samples `rows`.

    Raises:
        UserError: the file cannot be read, holds fewer than two classes, or one of them twice; a sample's prompt is
            none of them; a class stands under two prompt numbers.
    """
    classes = prompts.read(path, "classes")
    for caption, times in Counter(classes).most_common(1):
        if times > 1:
            raise UserError(f"{path}: the class '{caption}' stands there {times} times; name each class once")
    if len(classes) < 2:
        raise UserError(f"{path}: a classifier needs at least two classes, one a line; the file holds {len(classes)}")
    _check(rows, classes, path)
    return classes


def _check(rows: Sequence[dict[str, Any]], classes: Sequence[str], path: Path) -> None:
    """Whether samples are of these classes, and those of a class together."""
    known = set(classes)
    numbers: dict[str, int] = {}
    for row in rows:
        prompt, number = row["prompt"], row["prompt_index"]
        if prompt not in known:
            near = difflib.get_close_matches(prompt, classes, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "add it, or sample with the captions of the file"
            raise UserError(f"{path}: the prompt '{prompt}' is none of the {len(classes)} classes; {hint}")
        if numbers.setdefault(prompt, number) != number:  # its candidates are the same images again
            pair = f"{numbers[prompt]} and {number}"
            raise UserError(f"prompts {pair} are the same class, '{prompt}'; sample a class once, with more candidates")


def class_probabilities(images: Tensor, classes: Tensor, scale: float) -> Tensor:
    """Zero-shot classification. Float64: in float32 the best candidates would all have probability 1.

    Args:
        images: unit vectors [N, E] of images.
        classes: unit vectors [C, E] of the class captions.
        scale: inverse temperature.

    Returns:
        Probabilities float64 [N, C].
    """
    return (scale * (images.double() @ classes.double().T)).softmax(dim=1)


def classify(
    scorer: Scorer, folder: Path, rows: Sequence[dict[str, Any]], classes: Sequence[str], batch_size: int
) -> Verdicts:
    """Classify samples whose images lie below `folder` by `scorer`. Shows a progress bar.

    Raises:
        UserError: as `rerank.read_images`.
    """
    class_parts = [classes[start : start + batch_size] for start in range(0, len(classes), batch_size)]
    captions = torch.cat([scorer.caption_vectors(part) for part in class_parts])
    vectors = torch.cat([scorer.image_vectors(images) for _, images in batches(folder, rows, batch_size)])
    numbers = {caption: number for number, caption in enumerate(classes)}
    own = torch.tensor([numbers[row["prompt"]] for row in rows])
    probabilities, right = [], []
    for part, part_own in zip(torch.split(vectors, batch_size), torch.split(own, batch_size), strict=True):
        table = class_probabilities(part, captions, scorer.scale)  # [batch, C]; that of all samples may not fit
        probabilities.append(table.gather(1, part_own[:, None])[:, 0])
        right.append(probabilities[-1] == table.amax(dim=1))
    return Verdicts(torch.cat(probabilities), torch.cat(right), vectors)


def trade_off(
    ranked: Sequence[dict[str, Any]], verdicts: Verdicts, wanted: float | None = None
) -> list[dict[str, Any]]:
    """Quality and diversity of the `SHARES` that leave a whole sample of every class, and of the share `wanted`.

    Returns:
        A row a share, the largest first: `share`; `kept_samples`, over all classes; and, as means over the kept samples
        of a class, then over the classes that have samples, `probability` of the right class, `accuracy` (share of
        samples whose most probable class is the right one) and `diversity`, which is None if a class keeps only one.
    """
    fewest = min(Counter(row["prompt_index"] for row in ranked).values())
    shares = {share for share in SHARES if share * fewest >= 1} | ({wanted} if wanted else set())
    table = []
    for share in sorted(shares, reverse=True):
        classes: dict[int, list[int]] = {}
        for place, row in enumerate(keep(ranked, share=share)):
            if row["kept"]:
                classes.setdefault(row["prompt_index"], []).append(place)
        kept = list(classes.values())
        spread = [diversity(verdicts.vectors[places]) for places in kept if len(places) > 1]
        table.append(
            {
                "share": share,
                "kept_samples": sum(map(len, kept)),
                "probability": fmean(float(verdicts.probabilities[places].mean()) for places in kept),
                "accuracy": fmean(float(verdicts.right[places].double().mean()) for places in kept),
                "diversity": fmean(spread) if len(spread) == len(kept) else None,
            }
        )
    return table


def diversity(vectors: Tensor) -> float:
    """Mean cosine distance, 1 - cosine, of all pairs of at least two unit vectors [K, E]: 0 means all the same."""
    assert len(vectors) > 1, "one vector has no pair"
    exact = vectors.double()
    pairs = len(exact) * (len(exact) - 1)
    return float(1 - (exact.sum(dim=0).square().sum() - exact.square().sum()) / pairs)


def lines(table: Sequence[dict[str, Any]]) -> list[str]:
    """The table in words, a line a share, and what to beware of. Nothing of no table."""
    words = [
        f"share {row['share']:g}: {row['kept_samples']} kept, probability of the right class {row['probability']:.4f}, "
        f"accuracy {row['accuracy']:.4f}, diversity "
        + ("not defined of one sample" if row["diversity"] is None else f"{row['diversity']:.4f}")
        for row in table
    ]
    return [*words, CAVEAT] if table else []
