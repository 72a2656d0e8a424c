"""An exported model, captions and seeds -> images. Needs neither deepspeed nor webdataset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_scale import config
from dalle_scale.checkpoint import export
from dalle_scale.data.decode import BadSample, decode
from dalle_scale.data.text import TextTokenizer, open_text
from dalle_scale.data.transforms import square
from dalle_scale.io import digest
from dalle_scale.nn import precision, residual_scaling
from dalle_scale.sampling import batch_size
from dalle_scale.types import ImageSampler, ImageTokenizer, OnCode, SampleRequest, StrictModel, UserError

FIXED_BATCH_SIZE = 256  # sampled at a time by stages whose memory nobody counts
DTYPES = ("fp32", *residual_scaling.HALF_TYPES, "auto")


@dataclass(frozen=True)
class Batch:
    """B images to sample together."""

    prompt_index: list[int]  # whose caption, B numbers
    candidate: list[int]  # counted from 0 for each prompt
    seed: list[int]
    request: SampleRequest


@dataclass(frozen=True)
class Samples(Batch):
    """B images that were sampled together."""

    images: Tensor  # uint8 [B, 3, S, S] on the CPU


def candidate_seed(seed: int, prompt: str, candidate: int) -> int:
    """Seed of one image, 0 .. 2^63 - 1: a pure function of its arguments, so other prompts change nothing."""
    digest = hashlib.sha256(f"{seed}\n{candidate}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def read_image(path: Path, size: int) -> Tensor:
    """The centre square of an image file, uint8 [3, size, size]. Raises UserError: missing, or no image."""
    try:
        pixels = square(decode(path.read_bytes()), size)
    except (OSError, BadSample) as error:
        raise UserError(f"{path}: {error}; give a JPEG, PNG, WebP, GIF or BMP file") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


class Sampler:
    """Exports that sample images: one of a stage that has a sampler, or several whose stage has a joint one, as the
    `vqvae2_prior` of each level.

    `text` is None for a model without captions; its only prompt is "".
    """

    def __init__(
        self,
        folders: Sequence[Path],
        device: str | torch.device = "cpu",
        text_tokenizer: str | Path | None = None,
        dtype: str | None = None,
    ) -> None:
        """
        Args:
            text_tokenizer: file, folder or name; None = the export's own.
            dtype: of a transformer's matrices, fp32, bf16, fp16 or auto (see nn/precision.py); the rest and all other
                models are fp32. None = bf16 on a GPU, where products and caches take half of the time and memory, else
                fp32.

        Raises:
            UserError: these exports do not sample images (together), a tokenizer is missing or does not fit, or dtype
                is not fp32 and no matrices may have it.
        """
        models = [export.load(folder, device) for folder in folders]
        self.models, self.device = sorted(models, key=_level), torch.device(device)
        self.stage = self.models[0].stage
        self.sampler = _open_sampler(self.models)
        self.text = self._open_text(text_tokenizer)
        self.dtype = self._cast(dtype)
        self.sampler.prepare()

    def _cast(self, dtype: str | None) -> str:
        takes_half = self.sampler.takes_half
        dtype = dtype or ("bf16" if takes_half and self.device.type == "cuda" else "fp32")
        if dtype == "auto" and not takes_half:
            return "fp32"
        if dtype != "fp32" and not takes_half:
            raise UserError(f"dtype: {dtype}, but only models of the stage 'dalle' take 16 bits; leave it out")
        return precision.cast(self.models[0].nets, self.device, dtype)

    def _open_text(self, name: str | Path | None) -> TextTokenizer | None:
        if not self.text_length:
            return None
        name = name or next(filter(None, (model.part("text_tokenizer") for model in self.models)), None)
        if name is None:
            raise UserError(
                f"{self.models[-1].folder}: holds no text tokenizer; name the one that the model was trained with"
            )
        return open_text(name, vocab=self.sampler.text_vocab)

    @property
    def text_length(self) -> int:
        """Tokens that a caption is truncated to; 0 without captions."""
        return self.sampler.text_length

    def options(self, **given: Any) -> StrictModel:
        """The sampler's options, those that are not given at their defaults. Raises UserError."""
        return config.parse(self.sampler.Options, given, "options")

    @property
    def image_tokenizer(self) -> ImageTokenizer:
        """Of a model of codes. Raises UserError."""
        if self.sampler.tokenizer is None:
            raise UserError("prime: this model samples pixels, not codes; there are no rows of codes to keep")
        return self.sampler.tokenizer

    def prime_codes(self, path: str | Path, rows: int) -> Tensor:
        """Codes int64 [rows * grid] of the top of an image file: its centre square, scaled to the model's size.

        Raises:
            UserError: more rows than the grid has, or a file that is missing or no image.
        """
        grid = self.image_tokenizer.grids[0]
        if not 1 <= rows <= grid:
            raise UserError(f"prime rows: {rows}, but images have {grid} rows of codes; take 1 to {grid}")
        image = read_image(Path(path), self.image_tokenizer.image_size)[None].to(self.device)
        return self.image_tokenizer.encode(image)[0, : rows * grid]

    def sample(
        self,
        prompts: Sequence[str],
        candidates: int,
        seed: int,
        options: StrictModel | None = None,
        images_per_batch: int | None = None,
        prime: Tensor | None = None,
    ) -> Iterator[Samples]:
        """Images for each prompt, prompt by prompt, in batches that may hold several prompts.

        A model without captions takes the one prompt "". A prompt longer than the model's text length keeps its first
        tokens; `text.truncated_samples` counts those.

        Args:
            candidates: images a prompt.
            seed: of the run; see `candidate_seed`.
            options: from `options`; None = the defaults.
            images_per_batch: images sampled at a time, None = as many as fit; does not change them.
            prime: int64 [P], the first codes of all images, as from `prime_codes`.

        Raises:
            UserError: a parameter out of range, or one that this model does not take; at once, not with the first
                batch.
        """
        options = options or self.options()
        self.check(prompts, candidates, options, primed=prime is not None)
        places = [(owner, candidate) for owner in range(len(prompts)) for candidate in range(candidates)]
        batches = self.batches(prompts, places, seed, options, images_per_batch, prime)
        return (Samples(**vars(batch), images=self.decode(self.sample_batch(batch))) for batch in batches)

    def batches(
        self,
        prompts: Sequence[str],
        places: Sequence[tuple[int, int]],
        seed: int,
        options: StrictModel | None = None,
        images_per_batch: int | None = None,
        prime: Tensor | None = None,
    ) -> list[Batch]:
        """The batches of `sample`, for some of the images: `places` are (index of the prompt, candidate).

        Raises:
            UserError: images_per_batch below 1.
        """
        options = options or self.options()
        if images_per_batch is not None and images_per_batch < 1:
            raise UserError(f"batch: {images_per_batch}, but at least one is needed")
        text = torch.empty(len(prompts), 0, dtype=torch.int64, device=self.device)
        if self.text is not None:
            text = self.text.encode(prompts, self.text_length).to(self.device)
        if images_per_batch is None:
            images_per_batch = batch_size.even(len(places), self._fitting(places, options))
        found = []
        for start in range(0, len(places), images_per_batch):
            prompt_index, numbers = map(list, zip(*places[start : start + images_per_batch], strict=True))
            seeds = [
                candidate_seed(seed, prompts[owner], number)
                for owner, number in zip(prompt_index, numbers, strict=True)
            ]
            given = None if prime is None else prime.expand(len(seeds), -1)
            request = SampleRequest(torch.tensor(seeds, device=self.device), text[prompt_index], options, given)
            found.append(Batch(prompt_index, numbers, seeds, request))
        return found

    def _fitting(self, places: Sequence[tuple[int, int]], options: StrictModel) -> int:
        """Number of images sampled at a time unless the user names one."""
        memory = self.sampler.memory(options)
        if memory is None:
            return FIXED_BATCH_SIZE
        captions = len({owner for owner, _ in places})
        return batch_size.images_per_batch(memory, captions, len(places), self.device)

    @torch.inference_mode()
    def sample_batch(self, batch: Batch, on_code: OnCode | None = None) -> Tensor:
        """Codes int64 [B, ...] of a model of codes, else uint8 images [B, 3, S, S]; on the model's device, and there
        when this returns. Only some samplers call `on_code`."""
        sampled = self.sampler.sample(replace(batch.request, on_progress=on_code))
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # another thread reads it, on its own stream
        return sampled

    def decode(self, sampled: Tensor) -> Tensor:
        """Output of `sample_batch` as uint8 images [B, 3, S, S] on the CPU.

        One image at a time: what a convolution rounds depends on how many it is given, and an image must not.
        """
        tokenizer = self.sampler.tokenizer
        if tokenizer is None:
            return sampled.cpu()
        decode = tokenizer.decode_grid if sampled.ndim == 3 else tokenizer.decode  # a grid is larger than in training
        return torch.cat([decode(codes).cpu() for codes in torch.split(sampled, 1)])

    def record(self, options: StrictModel, primed: bool = False) -> dict[str, Any]:
        """Record of how these exports sample with these options: plain values, defaults written out."""
        record: dict[str, Any] = {
            "models": [str(model.folder) for model in self.models],
            "models_sha256": [digest(model.folder) for model in self.models],
            "stage": self.models[0].name,
            "dtype": self.dtype,
            "options": self.sampler.resolve(options, primed),
        }
        if all(model.trained for model in self.models):
            record["weights"] = [model.trained["weights"]["model"] for model in self.models]
            record["step"] = [model.trained["step"] for model in self.models]
        return record

    def check(self, prompts: Sequence[str], candidates: int, options: StrictModel, primed: bool = False) -> None:
        """Raises UserError for numbers out of range, or options that these models do not take."""
        for name, value in (("candidates", candidates), ("prompts", len(prompts))):
            if value < 1:
                raise UserError(f"{name}: {value}, but at least one is needed")
        self.sampler.resolve(options, primed)
        if self.text is None and any(prompts):
            raise UserError("prompts: this model was trained without captions; leave them out")


def list_options(folders: Sequence[Path]) -> str:
    """A line for each option of the exports' sampler. Raises UserError: they do not sample images."""
    return config.list_options(_open_sampler(sorted(map(export.load, folders), key=_level)).Options)


def _open_sampler(models: Sequence[export.Export]) -> ImageSampler:
    """The sampler of one export, or the joint one of several. Raises UserError."""
    first = models[0]
    try:
        if len(models) > 1:
            sampler = first.stage.joint_sampler([(model.stage, model.nets) for model in models])
        else:
            sampler = first.stage.sampler(first.nets)
    except UserError as error:
        raise UserError(f"{first.folder}: {error}") from None
    if sampler is None and len(models) > 1:
        raise UserError(
            f"{models[1].folder}: several models sample together only if each is the prior of another level"
        )
    if sampler is None:
        raise UserError(f"{first.folder}: stage '{first.name}' does not sample images")
    return sampler


def _level(model: export.Export) -> int:
    """The level of codes that an export models; 0 of one that models none."""
    prior = model.stage.code_prior(model.nets)
    return prior.level if prior else 0
