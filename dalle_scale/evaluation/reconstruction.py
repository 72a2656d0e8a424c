"""Exported image tokenizers over one data set: how well images come back, and how many bits they cost.

Bits per dimension: an encoder that picks one code c for each image x bounds its probability, whatever the prior:
-log2 p(x) <= -log2 p(x | c) - log2 p(c) (arXiv 1711.00937, Sec. 3.2 and 4.1). p(c) is that of the prior's exports,
p(x | c) a distribution around the decoded bytes; see evaluation/metrics/code_length.py.

Called by launch/evaluate.py; reconstruction_page.py writes the result. Every export sees the same images, at its own
size. An image always goes through the nets in the same batch, whatever the world size, and what is added up is added
in one order: the numbers are the same for any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_scale import dist, log
from dalle_scale.checkpoint import export
from dalle_scale.checkpoint.export import Export
from dalle_scale.config import DataConfig
from dalle_scale.data.manifest import Manifest
from dalle_scale.data.pipeline import Stream, open_stream
from dalle_scale.evaluation.code_priors import Prior, open_priors
from dalle_scale.evaluation.metrics import code_length
from dalle_scale.evaluation.metrics.ssim import WINDOW, ssim
from dalle_scale.nn.codebook_stats import perplexity, psnr_db, used_share
from dalle_scale.types import Batch, BatchSpec, ImageTokenizer, UserError

Row = dict[str, Any]

COLUMNS = {  # what is measured of an export: name -> (title, format)
    "dtype": ("computed in", "s"),
    "image_size": ("image side (pixels)", ",d"),
    "codes": ("codes an image", ",d"),
    "vocab": ("K", ",d"),
    "psnr_db": ("PSNR of the mean MSE (dB)", ".2f"),
    "ssim": ("SSIM (mean of R, G, B)", ".4f"),
    "codes_used": ("codes used", ",d"),
    "codes_used_share": ("share of K used", ".1%"),
    "perplexity": ("perplexity", ",.1f"),
    "bits": ("bits an image", ",.1f"),
    "entropy_bits": ("entropy-coded bits", ",.1f"),
    "prior_bits": ("bits by the prior", ",.1f"),
    "prior_bits_given_caption": ("bits by the prior given the caption", ",.1f"),
    "bits_per_dim": ("bits/dim", ".3f"),
    "pixel_bits_per_dim": ("bits/dim of the pixels", ".3f"),
    "code_bits_per_dim": ("bits/dim of the codes", ".3f"),
    "bits_per_dim_given_caption": ("bits/dim given the caption", ".3f"),
    "pixel_noise": ("distribution of the pixels", "s"),
    "samples": ("samples evaluated", ",d"),
    "samples_lost": ("samples lost", ",d"),
}
DEFINITIONS = {
    "dtype": "precision of the export's weights and activations, as --dtype says; some parts are always fp32",
    "image_size": "each export sees the images at its own size; at another size PSNR and SSIM are of other images",
    "vocab": "size of the vocabulary of codes",
    "psnr_db": "10 log10(255^2 / MSE); MSE is the mean over all values of all decoded uint8 images",
    "ssim": "Wang et al. 2004: 11 x 11 Gaussian window, sigma 1.5, K1 0.01, K2 0.03, range 255; R, G and B each on its "
    "own, windows inside the image; mean over windows, channels and images",
    "codes_used": "in any image; where there are several grids of codes, of K for each of them",
    "perplexity": "2^(entropy-coded bits / codes an image)",
    "bits": "codes an image x log2 K",
    "entropy_bits": "an image: its codes x entropy (bits) of how often each code occurs, over all images and "
    "positions of a grid; summed over the grids",
    "prior_bits": "an image: -log2 of the probability of its codes under the exports named with --prior, without a "
    "caption; also given the image's own, of a prior that takes captions",
    "bits_per_dim": "upper bound of -log2 p(image) over 3 x width x height, mean over the images. Of an image "
    "tokenizer: bits of the codes and of the pixels given the codes, as they could be written to a file. Of a stage "
    "that evaluates itself: its negative ELBO, which is the same sum",
    "pixel_bits_per_dim": "each byte by a logistic or normal distribution around the decoded byte, integrated over the "
    "intervals of the 256 bytes, those at the ends open. Family and scale, one for all images out of 2 x 64 (scales "
    "from 1/8 to 64 bytes, evenly in their logarithm), are the cheapest for these images; 7 bits name them",
    "code_bits_per_dim": "by the prior without captions; where there is none, codes an image x log2 K",
    "bits_per_dim_given_caption": "the same bound of -log2 p(image | caption), by the prior given the caption",
    "pixel_noise": "family and scale in bytes; a logistic one has a standard deviation of 1.81 x scale",
    "samples_lost": "could not be read; left out, see ledger.jsonl",
    "other columns": "what the stage's own evaluate() returns",
    "numbers that are not finite": "strings in JSON: inf, -inf, nan; PSNR is inf where all images come back exactly",
}


@dataclass(frozen=True)
class Subject:
    """An export to evaluate."""

    name: str  # short, unlike the others'
    export: Export
    image_size: int
    tokenizer: ImageTokenizer | None  # None: only the stage's own `evaluate`
    prior: Prior | None = None  # None: codes cost log2 K each


@dataclass(frozen=True)
class Example:
    """One image before and after."""

    original: Tensor  # uint8 [3, S, S] on the CPU
    reconstruction: Tensor
    psnr_db: float
    ssim: float


def open_subjects(
    folders: Sequence[Path],
    device: torch.device,
    priors: Sequence[Path] = (),
    text_tokenizer: str | None = None,
    dtype: str = "fp32",
) -> list[Subject]:
    """Open exports and the priors of their codes.

    Args:
        priors: exports, in any order; each finds its tokenizer among `folders`.
        text_tokenizer: of the priors' captions: file, folder or name; None = the priors' own.
        dtype: of the exports, as `export.load` takes it; priors are fp32.

    Raises:
        UserError: one is named twice, is no export, is not an image tokenizer, or its images are too small for SSIM;
            a prior is that of none of them, or of a level beside another that is missing.
    """
    names = short_names(folders)
    subjects = [_open_subject(name, folder, device, dtype) for name, folder in zip(names, folders, strict=True)]
    tokenizers = {subject.name: (subject.export, subject.tokenizer) for subject in subjects if subject.tokenizer}
    found = open_priors(priors, tokenizers, device, text_tokenizer)
    return [replace(subject, prior=found.get(subject.name)) for subject in subjects]


def short_names(folders: Sequence[Path]) -> list[str]:
    """As much of the end of each path as tells it from the others; without the `export` that a run calls it.

    Raises:
        UserError: a folder is there twice.
    """
    parts = [folder.absolute().parts for folder in folders]
    if twice := [folder for number, folder in enumerate(folders) if parts[number] in parts[:number]]:
        raise UserError(f"{twice[0]}: this export is named twice; name each once")
    parts = [names[:-1] if names[-1] == "export" and len(names) > 2 else names for names in parts]
    if len(set(parts)) < len(parts):  # one folder and the `export` in it
        return [str(folder) for folder in folders]
    counts = range(1, max(map(len, parts)) + 1)
    tries = (["/".join(names[-count:]) for names in parts] for count in counts)
    return next(names for names in tries if len(set(names)) == len(names))


def _open_subject(name: str, folder: Path, device: torch.device, dtype: str) -> Subject:
    opened = export.load(folder, device, dtype)
    tokenizer = opened.stage.tokenizer(opened.nets)
    if tokenizer is None:
        if opened.stage.evaluator(opened.nets) is None or "image" not in opened.stage.inputs.keys:
            raise UserError(f"{folder}: stage '{opened.name}' is not an image tokenizer; give the export of one (dvae)")
        return Subject(name, opened, opened.stage.inputs.image_size, None)
    if tokenizer.image_size < WINDOW:
        size = f"{tokenizer.image_size} x {tokenizer.image_size}"
        raise UserError(f"{folder}: images of {size} are smaller than the window of SSIM, {WINDOW} x {WINDOW}")
    return Subject(name, opened, tokenizer.image_size, tokenizer)


class Images:
    """The first images of a data set in the order of validation, at one size: this rank's part of them."""

    def __init__(self, stream: Stream, samples: int | None, batch: int, rank: int, world_size: int) -> None:
        self.digest = stream.manifest_digest
        self.samples = min(samples or stream.num_samples, stream.num_samples)
        self._stream, self._batch, self._rank, self._world_size = stream, batch, rank, world_size

    @property
    def num_batches(self) -> int:
        """Batches of every rank."""
        return -(-self.samples // (self._batch * self._world_size))

    def read(self, device: torch.device) -> Iterator[tuple[Tensor, Batch]]:
        """Places int64 [B] (on the CPU) and batches (on the device), all of B slots; what is not there has weight 0."""
        for number, [batch] in enumerate(self._stream.batches(0, self.num_batches)):
            first = (number * self._world_size + self._rank) * self._batch
            places = torch.arange(first, first + self._batch)
            beyond = places >= self.samples
            for tensor in batch.values():
                tensor[beyond] = 0
            batch["id"][beyond] = -1
            yield places, {key: tensor.to(device) for key, tensor in batch.items()}


def open_images(
    folder: Path,
    image_size: int,
    samples: int | None,
    batch: int,
    ledger: Path,
    alone: bool = False,
    prior: Prior | None = None,
) -> Images:
    """Open a data set.

    Args:
        samples: at most so many; None = all.
        batch: images at once on one rank.
        alone: all images on this rank, whatever the others do.
        prior: captions are read too where it takes them and the data set has them.

    Raises:
        UserError: no data set with images, or an empty one; captions are missing, or their text tokenizer.
    """
    inputs, text = BatchSpec(image_size=image_size), None
    if prior and prior.text_length:
        if "txt" in Manifest.open(folder).members:
            inputs = replace(inputs, text_length=prior.text_length, text_vocab=prior.text_vocab)
            text = prior.text_tokenizer
        elif not prior.without_captions:
            raise UserError(f"{folder}: has no captions, and {prior.folder} models codes given captions only")
    rank, world_size = (0, 1) if alone else (dist.rank(), dist.world_size())
    stream = open_stream(
        DataConfig(train=str(folder), text_tokenizer=text, max_bad_share=1.0),  # the table says how many are lost
        str(folder),
        inputs,
        seed=0,
        global_batch_size=batch * world_size,
        micro_batch_size=batch,
        rank=rank,
        world_size=world_size,
        train=False,
        ledger=ledger,
    )
    return Images(stream, samples, batch, rank, world_size)


class _Tally:
    """Measurements of this rank."""

    def __init__(self, tokenizer: ImageTokenizer | None, samples: int, prior: Prior | None = None) -> None:
        self.tokenizer, self.prior = tokenizer, prior
        # by place: 1 = read, sum of squared errors, SSIM, bits by the prior, the same given the caption
        self.found = torch.zeros(samples, 5, dtype=torch.float64)
        self.pairs = torch.zeros(256, 256, dtype=torch.int64)  # decoded byte, byte
        self.captions = False  # whether images come with captions for the prior
        self.sizes: list[int] = []  # codes of an image at each level
        levels = len(tokenizer.grids) if tokenizer else 1
        self.counts = torch.zeros(levels, tokenizer.vocab if tokenizer else 0, dtype=torch.float64)

    def add(self, places: Tensor, batch: Batch) -> None:
        """Measure a batch. Empty slots go through the nets with the others, so that all batches have one shape."""
        good = (batch["weight"] > 0).cpu()
        self.found[places[good], 0] = 1
        if self.tokenizer is None:
            return
        codes, decoded = _round_trip(self.tokenizer, batch["image"])
        self.sizes = [grid**2 for grid in self.tokenizer.grids]
        for level, part in enumerate(torch.split(codes[good], self.sizes, dim=1)):
            self.counts[level] += torch.bincount(part.flatten(), minlength=self.tokenizer.vocab)
        self.found[places[good], 1] = _squared_error(decoded, batch["image"])[good].double()
        self.found[places[good], 2] = ssim(decoded, batch["image"]).cpu()[good]
        self.pairs += code_length.count_pairs(decoded[good], batch["image"][good])
        if self.prior is not None:
            self._add_prior(self.prior, places, good, codes, batch)

    def _add_prior(self, prior: Prior, places: Tensor, good: Tensor, codes: Tensor, batch: Batch) -> None:
        codes = codes.to(batch["image"].device)
        self.captions = prior.text_length > 0 and "text" in batch
        if prior.without_captions:
            self.found[places[good], 3] = prior.bits(codes)[good]
        if self.captions:
            self.found[places[good], 4] = prior.bits(codes, batch["text"])[good]

    def join(self) -> None:
        """Bring together what all ranks have measured (a collective). Raises UserError if there is nothing."""
        dist.all_reduce(self.found)  # a place belongs to one rank, so this collects; nothing is added up here
        dist.all_reduce(self.counts)
        dist.all_reduce(self.pairs)
        if not self.found[:, 0].any():
            raise UserError(f"none of the {len(self.found):,} samples can be read, see ledger.jsonl; fix the data")

    def numbers(self, image_size: int) -> Row:
        """Columns of the table, after `join`."""
        samples = int(self.found[:, 0].sum())
        about = {"samples": samples, "samples_lost": len(self.found) - samples}
        if self.tokenizer is None:
            return {"image_size": image_size, **about}
        mse = self.found[:, 1].sum() / (samples * 3 * image_size**2)
        codes = sum(self.sizes)
        entropy_bits = sum(n * float(perplexity(row).log2()) for n, row in zip(self.sizes, self.counts, strict=True))
        return {
            "image_size": image_size,
            "codes": codes,
            "vocab": self.tokenizer.vocab,
            "psnr_db": float(psnr_db(mse)),
            "ssim": float(self.found[:, 2].sum() / samples),
            "codes_used": int((self.counts > 0).sum()),
            "codes_used_share": float(used_share(self.counts)),
            "perplexity": 2 ** (entropy_bits / codes),
            "bits": codes * math.log2(self.tokenizer.vocab),
            "entropy_bits": entropy_bits,
            **self._code_lengths(samples, 3 * image_size**2, codes * math.log2(self.tokenizer.vocab)),
            **about,
        }

    def _code_lengths(self, samples: int, values: int, uniform_bits: float) -> Row:
        """Bits by the prior and bits per dimension. values: of an image; uniform_bits: of its codes without prior."""
        pixels = code_length.cheapest(self.pairs)
        pixel_bits_per_dim = pixels.bits / (samples * values)
        row: Row = {"pixel_bits_per_dim": pixel_bits_per_dim, "pixel_noise": str(pixels)}
        code_bits = uniform_bits
        if self.prior is not None and self.prior.without_captions:
            code_bits = row["prior_bits"] = float(self.found[:, 3].sum()) / samples
        row["code_bits_per_dim"] = code_bits / values
        row["bits_per_dim"] = pixel_bits_per_dim + row["code_bits_per_dim"]
        if self.captions:
            given = row["prior_bits_given_caption"] = float(self.found[:, 4].sum()) / samples
            row["bits_per_dim_given_caption"] = pixel_bits_per_dim + given / values
        return row


@torch.no_grad()
def measure(subject: Subject, source: Images, device: torch.device) -> Row:
    """Evaluate one export over all ranks (a collective), each image read once.

    Returns:
        name, export (its folder), stage, and the COLUMNS; then what the stage's own `evaluate` returns. Its ELBO is the
        column bits_per_dim. Where another name of its is also a column: left out if the column is measured here, for
        all exports alike; else as <stage>_<name>.

    Raises:
        UserError: not one image can be read.
    """
    tally = _Tally(subject.tokenizer, source.samples, subject.prior)

    def watched() -> Iterator[Batch]:
        read = source.read(device)
        for places, batch in log.progress(read, subject.name, "batches", total=source.num_batches):
            tally.add(places, batch)
            yield batch
        tally.join()

    batches = watched()
    evaluator = subject.export.stage.evaluator(subject.export.nets)
    own = evaluator.evaluate(batches) if evaluator else {}
    for _ in batches:  # what the stage did not ask for
        pass
    about = {
        "name": subject.name,
        "export": str(subject.export.folder),
        "stage": subject.export.name,
        "dtype": subject.export.dtype,
    }
    row = {**about, **tally.numbers(subject.image_size)}
    for name, value in own.items():
        if name == "elbo_bits_per_dim" and subject.tokenizer is None and evaluator and evaluator.in_bytes:
            row["bits_per_dim"] = float(value)
        elif name not in COLUMNS:
            row[name] = float(value)
        elif name not in row:
            row[f"{subject.export.name}_{name}"] = float(value)
    return row


@torch.no_grad()
def examples(subject: Subject, source: Images, device: torch.device) -> dict[int, Example]:
    """Images and what an export makes of them, by place; none if it is not a tokenizer."""
    shown: dict[int, Example] = {}
    for places, batch in source.read(device) if subject.tokenizer else ():
        assert subject.tokenizer is not None
        images = batch["image"]
        _, decoded = _round_trip(subject.tokenizer, images)
        psnr = psnr_db(_squared_error(decoded, images).double() / images[0].numel())
        similarity = ssim(decoded, images)
        for slot in torch.nonzero(batch["weight"] > 0).flatten().tolist():
            pair = images[slot].cpu(), decoded[slot].cpu()
            shown[int(places[slot])] = Example(*pair, float(psnr[slot]), float(similarity[slot]))
    return shown


def _round_trip(tokenizer: ImageTokenizer, images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 images [B, 3, S, S] -> codes int64 [B, N] on the CPU, decoded uint8 images [B, 3, S, S]."""
    codes = tokenizer.encode(images)
    decoded = tokenizer.decode(codes)
    assert decoded.dtype == torch.uint8 and decoded.shape == images.shape
    return codes.flatten(1).cpu(), decoded


def _squared_error(decoded: Tensor, images: Tensor) -> Tensor:
    """Sum over each image, exact: uint8 [B, 3, S, S] twice -> int64 [B] on the CPU."""
    return (decoded.int() - images.int()).square().sum(dim=(1, 2, 3)).cpu()
