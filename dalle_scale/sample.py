"""An exported model, captions and seeds -> pictures. Needs neither deepspeed nor webdataset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dalle_scale.checkpoint import export
from dalle_scale.data.decode import decode
from dalle_scale.data.reader import BadSample
from dalle_scale.data.text import TextTokenizer, open_text
from dalle_scale.data.transforms import square
from dalle_scale.stages import dalle
from dalle_scale.types import ImageTokenizer, PictureSource, UserError


@dataclass(frozen=True)
class Samples:
    """A batch of B pictures."""

    prompt_index: list[int]  # whose caption, B numbers
    candidate: list[int]  # counted from 0 for each prompt
    seed: list[int]
    images: Tensor  # uint8 [B, 3, S, S] on the CPU


def candidate_seed(seed: int, prompt: str, candidate: int) -> int:
    """Seed of one picture, 0 .. 2^63 - 1: a pure function of its arguments, so other prompts change nothing."""
    digest = hashlib.sha256(f"{seed}\n{candidate}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Sampler:
    """An export of the `dalle` stage with its tokenizers, or of another stage that draws pictures from seeds alone.

    `text` is None for a model without captions; its only prompt is "".
    """

    def __init__(
        self, folder: str | Path, device: str | torch.device = "cpu", text_tokenizer: str | Path | None = None
    ) -> None:
        """text_tokenizer: file, folder or name; None = the export's own.

        Raises:
            UserError: not an export that draws pictures, or a tokenizer is missing or does not fit.
        """
        model = export.load(folder, device)
        self.stage, self.nets, self.device = model.stage, model.nets, torch.device(device)
        self.text: TextTokenizer | None = None
        if not isinstance(model.stage, dalle.Stage):
            if not isinstance(model.stage, PictureSource):
                raise UserError(f"{folder}: stage '{model.name}' does not draw pictures")
            return
        if model.stage.upstream is None:
            raise UserError(f"{folder}: holds no image tokenizer to decode with; train with `tokenizer: <its export>`")
        if model.stage.config.text_length:
            text_tokenizer = text_tokenizer or model.part("text_tokenizer")
            if text_tokenizer is None:
                raise UserError(f"{folder}: holds no text tokenizer; name the one that the model was trained with")
            self.text = open_text(text_tokenizer, vocab=model.stage.config.text_vocab)

    @property
    def image_tokenizer(self) -> ImageTokenizer:
        """Of a model of codes. Raises UserError."""
        if self.stage.upstream is None:
            raise UserError("prime: this model draws pixels, not codes; there are no rows of codes to keep")
        return self.stage.upstream

    def prime_codes(self, path: str | Path, rows: int) -> Tensor:
        """Codes int64 [rows * grid] of the top of a picture file: its centre square, scaled to the model's size.

        Raises:
            UserError: more rows than the grid has, or a file that is missing or no picture.
        """
        grid = self.image_tokenizer.grid
        if not 1 <= rows <= grid:
            raise UserError(f"prime rows: {rows}, but pictures have {grid} rows of codes; take 1 to {grid}")
        try:
            pixels = square(decode(Path(path).read_bytes()), self.image_tokenizer.image_size)
        except (OSError, BadSample) as error:
            raise UserError(f"{path}: {error}; give a JPEG, PNG, WebP, GIF or BMP file") from None
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(self.device)
        return self.image_tokenizer.encode(image)[0, : rows * grid]

    def draw(
        self,
        prompts: Sequence[str],
        candidates: int,
        seed: int,
        *,
        batch_samples: int = 256,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        guidance: float = 1.0,
        prime: Tensor | None = None,
    ) -> Iterator[Samples]:
        """Pictures for each prompt, prompt by prompt, in batches that may hold several prompts.

        A model without captions takes the one prompt "". A prompt longer than the model's text length keeps its first
        tokens; `text.truncated_samples` counts those.

        Args:
            candidates: pictures a prompt.
            seed: of the run; see `candidate_seed`.
            batch_samples: pictures drawn at a time; does not change them.
            prime: int64 [P], the first codes of all pictures, as from `prime_codes`.

        The others are those of `dalle.Stage.sample`.

        Raises:
            UserError: a parameter out of range; at once, not with the first batch.
        """
        for name, value in (("candidates", candidates), ("batch", batch_samples), ("prompts", len(prompts))):
            if value < 1:
                raise UserError(f"{name}: {value}, but at least one is needed")
        dalle.check_sampling(temperature, top_k, top_p, guidance)
        if self.text is None and any(prompts):
            raise UserError("prompts: this model was trained without captions; leave them out")
        places = [divmod(place, candidates) for place in range(len(prompts) * candidates)]
        seeds = [candidate_seed(seed, prompts[owner], candidate) for owner, candidate in places]
        if isinstance(self.stage, dalle.Stage):
            text = self._tokens(self.stage, prompts)
        elif (top_k, top_p, guidance, prime) != (0, 1.0, 1.0, None):
            raise UserError("top_k, top_p, guidance and prime are for models of codes; this one draws pixels")

        def batch(part: slice) -> Samples:
            owners, numbers = [owner for owner, _ in places[part]], [candidate for _, candidate in places[part]]
            own_seeds = torch.tensor(seeds[part], device=self.device)
            if isinstance(self.stage, dalle.Stage):
                given = None if prime is None else prime.expand(len(owners), -1)
                codes = self.stage.sample(
                    self.nets,
                    text[owners],
                    own_seeds,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    guidance=guidance,
                    prime=given,
                )
                images = self.image_tokenizer.decode(codes)
            else:
                assert isinstance(self.stage, PictureSource)
                images = self.stage.sample_images(self.nets, own_seeds, temperature=temperature)
            return Samples(owners, numbers, seeds[part], images.cpu())

        return (batch(slice(start, start + batch_samples)) for start in range(0, len(places), batch_samples))

    def _tokens(self, stage: dalle.Stage, prompts: Sequence[str]) -> Tensor:
        """int64 [prompts, T]."""
        if self.text is None:
            return torch.empty(len(prompts), 0, dtype=torch.int64, device=self.device)
        return self.text.encode(prompts, stage.config.text_length).to(self.device)
