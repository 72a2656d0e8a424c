"""Samples or reconstructions against a data set: FID, KID, Inception Score, precision and recall.

    extractor = features.open_inception(path, "2048", device)
    reference = collect(open_data(Path("data/train"), 32, None, 64, ledger), extractor, device)
    samples = collect(open_samples(Path("runs/samples"), None, 64), extractor, device)
    result = compare(samples, reference, extractor, ["frechet"], subset=1000, batch=64)

Called by launch/fidelity.py; image_sets.py has the images, result_schema.py the result. An image always
goes through the nets in the same batch, and rank 0 adds features up in the order of the images, whichever rank they
come from: the numbers are the same for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dalle_scale import dist, io, log
from dalle_scale.evaluation import result_schema as results
from dalle_scale.evaluation.feature_extractors import Extractor
from dalle_scale.evaluation.image_sets import Source
from dalle_scale.evaluation.metrics import distribution
from dalle_scale.types import UserError

MEASURES = ("frechet", "kernel", "score", "neighbours")
KEPT = 50_000  # images of a set whose features stay in memory: all measures but the Frechet distance are of these
NEIGHBOURS_OF = 10_000  # images of a set that precision and recall are of: they cost the product of both numbers
SUBSETS, SUBSET_SAMPLES = 100, 1000  # of KID
SPLITS = 10  # of the Inception Score
NEIGHBOURS = 3  # k of precision and recall
SEED = 2020  # of subsets and splits
STATISTICS = "dalle_scale reference statistics 1"


@dataclass(frozen=True)
class Statistics:
    """Statistics that distances are computed from: complete on rank 0; other ranks know `about`."""

    about: results.Images
    mean: Tensor  # float64 [D]
    covariance: Tensor  # float64 [D, D]
    features: Tensor  # float32 [N, D], the first KEPT
    logits: Tensor  # float32 [N, C]


def collect(source: Source, extractor: Extractor, device: torch.device) -> Statistics:
    """Describe all images of all ranks (a collective).

    Raises:
        UserError: fewer than two images can be read, or features are not finite.
    """
    moments = distribution.Moments(extractor.dimensions)
    kept: list[Tensor] = []
    found = 0
    for images, good in log.progress(source.read(device), source.about.split, "batches", source.num_batches):
        described = torch.cat([*extractor.extract(images), good[:, None].float()], dim=1)
        described[~good] = 0
        if not described.isfinite().all():
            raise UserError(f"{extractor.source}: makes features that are not finite; its weights are broken")
        # every rank fills its own row, and a sum with zeros is exact: this collects, nothing is added up here
        shared = torch.zeros(dist.world_size(), *described.shape)
        shared[dist.rank()] = described
        for block in dist.all_reduce(shared):
            block = block[block[:, -1] > 0]
            if dist.is_main():
                moments.add(block[:, : extractor.dimensions])
                kept.append(block[: max(0, KEPT - found), :-1])
            found += len(block)
    if found < 2:
        raise UserError(f"{source.about.folder}: {found} of {source.about.samples} images can be read; fix the data")
    about = source.about.model_copy(update={"samples": found, "samples_lost": source.about.samples - found})
    if not dist.is_main():
        nothing = torch.zeros(0)
        return Statistics(about, nothing, nothing, nothing, nothing)
    features, logits = torch.split(torch.cat(kept), [extractor.dimensions, extractor.classes], dim=1)
    return Statistics(about, moments.mean, moments.covariance, features, logits)


def pick_measures(asked: Sequence[str] | None, extractor: Extractor) -> list[str]:
    """Those that are asked for (None = all), if the extractor offers them. Raises UserError if it does not."""
    if extractor.classes:
        return list(asked or MEASURES)
    if asked and "score" in asked:
        raise UserError("--measures: score needs a classifier; that is --inception FILE with its last layer")
    return list(asked or (name for name in MEASURES if name != "score"))


def check_counts(measures: Sequence[str], extractor: Extractor, samples: int, reference: int, subset: int) -> None:
    """Raise UserError if there are too few images for one of the measures: on all ranks alike.

    Args:
        samples, reference: how many images there are.
        subset: images of a subset of the kernel distance.
    """
    for what, count in (("samples", samples), ("reference", reference)):
        if "frechet" in measures and count <= extractor.dimensions:
            raise UserError(
                f"the {what}: {count:,} images, but features of {extractor.dimensions:,} dimensions, so the "
                "covariance is singular and the Frechet distance undefined; take more images or other --measures"
            )
        if "kernel" in measures and count < subset:
            raise UserError(
                f"the {what}: {count:,} images, but the kernel distance samples subsets of {subset:,}; take more "
                "images, a smaller --subset, or other --measures"
            )
        if "neighbours" in measures and count <= NEIGHBOURS:
            raise UserError(
                f"the {what}: {count} images, but their {NEIGHBOURS} nearest neighbours are asked for; take more "
                "images, or other --measures"
            )
    if "score" in measures and samples < SPLITS:
        raise UserError(f"the samples: {samples} images, but {SPLITS} splits; take more images, or other --measures")


def compare(
    samples: Statistics, reference: Statistics, extractor: Extractor, measures: Sequence[str], subset: int, batch: int
) -> results.Result:
    """The numbers and all that they depend on; on rank 0. Arguments as in `check_counts`, which comes first."""
    numbers: list[results.Number] = []
    if "frechet" in measures:
        numbers.append(_frechet(samples, reference, extractor))
    if "kernel" in measures:
        numbers.append(_kernel(samples, reference, extractor, subset))
    if "score" in measures:
        numbers.append(_score(samples, extractor))
    if "neighbours" in measures:
        numbers += _neighbours(samples, reference, extractor)
    device = dist.device()
    return results.Result(
        format=results.FORMAT,
        numbers=tuple(numbers),
        samples=samples.about,
        reference=reference.about,
        extractor=_extraction(extractor),
        batch_size=batch,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        torch=torch.__version__,
    )


def _frechet(samples: Statistics, reference: Statistics, extractor: Extractor) -> results.Frechet:
    log.say("frechet: roots of covariances")
    return results.Frechet(
        name=_name(extractor, "frechet", samples),
        value=distribution.frechet_distance(samples.mean, samples.covariance, reference.mean, reference.covariance),
        samples=samples.about.samples,
        reference_samples=reference.about.samples,
        arithmetic="float64",
    )


def _kernel(samples: Statistics, reference: Statistics, extractor: Extractor, subset: int) -> results.Kernel:
    distances = distribution.kernel_distances(samples.features, reference.features, subset, SUBSETS, SEED)
    value, std = _mean_and_std(
        torch.tensor(list(log.progress(distances, "kernel", "subsets", SUBSETS)), dtype=torch.float64)
    )
    return results.Kernel(
        name=_name(extractor, "kernel", samples),
        value=value,
        std=std,
        samples=len(samples.features),
        reference_samples=len(reference.features),
        kernel="(x.y / D + 1)^3, unbiased",
        subsets=SUBSETS,
        subset_samples=subset,
        seed=SEED,
    )


def _score(samples: Statistics, extractor: Extractor) -> results.Score:
    value, std = _mean_and_std(distribution.inception_scores(samples.logits, SPLITS, SEED))
    name = _name(extractor, "score", samples)
    return results.Score(name=name, value=value, std=std, samples=len(samples.logits), splits=SPLITS, seed=SEED)


def _neighbours(samples: Statistics, reference: Statistics, extractor: Extractor) -> list[results.Neighbours]:
    ours, theirs = samples.features[:NEIGHBOURS_OF], reference.features[:NEIGHBOURS_OF]
    directions = {"precision": (ours, theirs), "recall": (theirs, ours)}
    numbers = []
    for measure, (points, centres) in log.progress(directions.items(), "neighbours", "directions", len(directions)):
        number: dict[str, Any] = {
            "measure": measure,
            "name": _name(extractor, measure, samples),
            "value": distribution.covered_share(points, centres, distribution.neighbour_radii(centres, NEIGHBOURS)),
            "samples": len(ours),
            "reference_samples": len(theirs),
            "neighbours": NEIGHBOURS,
        }
        numbers.append(results.Neighbours(**number))
    return numbers


def save_statistics(path: Path, statistics: Statistics, extractor: Extractor) -> None:
    """Write what is known of a reference, whole or not at all, for other samples to be compared with it."""
    header = {
        "format": STATISTICS,
        "images": statistics.about.model_dump_json(),
        "extractor": _extraction(extractor).model_dump_json(),
    }
    tensors = {"mean": statistics.mean, "covariance": statistics.covariance, "features": statistics.features}
    path.parent.mkdir(parents=True, exist_ok=True)
    with io.atomic(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, header)


def load_statistics(path: Path, extractor: Extractor, image_size: int) -> Statistics:
    """Read what `save_statistics` wrote.

    Raises:
        UserError: not such a file, or of another extractor or size of images.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != STATISTICS:
                raise UserError(f"{path}: no statistics of a reference; --save-reference writes them")
            about = results.Images.model_validate_json(header["images"])
            seen_by = results.Extraction.model_validate_json(header["extractor"])
            tensors = {name: file.get_tensor(name) for name in ("mean", "covariance", "features")}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot read the statistics: {error}") from None
    before, now = (f"{e.kind} {e.layer} {e.sha256[:12]}" for e in (seen_by, extractor))
    if before != now:
        raise UserError(f"{path}: statistics by {before}, now it is {now}; name the data set, or the same weights")
    if about.image_size != image_size:
        raise UserError(
            f"{path}: of images of {about.image_size} pixels, the samples have {image_size}; name the data set"
        )
    return Statistics(about, **tensors, logits=torch.zeros(0))


def _extraction(extractor: Extractor) -> results.Extraction:
    """An extractor as it stands in a result."""
    return results.Extraction(**{name: getattr(extractor, name) for name in results.Extraction.model_fields})


def _name(extractor: Extractor, measure: str, samples: Statistics) -> str:
    return extractor.name(measure, reconstructions=samples.about.kind == "reconstructions")


def _mean_and_std(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std(correction=0))
