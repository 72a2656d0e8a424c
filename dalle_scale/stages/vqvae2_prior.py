"""The priors of VQ-VAE-2: an autoregressive model of the codes of one level (arXiv 1906.00446, Sec. 3.2).

An image is a square of codes at each level, coarsest ("top") first. One run trains the prior of one level given all
levels above it, p(level | levels above); the product over the levels is the prior of images. Sampling goes from the
top down, each level by its own export. With a single grid this is the prior of a VQ-VAE.

Captions may stand in for the paper's class labels: the mean over the tokens of an MLP of token and place, added to the
condition of every pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from dalle_scale import types
from dalle_scale.config import parse
from dalle_scale.models.capabilities import Prior, Sampler
from dalle_scale.models.pixelsnail.model import PixelSNAIL
from dalle_scale.nn.field_checks import check_text_vocab
from dalle_scale.nn.flops import flops
from dalle_scale.nn.gumbel import gumbel_noise
from dalle_scale.stages.dalle import cross_entropy
from dalle_scale.types import Batch, BatchSpec, ImageTokenizer, Losses, Nets, SampleRequest, StrictModel, UserError

PREVIEW_SAMPLES = 8


class SamplingOptions(StrictModel):
    """Sampling options of codes."""

    temperature: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="of the softmax; near 0 takes the likeliest code"
    )


class Stage(types.Stage):
    """Cross entropy of the codes of one level."""

    class Config(StrictModel):
        """The defaults are the size of the paper's prior of the top level at 256x256."""

        grids: tuple[int, ...] = Field(default=(32, 64), min_length=1)  # codes on a side of each level, coarsest first
        level: int = Field(default=0, ge=0, validate_default=True)  # which of them this run models
        vocab: int = Field(default=512, ge=2, le=65536)  # of every level
        width: int = Field(default=512, gt=0)
        residual_width: int = Field(default=2048, gt=0)  # inside the blocks
        layers: int = Field(default=20, gt=0)  # causal residual blocks
        kernel: int = Field(default=5, ge=3)  # side of the window of the convolutions, odd; its past half is seen
        attention_blocks: int = Field(
            default=4, ge=0, validate_default=True
        )  # evenly among the layers; paper: top only
        heads: int = Field(default=8, gt=0, validate_default=True)
        output_layers: int = Field(default=20, ge=0)  # residual blocks of 1x1 convolutions before the logits
        conditioning_layers: int = Field(default=20, ge=0)  # residual blocks over the levels above
        dropout: float = Field(default=0.1, ge=0, lt=1)  # inside the causal blocks
        text_length: int = Field(default=0, ge=0)  # caption tokens, empty places included; 0 = no captions
        text_vocab: int = Field(default=0, ge=0, validate_default=True)
        bpe_dropout: float = Field(default=0.0, ge=0, lt=1)

        @property
        def grid(self) -> int:
            """Side of the level that this run models."""
            return self.grids[self.level]

        @property
        def upper_grids(self) -> tuple[int, ...]:
            """Sides of the levels above."""
            return self.grids[: self.level]

        @property
        def first_code(self) -> int:
            """Index of this level's first code among the codes of all levels."""
            return sum(grid**2 for grid in self.upper_grids)

        @field_validator("grids")
        @classmethod
        def _check_grids(cls, value: tuple[int, ...]) -> tuple[int, ...]:
            if min(value) < 1 or any(fine % coarse or fine == coarse for coarse, fine in pairwise(value)):
                raise ValueError("must grow from level to level, each a multiple of the one before")
            return value

        @field_validator("level")
        @classmethod
        def _check_level(cls, value: int, info: ValidationInfo) -> int:
            if value >= len(grids := info.data.get("grids", (0,) * (value + 1))):
                raise ValueError(f"is not below the number of grids, {len(grids)}")
            return value

        @field_validator("kernel")
        @classmethod
        def _check_kernel(cls, value: int) -> int:
            if value % 2 == 0:
                raise ValueError(f"must be odd; take {value + 1}")
            return value

        @field_validator("attention_blocks")
        @classmethod
        def _check_attention_blocks(cls, value: int, info: ValidationInfo) -> int:
            if value and info.data.get("layers", value) % value:
                raise ValueError(f"must divide layers {info.data['layers']}")
            return value

        @field_validator("heads")
        @classmethod
        def _check_heads(cls, value: int, info: ValidationInfo) -> int:
            width = info.data.get("width", 4 * value)
            if width % value or width % 4:
                raise ValueError(f"must divide width {width}, and 4 must too")
            return value

        _check_text_vocab = field_validator("text_vocab")(check_text_vocab)

    config: Config

    def __init__(self, config: Config, upstream: ImageTokenizer | None = None) -> None:
        """Raises:
        UserError: an image tokenizer that does not fit.
        """
        super().__init__(config, upstream)
        if upstream is not None:
            for name in ("vocab", "grids"):
                ours, theirs = getattr(config, name), getattr(upstream, name)
                if ours != theirs:
                    raise UserError(f"model.{name}: {ours}, but the image tokenizer has {theirs}; set it to that")

    @property
    def inputs(self) -> BatchSpec:
        """The codes of all levels, and captions if the model takes them."""
        c = self.config
        return BatchSpec(
            num_codes=sum(grid**2 for grid in c.grids),
            code_vocab=c.vocab,
            **c.model_dump(include={"text_length", "text_vocab", "bpe_dropout"}),
        )

    def nets(self) -> Nets:
        c = self.config
        model = PixelSNAIL(
            grid=c.grid, upper_grids=c.upper_grids, **c.model_dump(exclude={"grids", "level", "bpe_dropout"})
        )
        return {"model": model}

    def levels(self, codes: Tensor) -> tuple[Tensor | None, Tensor]:
        """Codes of all levels int64 [B, N] -> (those above this level, None for the top; those of this level)."""
        start, end = self.config.first_code, self.config.first_code + self.config.grid**2
        return (codes[:, :start] if start else None), codes[:, start:end]

    def loss(self, net: str, nets: Nets, batch: Batch, step: int) -> Losses:
        """Cross entropy, the mean over the codes of the level. Terms: nll (nats per code), bits_per_code."""
        upper, codes = self.levels(batch["codes"])
        logits = nets[net](codes, upper, batch.get("text"), batch["seed"], step)
        total = (cross_entropy(logits, codes) * batch["weight"]).mean()
        return Losses(total, {"nll": total.detach(), "bits_per_code": total.detach() / math.log(2)})

    @torch.no_grad()
    def code_bits(self, nets: Nets, codes: Tensor, text: Tensor | None = None) -> Tensor:
        """Cost of the codes of this level: -log2 p(level | levels above, caption), fp64 [B], summed over an image.

        Args:
            nets: raw modules in eval mode, not engines.
            codes: of all levels, int64 [B, N].
            text: int64 [B, T], where the model takes captions.
        """
        upper, codes = self.levels(codes)
        logits = nets["model"](codes, upper, text)
        return cross_entropy(logits, codes).double() * (codes.shape[1] / math.log(2))

    @torch.inference_mode()
    def sample(
        self,
        nets: Nets,
        seeds: Tensor,
        upper: Tensor | None = None,
        text: Tensor | None = None,
        *,
        temperature: float = 1.0,
    ) -> Tensor:
        """Sample the codes of this level for B images, int64 [B, grid * grid].

        An image depends on its seed and condition, not on its batch, but for the rounding of matrix products. Levels
        may share their seeds: `noise` is another at each.

        Args:
            nets: raw modules, not engines.
            seeds: int64 [B], one an image.
            upper: codes of the levels above, coarsest first, int64 [B, sum of their grids squared]; None for the top.
            text: int64 [B, T], where the model takes captions.
            temperature: of the softmax; > 0.

        Raises:
            UserError: the temperature is out of range.
        """
        parse(SamplingOptions, {"temperature": temperature}, "options")
        model = cast(PixelSNAIL, nets["model"])
        codes = torch.empty(len(seeds), self.config.grid**2, dtype=torch.int64, device=seeds.device)
        decoding = model.prefill(len(seeds), upper, text)
        for index in range(codes.shape[1]):
            row, column = divmod(index, self.config.grid)
            if column == 0:
                noise = self.noise(seeds, row)
            logits = model.decode_step(codes[:, index - 1] if index else None, decoding)
            codes[:, index] = (logits / temperature + noise[:, column]).argmax(-1)
        return codes

    def sampler(self, nets: Nets) -> Sampler:
        """Samples the codes of an image tokenizer of one level."""
        return self.joint_sampler([(self, nets)])

    def joint_sampler(self, models: Sequence[tuple[types.Stage, Nets]]) -> Sampler:
        """Samples the codes of all levels, coarsest first, from the priors of the levels in this order."""
        priors = [(stage, nets) for stage, nets in models if isinstance(stage, Stage)]
        _check_levels([stage.config for stage, _ in priors], len(models))
        if self.upstream is None:
            raise UserError("no image tokenizer to decode with; train with `tokenizer: <its export>`")

        def sample(request: SampleRequest) -> Tensor:
            upper: Tensor | None = None
            for stage, nets in priors:
                text = request.text if stage.config.text_length else None
                codes = stage.sample(nets, request.seeds, upper, text, temperature=request.options.temperature)
                upper = codes if upper is None else torch.cat([upper, codes], dim=1)
            assert upper is not None
            return upper

        captioned = max((stage.config for stage, _ in priors), key=lambda config: config.text_length)
        return Sampler(SamplingOptions, sample, captioned.text_length, captioned.text_vocab, self.upstream)

    def code_prior(self, nets: Nets) -> Prior:
        """The prior over the codes of its level."""
        c = self.config
        bits = partial(self.code_bits, nets)
        return Prior(bits, c.vocab, c.grids, c.level, c.text_length, c.text_vocab, not c.text_length)

    def noise(self, seeds: Tensor, row: int) -> Tensor:
        """Gumbel noise that samples the codes of a row, fp32 [B, grid, vocab]: a function of seed, level and row."""
        c = self.config
        rows_above = sum(c.upper_grids) + row  # of all levels
        return gumbel_noise(seeds, rows_above, c.grid * c.vocab).view(-1, c.grid, c.vocab)

    @torch.no_grad()
    def preview(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        """The batch's first images above what becomes of them when this level is sampled anew, always from the same
        seeds. For the finest level only, and nothing without an image tokenizer."""
        if self.upstream is None or self.config.level != len(self.config.grids) - 1:
            return {}
        codes = batch["codes"][:PREVIEW_SAMPLES]
        upper, _ = self.levels(codes)
        text = batch["text"][:PREVIEW_SAMPLES] if self.config.text_length else None
        sampled = self.sample(nets, torch.arange(len(codes), device=codes.device), upper, text)
        images = self.upstream.decode(sampled if upper is None else torch.cat([upper, sampled], dim=1))
        return {"samples": torch.cat([self.upstream.decode(codes), images], dim=2)}

    def flops_per_sample(self) -> float:
        """Convolutions and matrix products, forward and backward (counted as twice the forward). The zeros that make a
        convolution causal and the hidden half of the attention count too: they are computed."""

        def forward() -> None:
            inputs = self.inputs
            upper, codes = self.levels(torch.zeros(1, inputs.num_codes, dtype=torch.int64))
            text = torch.zeros(1, inputs.text_length, dtype=torch.int64) if inputs.text_length else None
            self.nets()["model"](codes, upper, text)

        return 3 * flops(forward)


def _check_levels(configs: Sequence[Stage.Config], models: int) -> None:
    """Raises UserError unless these are the priors of all levels of one tokenizer, coarsest first."""
    grids, levels = configs[0].grids, [config.level for config in configs]
    if len(configs) < models or any(config.grids != grids for config in configs):
        raise UserError(f"not all are priors of the same grids {list(grids)}; give those of one image tokenizer")
    if levels != list(range(len(grids))):
        raise UserError(f"levels {levels} of {len(grids)}: give the export of each level once, one --model for each")
    lengths = {config.text_length for config in configs if config.text_length}
    if len(lengths) > 1:
        raise UserError(f"text_length: {sorted(lengths)}; priors that sample together take captions of one length")
