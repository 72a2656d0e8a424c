"""An exported model, captions and seeds -> pictures. Needs neither deepspeed nor webdataset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dalle_scale.checkpoint import export
from dalle_scale.checkpoint.digest import digest
from dalle_scale.data.decode import decode
from dalle_scale.data.reader import BadSample
from dalle_scale.data.text import TextTokenizer, open_text
from dalle_scale.data.transforms import square
from dalle_scale.models.diffusion import samplers
from dalle_scale.models.diffusion.process import Variance
from dalle_scale.models.transformer.model import Transformer
from dalle_scale.nn import precision, residual_scaling
from dalle_scale.sampling import batch_size
from dalle_scale.stages import dalle, ddpm, vqvae2_prior
from dalle_scale.types import ImageTokenizer, PictureSource, UserError

FIXED_BATCH_SAMPLES = 256  # drawn at a time by stages whose memory nobody counts
DTYPES = ("fp32", *residual_scaling.SHORT, "auto")
DIFFUSION_OPTIONS = ("method", "steps", "spacing", "eta", "variance", "clip")


@dataclass(frozen=True)
class Batch:
    """B pictures to draw together."""

    prompt_index: list[int]  # whose caption, B numbers
    candidate: list[int]  # counted from 0 for each prompt
    seed: list[int]
    text: Tensor  # captions int64 [B, T]


@dataclass(frozen=True)
class Samples:
    """A batch of B pictures."""

    prompt_index: list[int]  # whose caption, B numbers
    candidate: list[int]  # counted from 0 for each prompt
    seed: list[int]
    images: Tensor  # uint8 [B, 3, S, S] on the CPU


@dataclass(frozen=True)
class Options:
    """How pictures are drawn: the parameters of `dalle.Stage.sample`, and of `diffusion_samplers.Options` for the
    `ddpm` stage, which takes the guidance too. Other stages take the temperature only."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0
    prime: Tensor | None = None  # int64 [P], the first codes of all pictures, as from `Sampler.prime_codes`
    size: tuple[int, int] | None = None  # rows and columns of codes, larger than in training
    method: samplers.Method | None = None  # None = the model's own, here and below
    steps: int | None = None
    spacing: samplers.Spacing | None = None
    eta: float | None = None
    variance: Variance | None = None
    clip: bool | None = None

    def given(self, names: Sequence[str]) -> dict[str, Any]:
        """Those of the options that differ from the default."""
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(Options, name)}


def candidate_seed(seed: int, prompt: str, candidate: int) -> int:
    """Seed of one picture, 0 .. 2^63 - 1: a pure function of its arguments, so other prompts change nothing."""
    digest = hashlib.sha256(f"{seed}\n{candidate}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def read_picture(path: Path, size: int) -> Tensor:
    """The centre square of a picture file, uint8 [3, size, size]. Raises UserError: missing, or no picture."""
    try:
        pixels = square(decode(path.read_bytes()), size)
    except (OSError, BadSample) as error:
        raise UserError(f"{path}: {error}; give a JPEG, PNG, WebP, GIF or BMP file") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


class Sampler:
    """Exports that draw pictures: one of the `dalle` stage, the `vqvae2_prior` of each level, or one of another stage
    that draws pictures from seeds alone.

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
            UserError: these exports do not draw pictures (together), a tokenizer is missing or does not fit, or dtype
                is not fp32 and nothing is there to have it.
        """
        models = [export.load(folder, device) for folder in folders]
        self.models, self.device = sorted(models, key=_level), torch.device(device)
        self.stage = self.models[0].stage
        self.text: TextTokenizer | None = None
        if isinstance(self.stage, vqvae2_prior.Stage):
            _check_levels(self.models)
        elif len(models) > 1:
            raise UserError(f"{folders[1]}: several models draw together only if each is the prior of another level")
        elif not isinstance(self.stage, dalle.Stage | PictureSource):
            raise UserError(f"{folders[0]}: stage '{models[0].name}' does not draw pictures")
        if self.stage.upstream is None and not isinstance(self.stage, PictureSource):
            raise UserError(
                f"{models[0].folder}: holds no image tokenizer to decode with; train with `tokenizer: <its export>`"
            )
        self._open_text(text_tokenizer)
        self.dtype = self._cast(dtype)
        if isinstance(self.stage, dalle.Stage) and self.device.type == "cpu":
            cast(Transformer, self.models[0].nets["model"]).store_by_columns()

    def _cast(self, dtype: str | None) -> str:
        takes_short = isinstance(self.stage, dalle.Stage)
        dtype = dtype or ("bf16" if takes_short and self.device.type == "cuda" else "fp32")
        if dtype == "auto" and not takes_short:
            return "fp32"
        if dtype != "fp32" and not takes_short:
            raise UserError(f"dtype: {dtype}, but only models of the stage 'dalle' take 16 bits; leave it out")
        return precision.cast(self.models[0].nets, self.device, dtype)

    def _open_text(self, name: str | Path | None) -> None:
        for model in self.models:
            if getattr(model.stage.config, "text_length", 0) and self.text is None:
                name = name or model.part("text_tokenizer")
                if name is None:
                    raise UserError(
                        f"{model.folder}: holds no text tokenizer; name the one that the model was trained with"
                    )
                self.text = open_text(name, vocab=model.stage.config.text_vocab)

    @property
    def text_length(self) -> int:
        """Tokens that a caption is cut to; 0 without captions."""
        return max(getattr(model.stage.config, "text_length", 0) for model in self.models)

    @property
    def image_tokenizer(self) -> ImageTokenizer:
        """Of a model of codes. Raises UserError."""
        if self.stage.upstream is None or isinstance(self.stage, PictureSource):
            raise UserError("prime: this model draws pixels, not codes; there are no rows of codes to keep")
        return self.stage.upstream

    def prime_codes(self, path: str | Path, rows: int) -> Tensor:
        """Codes int64 [rows * grid] of the top of a picture file: its centre square, scaled to the model's size.

        Raises:
            UserError: more rows than the grid has, or a file that is missing or no picture.
        """
        grid = self.image_tokenizer.grids[0]
        if not 1 <= rows <= grid:
            raise UserError(f"prime rows: {rows}, but pictures have {grid} rows of codes; take 1 to {grid}")
        image = read_picture(Path(path), self.image_tokenizer.image_size)[None].to(self.device)
        return self.image_tokenizer.encode(image)[0, : rows * grid]

    def draw(
        self,
        prompts: Sequence[str],
        candidates: int,
        seed: int,
        options: Options = Options(),
        batch_samples: int | None = None,
    ) -> Iterator[Samples]:
        """Pictures for each prompt, prompt by prompt, in batches that may hold several prompts.

        A model without captions takes the one prompt "". A prompt longer than the model's text length keeps its first
        tokens; `text.truncated_samples` counts those.

        Args:
            candidates: pictures a prompt.
            seed: of the run; see `candidate_seed`.
            batch_samples: pictures drawn at a time, None = as many as fit; does not change them.

        Raises:
            UserError: a parameter out of range, or one that this model does not take; at once, not with the first
                batch.
        """
        self.check(prompts, candidates, options)
        places = [(owner, candidate) for owner in range(len(prompts)) for candidate in range(candidates)]
        batches = self.batches(prompts, places, seed, options, batch_samples)
        return (
            Samples(batch.prompt_index, batch.candidate, batch.seed, self.decode(self.draw_batch(batch, options)))
            for batch in batches
        )

    def batches(
        self,
        prompts: Sequence[str],
        places: Sequence[tuple[int, int]],
        seed: int,
        options: Options = Options(),
        batch_samples: int | None = None,
    ) -> list[Batch]:
        """What `draw` goes through, for some of the pictures: `places` are (index of the prompt, candidate).

        Raises:
            UserError: batch_samples below 1.
        """
        if batch_samples is not None and batch_samples < 1:
            raise UserError(f"batch: {batch_samples}, but at least one is needed")
        text = torch.empty(len(prompts), 0, dtype=torch.int64, device=self.device)
        if self.text is not None:
            text = self.text.encode(prompts, self.text_length).to(self.device)
        if batch_samples is None:
            batch_samples = batch_size.even(len(places), self._fitting(places, options))
        found = []
        for start in range(0, len(places), batch_samples):
            owners, numbers = map(list, zip(*places[start : start + batch_samples], strict=True))
            seeds = [
                candidate_seed(seed, prompts[owner], number) for owner, number in zip(owners, numbers, strict=True)
            ]
            found.append(Batch(owners, numbers, seeds, text[owners]))
        return found

    def _fitting(self, places: Sequence[tuple[int, int]], options: Options) -> int:
        """How many pictures are drawn at a time where nobody says."""
        if not isinstance(self.stage, dalle.Stage) or options.size is not None:
            return FIXED_BATCH_SAMPLES
        model, guided = cast(Transformer, self.models[0].nets["model"]), options.guidance != 1.0
        captions = len({owner for owner, _ in places})
        return batch_size.batch_samples(model, guided, captions, len(places), self.device)

    @torch.inference_mode()
    def draw_batch(self, batch: Batch, options: Options, on_code: dalle.OnCode | None = None) -> Tensor:
        """Codes int64 [B, ...] of a model of codes, else uint8 pictures [B, 3, S, S]; on the model's device, and there
        when this returns. Only the `dalle` stage calls `on_code`."""
        drawn = self._drawn(batch.text, torch.tensor(batch.seed, device=self.device), options, on_code)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # another thread goes on with it, on its own stream
        return drawn

    def decode(self, drawn: Tensor) -> Tensor:
        """What `draw_batch` gave, as uint8 pictures [B, 3, S, S] on the CPU.

        One picture at a time: what a convolution rounds depends on how many it is given, and a picture must not.
        """
        if isinstance(self.stage, PictureSource):
            return drawn.cpu()
        grid = drawn.ndim == 3  # rows and columns, larger than in training
        decode = self.image_tokenizer.decode_grid if grid else self.image_tokenizer.decode  # type: ignore[attr-defined]
        return torch.cat([decode(codes).cpu() for codes in torch.split(drawn, 1)])

    def record(self, options: Options) -> dict[str, Any]:
        """How these exports draw with these options, for a protocol: plain values, defaults written out."""
        names = ("temperature", "top_k", "top_p", "guidance", "size")
        told: dict[str, Any] = {
            "models": [str(model.folder) for model in self.models],
            "models_sha256": [digest(model.folder) for model in self.models],
            "stage": self.models[0].name,
            "dtype": self.dtype,
            **{name: getattr(options, name) for name in names},
        }
        if all(model.trained for model in self.models):
            told["weights"] = [model.trained["weights"]["model"] for model in self.models]
            told["update"] = [model.trained["update"] for model in self.models]
        if isinstance(self.stage, ddpm.Stage):
            learned = self.stage.config.variance == "learned"
            how = self._diffusion(options).resolved(len(self.stage.diffusion.alphas_cumprod), learned)
            return told | {name: getattr(how, name) for name in DIFFUSION_OPTIONS}
        return told | dict.fromkeys(DIFFUSION_OPTIONS)

    def check(self, prompts: Sequence[str], candidates: int, options: Options) -> None:
        """Raises UserError for what is out of range, or what these models do not take."""
        for name, value in (("candidates", candidates), ("prompts", len(prompts))):
            if value < 1:
                raise UserError(f"{name}: {value}, but at least one is needed")
        self._check_options(options)
        if self.text is None and any(prompts):
            raise UserError("prompts: this model was trained without captions; leave them out")

    def _check_options(self, options: Options) -> None:
        dalle.check_sampling(options.temperature, options.top_k, options.top_p, options.guidance)
        if isinstance(self.stage, ddpm.Stage):
            if given := options.given(("temperature", "top_k", "top_p", "prime", "size")):
                raise UserError(f"{', '.join(given)}: for models of codes; this one draws by diffusion, leave it out")
            if options.guidance != 1.0 and not self.stage.config.caption_dropout:
                raise UserError(f"guidance: {options.guidance}, but this model was trained without caption_dropout")
            learned = self.stage.config.variance == "learned"
            samplers.plan(self.stage.diffusion.alphas_cumprod, self._diffusion(options), learned)
        elif given := options.given(DIFFUSION_OPTIONS):
            raise UserError(
                f"{', '.join(given)}: for diffusion models, and '{self.models[0].name}' is none; leave it out"
            )
        elif not isinstance(self.stage, dalle.Stage):
            if replace(options, temperature=1.0) != Options():
                raise UserError("top_k, top_p, guidance, prime and size are for models of the stage 'dalle'")
        elif options.size is not None:
            if options.prime is not None:
                raise UserError("size: a picture with given rows has the model's own size; leave out one of the two")
            if not hasattr(self.image_tokenizer, "decode_grid"):
                raise UserError("size: this image tokenizer decodes squares of its own size only")

    def _diffusion(self, options: Options) -> samplers.Options:
        """How a diffusion model draws: as told, else as its config says. Raises UserError for a value out of range."""
        assert isinstance(self.stage, ddpm.Stage)
        config, given = self.stage.config, options.given(DIFFUSION_OPTIONS)
        how: dict[str, Any] = {"method": config.sampler, "steps": config.sample_steps, **given}
        return samplers.Options(guidance=options.guidance, **how)

    def _drawn(self, text: Tensor, seeds: Tensor, options: Options, on_code: dalle.OnCode | None) -> Tensor:
        """As `draw_batch`, of captions int64 [N, T] and seeds int64 [N]."""
        nets = self.models[0].nets
        if isinstance(self.stage, dalle.Stage):
            names = ("temperature", "top_k", "top_p", "guidance")
            how: dict[str, Any] = {name: getattr(options, name) for name in names} | {"on_code": on_code}
            if options.size is not None:
                return self.stage.sample_larger(nets, text, seeds, *options.size, **how)
            prime = None if options.prime is None else options.prime.expand(len(seeds), -1)
            return self.stage.sample(nets, text, seeds, prime=prime, **how)
        if isinstance(self.stage, ddpm.Stage):
            captions = text if self.text is not None else None
            return self.stage.sample_images(nets, seeds, text=captions, options=self._diffusion(options))
        if isinstance(self.stage, PictureSource):
            return self.stage.sample_images(nets, seeds, temperature=options.temperature)
        upper = None
        for model in self.models:
            assert isinstance(model.stage, vqvae2_prior.Stage)
            own_text = text if model.stage.config.text_length else None
            drawn = model.stage.sample(model.nets, seeds, upper, own_text, temperature=options.temperature)
            upper = drawn if upper is None else torch.cat([upper, drawn], dim=1)
        assert upper is not None
        return upper


def _level(model: export.Export) -> int:
    return model.stage.config.level if isinstance(model.stage, vqvae2_prior.Stage) else 0


def _check_levels(models: Sequence[export.Export]) -> None:
    """Raises UserError unless these are the priors of all levels of one tokenizer, coarsest first."""
    configs = [model.stage.config for model in models if isinstance(model.stage, vqvae2_prior.Stage)]
    grids, levels = configs[0].grids, [config.level for config in configs]
    if len(configs) < len(models) or any(config.grids != grids for config in configs):
        raise UserError(f"{models[-1].folder}: not a prior of the same grids {list(grids)} as {models[0].folder}")
    if levels != list(range(len(grids))):
        raise UserError(f"levels {levels} of {len(grids)}: give the export of each level once, one --model for each")
    lengths = {config.text_length for config in configs if config.text_length}
    if len(lengths) > 1:
        raise UserError(f"text_length: {sorted(lengths)}; priors that draw together take captions of one length")
