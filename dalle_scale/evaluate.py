"""Exported image tokenizers over one data set: how well pictures come back, and how many bits they cost.

Called by launch/evaluate.py; evaluate_page.py writes what comes out. Every export sees the same pictures, at its own
size. A picture always goes through the nets in the same batch, whatever the world size, and what is added up is added
in one order: the numbers are the same for any number of ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_scale import dist, log
from dalle_scale.checkpoint import export
from dalle_scale.checkpoint.export import Export
from dalle_scale.config import DataConfig
from dalle_scale.data.pipeline import Stream, open_stream
from dalle_scale.nn.ssim import WINDOW, ssim
from dalle_scale.nn.usage import perplexity, psnr_db, used_share
from dalle_scale.types import Batch, ImageTokenizer, Needs, UserError

Row = dict[str, Any]

COLUMNS = {  # what is measured of an export: name -> (title, format)
    "image_size": ("picture side (pixels)", ",d"),
    "codes": ("codes a picture", ",d"),
    "vocab": ("K", ",d"),
    "psnr_db": ("PSNR of the mean MSE (dB)", ".2f"),
    "ssim": ("SSIM (mean of R, G, B)", ".4f"),
    "codes_used": ("codes used", ",d"),
    "codes_used_share": ("share of K used", ".1%"),
    "perplexity": ("perplexity", ",.1f"),
    "bits": ("bits a picture", ",.1f"),
    "entropy_bits": ("entropy-coded bits", ",.1f"),
    "samples": ("samples evaluated", ",d"),
    "samples_lost": ("samples lost", ",d"),
}
DEFINITIONS = {
    "image_size": "each export sees the pictures at its own size; at another size PSNR and SSIM are of other pictures",
    "vocab": "size of the vocabulary of codes",
    "psnr_db": "10 log10(255^2 / MSE); MSE is the mean over all values of all decoded uint8 pictures",
    "ssim": "Wang et al. 2004: 11 x 11 Gaussian window, sigma 1.5, K1 0.01, K2 0.03, range 255; R, G and B each on its "
    "own, windows inside the picture; mean over windows, channels and pictures",
    "codes_used": "in any picture; where there are several grids of codes, of K for each of them",
    "perplexity": "2^(entropy-coded bits / codes a picture)",
    "bits": "codes a picture x log2 K",
    "entropy_bits": "a picture: its codes x entropy (bits) of how often each code occurs, over all pictures and "
    "positions of a grid; summed over the grids",
    "samples_lost": "could not be read; left out, see ledger.jsonl",
    "other columns": "what the stage's own evaluate() returns",
    "numbers that are not finite": "strings in JSON: inf, -inf, nan; PSNR is inf where all pictures come back exactly",
}


@dataclass(frozen=True)
class Subject:
    """An export to evaluate."""

    name: str  # short, unlike the others'
    export: Export
    image_size: int
    tokenizer: ImageTokenizer | None  # None: only the stage's own `evaluate`


@dataclass(frozen=True)
class Example:
    """One picture before and after."""

    original: Tensor  # uint8 [3, S, S] on the CPU
    reconstruction: Tensor
    psnr_db: float
    ssim: float


def open_subjects(folders: Sequence[Path], device: torch.device) -> list[Subject]:
    """Open exports.

    Raises:
        UserError: one is named twice, is no export, is not an image tokenizer, or its pictures are too small for SSIM.
    """
    names = short_names(folders)
    return [_open_subject(name, folder, device) for name, folder in zip(names, folders, strict=True)]


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


def _open_subject(name: str, folder: Path, device: torch.device) -> Subject:
    opened = export.load(folder, device)
    make = getattr(opened.stage, "tokenizer", None)
    if make is None:
        if not hasattr(opened.stage, "evaluate") or opened.stage.needs.keys != ("image",):
            raise UserError(f"{folder}: stage '{opened.name}' is not an image tokenizer; give the export of one (dvae)")
        return Subject(name, opened, opened.stage.needs.image_size, None)
    tokenizer: ImageTokenizer = make(opened.nets)
    if tokenizer.image_size < WINDOW:
        size = f"{tokenizer.image_size} x {tokenizer.image_size}"
        raise UserError(f"{folder}: pictures of {size} are smaller than the window of SSIM, {WINDOW} x {WINDOW}")
    return Subject(name, opened, tokenizer.image_size, tokenizer)


class Pictures:
    """The first pictures of a data set in the order of validation, at one size: this rank's part of them."""

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


def open_pictures(
    folder: Path, image_size: int, samples: int | None, batch: int, ledger: Path, alone: bool = False
) -> Pictures:
    """Open a data set.

    Args:
        samples: at most so many; None = all.
        batch: pictures at once on one rank.
        alone: all pictures on this rank, whatever the others do.

    Raises:
        UserError: no data set with images, or an empty one.
    """
    rank, world_size = (0, 1) if alone else (dist.rank(), dist.world_size())
    stream = open_stream(
        DataConfig(train=str(folder), max_bad_share=1.0),  # the table says how many are lost
        str(folder),
        Needs(image_size=image_size),
        seed=0,
        batch_samples=batch * world_size,
        micro_batch_samples=batch,
        rank=rank,
        world_size=world_size,
        train=False,
        ledger=ledger,
    )
    return Pictures(stream, samples, batch, rank, world_size)


class _Tally:
    """What this rank has measured."""

    def __init__(self, tokenizer: ImageTokenizer | None, samples: int) -> None:
        self.tokenizer = tokenizer
        self.found = torch.zeros(samples, 3, dtype=torch.float64)  # by place: 1 = read, sum of squared errors, SSIM
        self.sizes: list[int] = []  # codes of a picture at each level
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

    def join(self) -> None:
        """Bring together what all ranks have measured (a collective). Raises UserError if there is nothing."""
        dist.all_reduce(self.found)  # a place belongs to one rank, so this collects; nothing is added up here
        dist.all_reduce(self.counts)
        if not self.found[:, 0].any():
            raise UserError(f"none of the {len(self.found):,} samples can be read, see ledger.jsonl; mend the data")

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
            **about,
        }


@torch.no_grad()
def measure(subject: Subject, pictures: Pictures, device: torch.device) -> Row:
    """Evaluate one export over all ranks (a collective), each picture read once.

    Returns:
        name, export (its folder), stage, and the COLUMNS; then what the stage's own `evaluate` returns. Where a name of
        its is also a column: left out if the column is measured here, for all exports alike; else as <stage>_<name>.

    Raises:
        UserError: not one picture can be read.
    """
    tally = _Tally(subject.tokenizer, pictures.samples)

    def watched() -> Iterator[Batch]:
        read = pictures.read(device)
        for places, batch in log.progress(read, subject.name, "batches", total=pictures.num_batches):
            tally.add(places, batch)
            yield batch
        tally.join()

    batches = watched()
    evaluate = getattr(subject.export.stage, "evaluate", None)
    own: dict[str, float] = evaluate(subject.export.nets, batches) if evaluate else {}
    for _ in batches:  # what the stage did not ask for
        pass
    about = {"name": subject.name, "export": str(subject.export.folder), "stage": subject.export.name}
    row = {**about, **tally.numbers(subject.image_size)}
    for name, value in own.items():
        if name not in COLUMNS:
            row[name] = float(value)
        elif name not in row:
            row[f"{subject.export.name}_{name}"] = float(value)
    return row


@torch.no_grad()
def examples(subject: Subject, pictures: Pictures, device: torch.device) -> dict[int, Example]:
    """Pictures and what an export makes of them, by place; none if it is not a tokenizer."""
    shown: dict[int, Example] = {}
    for places, batch in pictures.read(device) if subject.tokenizer else ():
        assert subject.tokenizer is not None
        images = batch["image"]
        _, decoded = _round_trip(subject.tokenizer, images)
        psnr = psnr_db(_squared_error(decoded, images).double() / images[0].numel())
        similarity = ssim(decoded, images)
        for slot in torch.nonzero(batch["weight"] > 0).flatten().tolist():
            pair = images[slot].cpu(), decoded[slot].cpu()
            shown[int(places[slot])] = Example(*pair, float(psnr[slot]), float(similarity[slot]))
    return shown


def document(data: Path, pictures: Pictures, rows: Sequence[Row]) -> dict[str, Any]:
    """The comparison: how it was done, and a row for each export."""
    protocol = {
        "data_set": str(data),
        "split": data.absolute().name,
        "digest": pictures.digest,
        "samples": pictures.samples,
        "order": "of validation: one fixed shuffle",
        "resize": "centre square, area-resized to the export's own image_size",
    }
    return {"protocol": protocol, "definitions": DEFINITIONS, "exports": list(rows)}


def as_json(numbers: dict[str, Any]) -> str:
    """A document as JSON; see DEFINITIONS for numbers that are not finite, which JSON does not know."""
    rows = [
        {
            key: value if not isinstance(value, float) or math.isfinite(value) else str(value)
            for key, value in row.items()
        }
        for row in numbers["exports"]
    ]
    return json.dumps({**numbers, "exports": rows}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _round_trip(tokenizer: ImageTokenizer, images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 images [B, 3, S, S] -> codes int64 [B, N] on the CPU, decoded uint8 images [B, 3, S, S]."""
    codes = tokenizer.encode(images)
    decoded = tokenizer.decode(codes)
    assert decoded.dtype == torch.uint8 and decoded.shape == images.shape
    return codes.flatten(1).cpu(), decoded


def _squared_error(decoded: Tensor, images: Tensor) -> Tensor:
    """Sum over each picture, exact: uint8 [B, 3, S, S] twice -> int64 [B] on the CPU."""
    return (decoded.int() - images.int()).square().sum(dim=(1, 2, 3)).cpu()
