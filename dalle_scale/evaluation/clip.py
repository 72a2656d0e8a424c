"""CLIP models over a data set of images and captions: zero-shot classification, and retrieval both ways.

Called by launch/evaluate_clip.py; clip_page.py writes the result, clip_evaluate_samples.py is about
samples of a generator. An image or caption always goes through a net in the same batch, whatever the world size, so
the numbers are the same for any number of ranks. The vectors of all pairs are held, everything else is streamed.

A model gets no credit for a tie: whatever is not worse than the right answer by at least `TIE` stands before it. One
that gives all images the same vector is never right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from dalle_scale import dist, log
from dalle_scale.data.decode import BadSample
from dalle_scale.data.ledger import Ledger
from dalle_scale.data.manifest import Manifest
from dalle_scale.data.reader import Reader
from dalle_scale.evaluation import reconstruction
from dalle_scale.io import digest
from dalle_scale.sampling import rerank
from dalle_scale.types import UserError

TIE = 1e-6  # cosines of float32 vectors that are closer than this are called equal
RECALLS = (1, 5, 10)  # the R@K
MOST_CLASSES = 1000  # so many different captions may be classes by themselves
DEFAULT_SIZE = 224  # side of the images that a model gets that does not say its own

_BLOCK = 1 << 23  # cosines held at a time

Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model to evaluate."""

    name: str  # short, unlike the others'
    model: str  # as `rerank.open_scorer` takes it
    digest: str | None  # sha256 of its files; None: published weights, known by their name
    image_size: int
    scorer: rerank.Scorer
    texts: dict[str, Tensor] = field(default_factory=dict)  # unit vectors [E] of `embed_texts`, the same on all ranks

    def truncated_captions(self) -> int:
        """Number of different texts that were longer than the model reads (a collective)."""
        return int(dist.all_reduce(torch.tensor(self.scorer.truncated_captions)))


def open_subjects(models: Sequence[str], device: torch.device, image_size: int | None = None) -> list[Subject]:
    """Open CLIP models, named as `rerank.open_scorer` takes them.

    Args:
        image_size: side in pixels that images are read at; None = an export's own, 224 for other models. Either then
            does with them what its own preprocessing does.

    Raises:
        UserError: one is named twice or cannot be opened.
    """
    names = reconstruction.short_names([Path(model) for model in models])
    subjects = []
    for name, model in zip(names, models, strict=True):
        scorer = rerank.open_scorer(model, device)
        files = Path(model) if Path(model).exists() else Path(model.partition(":")[2] or model)
        known = digest(files) if files.exists() else None
        subjects.append(Subject(name, model, known, image_size or _own_size(Path(model)), scorer))
    return subjects


def _own_size(folder: Path) -> int:
    """The image size of an export of the clip stage, else the default."""
    path = folder / "config.yaml"
    return int(yaml.safe_load(path.read_text("utf-8"))["model"]["image_size"]) if path.is_file() else DEFAULT_SIZE


@dataclass(frozen=True)
class Classes:
    """Classes of zero-shot classification."""

    names: tuple[str, ...]
    templates: tuple[str, ...]  # each with one {} for the name
    source: str  # where they come from

    def prompts(self, name: str) -> list[str]:
        """The captions of a class, one a template."""
        return [template.replace("{}", name) for template in self.templates]

    def labels(self, captions: Sequence[str]) -> list[int]:
        """The class of each caption: that whose name, or one of whose prompts, it is. -1: none.

        Raises:
            UserError: two classes have a caption in common, or no caption is of a class.
        """
        numbers: dict[str, int] = {}
        for number, name in enumerate(self.names):
            for text in (name, *self.prompts(name)):
                if numbers.setdefault(text, number) != number:
                    raise UserError(f"{self.source}: '{text}' is a caption of two classes; name them apart")
        labels = [numbers.get(caption, -1) for caption in captions]
        if max(labels) < 0:
            raise UserError(
                f"{self.source}: '{captions[0]}' and all other captions of the data set are neither a class nor a "
                "prompt of one; write the classes as in the captions, or give --templates that make captions of them"
            )
        return labels


def read_templates(path: Path) -> tuple[str, ...]:
    """Templates of a file, one a line.

    Raises:
        UserError: the file cannot be read or is empty; a template has no {}, or is there twice.
    """
    try:
        templates = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the templates: {error}") from None
    if not templates:
        raise UserError(f"{path}: holds no templates; write one a line, as in: a photo of a {{}}")
    for template in templates:
        if "{}" not in template:
            raise UserError(f"{path}: '{template}' has no {{}} for the class, as in: a photo of a {{}}")
        if templates.count(template) > 1:
            raise UserError(f"{path}: '{template}' stands there twice; name each template once")
    return tuple(templates)


@dataclass(frozen=True)
class Pairs:
    """The pairs of a data set as one model sees them; lost ones are left out. The same on all ranks."""

    ids: Tensor  # int64 [N], numbers of the samples in the data set
    images: Tensor  # unit vectors float32 [N, E]
    captions: list[str]  # the M different ones, in the order of their first images
    texts: Tensor  # their unit vectors [M, E]
    own: Tensor  # int64 [N], each image's caption
    lost: int


def open_pairs(folder: Path, subject: Subject, samples: int | None, batch: int, ledger: Path) -> reconstruction.Images:
    """The first `samples` images of a data set, None = all, in the order of validation, at the model's size.

    Raises:
        UserError: no data set with images and captions, or an empty one.
    """
    members = Manifest.open(folder).members
    if "txt" not in members:
        raise UserError(f"{folder}: has no captions (txt); it holds: {', '.join(members)}")
    return reconstruction.open_images(folder, subject.image_size, samples, batch, ledger)


def embed(
    subject: Subject, folder: Path, source: reconstruction.Images, batch: int, ledger: Path, device: torch.device
) -> Pairs:
    """Vectors of all images and captions (a collective).

    Args:
        batch: captions at once on one rank.
        ledger: file that captions that cannot be read are added to.

    Raises:
        UserError: no pair can be read; the vectors are not finite.
    """
    ids, images = _embed_images(subject, source, device)
    read = _read_captions(folder, ids, ledger)
    found = [caption for caption in read if caption is not None]
    if not found:
        raise UserError(f"{folder}: none of the {len(ids):,} pairs can be read, see {ledger}; fix the data")
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(found))}
    own = torch.tensor([numbers[caption] for caption in found])
    there = torch.tensor([caption is not None for caption in read])
    texts = embed_texts(subject, list(numbers), images.shape[1], batch)
    return Pairs(ids[there], images[there], list(numbers), texts, own, len(read) - len(found))


def _embed_images(subject: Subject, source: reconstruction.Images, device: torch.device) -> tuple[Tensor, Tensor]:
    """By place, for all ranks: numbers of the samples int64 [N], -1 where there is none; unit vectors [N, E]."""
    ids = torch.zeros(source.samples, dtype=torch.int64)  # 1 more than the number, so that ranks can be added up
    vectors = torch.zeros(0, 0)
    read = source.read(device)
    for places, batch in log.progress(read, subject.name, "batches", total=source.num_batches):
        found = subject.scorer.image_vectors(batch["image"])  # empty slots too: all batches have one shape
        if not len(vectors):
            vectors = torch.zeros(source.samples, found.shape[1])
        good = (batch["weight"] > 0).cpu()
        ids[places[good]] = batch["id"].cpu()[good] + 1
        vectors[places[good]] = found[good]
    dist.all_reduce(ids)
    return ids - 1, _checked(subject, dist.all_reduce(vectors))


def _read_captions(folder: Path, ids: Tensor, ledger: Path) -> list[str | None]:
    """Captions of samples, without white space around them; None where there is no sample or no caption."""
    manifest = Manifest.open(folder)
    reader = Reader(manifest)
    captions: list[str | None] = []
    for sample in ids.tolist():
        caption, reason = None, ""
        try:
            caption = reader.read(sample, "txt").decode().strip() if sample >= 0 else None
        except BadSample as error:
            reason = str(error)
        except UnicodeDecodeError:
            reason = "the caption is not UTF-8"
        if reason and dist.is_main():
            about = {"shard": manifest.shard_url(sample), "key": manifest.key(sample), "reason": reason}
            Ledger(ledger).add([{**about, "epoch": 0, "step": 0}])
        captions.append(caption)
    reader.close()
    return captions


def embed_texts(subject: Subject, texts: Sequence[str], dimensions: int, batch: int) -> Tensor:
    """Unit vectors [len(texts), dimensions]; each text is encoded once, and the ranks share the work (a collective).

    Raises:
        UserError: the vectors are not finite.
    """
    new = [text for text in dict.fromkeys(texts) if text not in subject.texts]
    vectors = torch.zeros(len(new), dimensions)
    starts = range(0, len(new), batch)[dist.rank() :: dist.world_size()]
    for start in log.progress(starts, subject.name, "batches of texts", len(starts)):
        vectors[start : start + batch] = subject.scorer.caption_vectors(new[start : start + batch])
    subject.texts.update(zip(new, _checked(subject, dist.all_reduce(vectors)), strict=True))
    return torch.stack([subject.texts[text] for text in texts])


def embed_classes(subject: Subject, classes: Classes, dimensions: int, batch: int) -> Tensor:
    """A unit vector a class [C, dimensions]: the mean of the unit vectors of its prompts, brought to length 1
    (arXiv 2103.00020, Sec. 3.1.4). A collective. Raises UserError as `embed_texts`."""
    prompts = [prompt for name in classes.names for prompt in classes.prompts(name)]
    vectors = embed_texts(subject, prompts, dimensions, batch)
    return F.normalize(vectors.reshape(len(classes.names), len(classes.templates), -1).mean(dim=1), dim=1)


def _checked(subject: Subject, vectors: Tensor) -> Tensor:
    if not vectors.isfinite().all():
        raise UserError(f"{subject.model}: its vectors are not finite: the weights are broken")
    return vectors


@dataclass(frozen=True)
class Ranks:
    """Ranks of right answers, 1 = first; see `TIE`."""

    of_captions: Tensor  # int64 [N]: each image's own caption among all captions
    of_images: Tensor  # int64 [M]: each caption's best image among the images of other captions
    rivals: Tensor  # int64 [N]: the best of the captions that are not the image's own
    right_cosine: float  # mean over images, with their own captions
    wrong_cosine: float  # mean over images and all other captions


def rank_pairs(images: Tensor, captions: Tensor, own: Tensor) -> Ranks:
    """Rank captions for each image and images for each caption, in float64, by the block.

    Args:
        images: unit vectors [N, E].
        captions: unit vectors [M, E] of different captions, at least two.
        own: int64 [N], each image's caption.
    """
    assert len(captions) > 1, "nothing to choose from"
    images, captions = images.double(), captions.double()
    right = (images * captions[own]).sum(dim=1)
    best = torch.full((len(captions),), -math.inf, dtype=torch.float64).scatter_reduce(0, own, right, "amax")
    of_captions, rivals = [], []
    of_images = torch.ones(len(captions), dtype=torch.int64)
    rows = max(1, _BLOCK // len(captions))
    wrong = 0.0
    for block, block_right, block_own in zip(*(torch.split(t, rows) for t in (images, right, own)), strict=True):
        cosines = block @ captions.T
        wrong += float(cosines.sum() - block_right.sum())
        cosines.scatter_(1, block_own[:, None], -math.inf)  # only those of other captions compete
        of_captions.append(1 + (cosines >= block_right[:, None] - TIE).sum(dim=1))
        of_images += (cosines >= best - TIE).sum(dim=0)
        rivals.append(cosines.argmax(dim=1))
    wrong_pairs = len(images) * (len(captions) - 1)
    return Ranks(torch.cat(of_captions), of_images, torch.cat(rivals), float(right.mean()), wrong / wrong_pairs)


def retrieval(pairs: Pairs) -> Row:
    """R@K both ways, each with what chance gives; see clip_evaluate_page.DEFINITIONS.

    Raises:
        UserError: all captions are the same.
    """
    if len(pairs.captions) < 2:
        raise UserError(f"all captions are '{pairs.captions[0]}': there is nothing to tell apart; take other data")
    ranks = rank_pairs(pairs.images, pairs.texts, pairs.own)
    count = len(pairs.own)
    members = torch.bincount(pairs.own).tolist()  # images of each caption
    row: Row = {"images": count, "captions": len(pairs.captions)}
    for k in RECALLS:
        row[f"image_to_text_r{k}"] = _share(ranks.of_captions <= k)
        row[f"text_to_image_r{k}"] = _share(ranks.of_images <= k)
        row[f"chance_image_to_text_r{k}"] = min(1.0, k / len(pairs.captions))
        row[f"chance_text_to_image_r{k}"] = math.fsum(_chance(count, right, k) for right in members) / len(members)
    return {**row, "cosine_of_pairs": ranks.right_cosine, "cosine_of_others": ranks.wrong_cosine}


def _chance(count: int, right: int, k: int) -> float:
    """Probability that k of `count` images sampled without replacement hold one of the `right` ones."""
    k = min(k, count)
    return 1 - math.comb(count - right, k) / math.comb(count, k)


def caption_classes(captions: Sequence[str], source: int, templates: Sequence[str]) -> Classes | None:
    """The captions as classes, where they are few: at most `MOST_CLASSES`, with two images each on average."""
    if 2 <= len(captions) <= min(MOST_CLASSES, source // 2):
        return Classes(tuple(captions), tuple(templates), "the captions of the data set")
    return None


def classification(pairs: Pairs, classes: Classes, vectors: Tensor) -> Row:
    """Zero-shot classification (arXiv 2103.00020, Sec. 3.1) of the images whose caption is of a class.

    Without a right answer in first place, the prediction is the best of the wrong ones, so the confusion agrees with
    the accuracy.

    Args:
        vectors: of the classes, as from `embed_classes`.

    Raises:
        UserError: as `Classes.labels`.
    """
    labels = torch.tensor(classes.labels(pairs.captions))[pairs.own]
    of_class = labels >= 0
    own = labels[of_class]
    ranks = rank_pairs(pairs.images[of_class], vectors, own)
    predicted = torch.where(ranks.of_captions == 1, own, ranks.rivals)
    table = torch.bincount(own * len(classes.names) + predicted, minlength=len(classes.names) ** 2)
    table = table.reshape(len(classes.names), -1)  # right class, predicted class
    counts = table.sum(dim=1)
    accuracy = [float(row[c]) / int(row.sum()) if row.any() else None for c, row in enumerate(table)]
    known = [share for share in accuracy if share is not None]
    return {
        "classes": len(classes.names),
        "images": int(of_class.sum()),
        "images_without_class": int((~of_class).sum()),
        "top1": _share(ranks.of_captions <= 1),
        "top5": _share(ranks.of_captions <= 5),
        "chance_top1": 1 / len(classes.names),
        "chance_top5": min(1.0, 5 / len(classes.names)),
        "mean_class_accuracy": math.fsum(known) / len(known),
        "per_class": {
            name: {"images": int(counts[c]), "accuracy": accuracy[c]} for c, name in enumerate(classes.names)
        },
        "confusion": {
            name: {classes.names[int(p)]: int(table[c, p]) for p in table[c].nonzero()[:, 0]}
            for c, name in enumerate(classes.names)
            if counts[c]
        },
    }


def _share(right: Tensor) -> float:
    return int(right.sum()) / len(right)
