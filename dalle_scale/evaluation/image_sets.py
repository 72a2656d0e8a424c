"""Image sets that launch/fidelity.py compares: a data set, samples, or reconstructions.

Each says what it is (fidelity_result.Images) and hands its images to the ranks in batches of one shape, so that a
image always goes through the nets in the same batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_scale import dist
from dalle_scale.data import manifest
from dalle_scale.data.reader import ahead
from dalle_scale.evaluation import reconstruction
from dalle_scale.evaluation.result_schema import MADE_BY, UNKNOWN, Images
from dalle_scale.io import digest
from dalle_scale.sampling import rerank
from dalle_scale.types import ImageTokenizer, UserError


@dataclass(frozen=True)
class Source:
    """Source of images. Every rank has its own part of them."""

    about: Images  # with all that should be there; what cannot be read is known at the end
    num_batches: int  # of every rank
    # uint8 images [B, 3, S, S] on the device and whether each is an image, bool [B] on the CPU. Batch n of rank r
    # holds the places (n * world size + r) * B and on.
    read: Callable[[torch.device], Iterator[tuple[Tensor, Tensor]]]


def open_source(
    folder: Path,
    image_size: int | None,
    limit: int | None,
    batch: int,
    ledger: Path,
    scores: Path | None = None,
    reconstruct: tuple[Path, ImageTokenizer] | None = None,
) -> Source:
    """Samples, a data set, or what an image tokenizer makes of one.

    Args:
        folder: that launch/sample.py wrote, or a data set.
        image_size: side in pixels that a data set is brought to; None = as the samples or the tokenizer have it.
        limit: at most so many images; None = all.
        scores: of samples, see `open_samples`.
        reconstruct: an export and the tokenizer opened from it.

    Raises:
        UserError: options that do not go together; what `open_samples` and `open_data` raise.
    """
    is_data = (folder / manifest.NAME).is_file()
    if reconstruct and not is_data:
        raise UserError(f"--reconstruct: {folder} is no data set; name one with --samples")
    if scores and is_data:
        raise UserError(f"--scores: {folder} is a data set; scores are of samples")
    if is_data:
        size = reconstruct[1].image_size if reconstruct else image_size
        if size is None:
            raise UserError("--image-size: name the side in pixels that both data sets are brought to")
        source = open_data(folder, size, limit, batch, ledger)
    else:
        source = open_samples(folder, limit, batch, scores)
    if image_size not in (None, source.about.image_size):
        raise UserError(f"--image-size: {image_size}, but the images have {source.about.image_size}; leave it out")
    return reconstructions(source, *reconstruct) if reconstruct else source


def open_data(folder: Path, image_size: int, limit: int | None, batch: int, ledger: Path) -> Source:
    """The first `limit` images of a data set (None = all) in the order of validation, each at image_size.

    Raises:
        UserError: as `evaluate.open_images`.
    """
    images = reconstruction.open_images(folder, image_size, limit, batch, ledger)
    about = Images(
        kind="data set",
        folder=str(folder),
        split=folder.absolute().name,
        digest=images.digest,
        samples=images.samples,
        samples_lost=0,
        image_size=image_size,
        resize=f"centre square, area-resized to {image_size} x {image_size}",
        order="of validation: one fixed shuffle",
        made_by={},
    )

    def read(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        for _, found in images.read(device):
            yield found["image"], found["weight"].cpu() > 0

    return Source(about, images.num_batches, read)


def reconstructions(source: Source, folder: Path, tokenizer: ImageTokenizer) -> Source:
    """Reconstructions of the images of a data set by an image tokenizer, opened from the export `folder`."""

    def read(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        for images, good in source.read(device):
            yield tokenizer.decode(tokenizer.encode(images)), good

    made_by = {"model": str(folder), "model_sha256": digest(folder)}
    about = source.about.model_copy(update={"kind": "reconstructions", "made_by": made_by})
    return replace(source, about=about, read=read)


def open_samples(folder: Path, limit: int | None, batch: int, scores: Path | None = None) -> Source:
    """The first `limit` images (None = all) that launch/sample.py wrote into `folder`, as they are.

    Args:
        scores: scores.jsonl of launch/rerank.py; only what it has kept.

    Raises:
        UserError: no samples, or they are not square; a wrong file of scores, or sampling.json.
    """
    rows, made_by = rerank.read_samples(folder), sampling(folder)
    if scores:
        rows = _kept(rows, scores)
        made_by["kept"] = f"{len(rows)} by {scores}, sha256 {digest(scores)}"
    rows = rows[:limit]
    height, width = rerank.read_images([folder / rows[0]["file"]]).shape[2:]
    if height != width:
        raise UserError(
            f"{folder}: the samples are {width} x {height}; only square ones can be compared with a data set"
        )
    rank, world_size = dist.rank(), dist.world_size()
    num_batches = -(-len(rows) // (batch * world_size))

    def load(number: int) -> tuple[Tensor, Tensor]:
        first = (number * world_size + rank) * batch
        part = rows[first : first + batch]
        images = torch.zeros(batch, 3, height, width, dtype=torch.uint8)
        if part:
            found = rerank.read_images([folder / row["file"] for row in part])
            if found.shape[2:] != (height, width):
                raise UserError(f"{folder / part[0]['file']}: another size than {rows[0]['file']}; sample one size")
            images[: len(part)] = found
        return images, torch.arange(batch) < len(part)

    def read(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        with ThreadPoolExecutor(max_workers=1) as pool:
            for images, good in ahead(pool, load, range(num_batches)):
                yield images.to(device), good

    about = Images(
        kind="samples",
        folder=str(folder),
        split=folder.absolute().name,
        digest=_digest(folder, rows),
        samples=len(rows),
        samples_lost=0,
        image_size=height,
        resize="none",
        order="of samples.jsonl",
        made_by=made_by,
    )
    return Source(about, num_batches, read)


def sampling(folder: Path) -> dict[str, Any]:
    """Record of how the samples in `folder` were made: its sampling.json, "unknown" for what is missing.

    Raises:
        UserError: it is not a JSON object.
    """
    path = folder / "sampling.json"
    record: Any = {}
    if path.is_file():
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{path}: not a JSON object; launch/sample.py writes it: sample again, or take it away")
    return {**dict.fromkeys(MADE_BY, UNKNOWN), "kept": "all", **record}


def _kept(rows: list[dict[str, Any]], scores: Path) -> list[dict[str, Any]]:
    """The rows that a reranking has kept."""
    try:
        lines = [json.loads(line) for line in scores.read_text(encoding="utf-8").splitlines()]
        files = {line["file"] for line in lines if line["kept"]}
        scored = {line["file"] for line in lines}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{scores}: not the scores.jsonl of launch/rerank.py, whose rows say file and kept") from None
    if scored != {row["file"] for row in rows}:
        raise UserError(f"{scores}: scores of other samples; rank these with launch/rerank.py")
    return [row for row in rows if row["file"] in files]


def _digest(folder: Path, rows: list[dict[str, Any]]) -> str:
    """sha256 of what the image files hold, in order."""
    total = hashlib.sha256()
    for row in rows:
        path = folder / row["file"]
        if not path.is_file():
            raise UserError(f"{path}: no such image; sample again")
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
