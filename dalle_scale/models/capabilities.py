"""Capabilities of trained nets as plain functions: the samplers, priors and encoders of dalle_scale/types.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dalle_scale.types import Batch, ImageTokenizer, LatentCodec, SampleMemory, SampleRequest, StrictModel, UserError


def written_out(options: StrictModel, primed: bool = False) -> dict[str, Any]:
    """The options as they are, of a sampler that knows all defaults and takes no given codes. Raises UserError."""
    if primed:
        raise UserError("prime: for models of the stage 'dalle'; leave it out")
    return options.model_dump()


@dataclass
class Sampler:
    """A `types.ImageSampler`."""

    Options: type[StrictModel]
    sample: Callable[[SampleRequest], Tensor]
    text_length: int = 0
    text_vocab: int = 0
    tokenizer: ImageTokenizer | None = None
    takes_half: bool = False
    resolve: Callable[[Any, bool], dict[str, Any]] = written_out
    memory: Callable[[Any], SampleMemory | None] = lambda options: None
    prepare: Callable[[], None] = lambda: None


@dataclass
class Prior:
    """A `types.CodePrior`."""

    bits: Callable[[Tensor, Tensor | None], Tensor]
    vocab: int
    grids: tuple[int, ...]
    level: int
    text_length: int
    text_vocab: int
    without_captions: bool


@dataclass
class Evaluator:
    """A `types.Evaluable`."""

    evaluate: Callable[[Iterable[Batch]], dict[str, float]]
    in_bytes: bool = True


@dataclass
class TwoEncoders:
    """A `types.ImageTextEncoder`."""

    image_features: Callable[[Tensor], Tensor]
    text_features: Callable[[Tensor], Tensor]
    text_length: int
    text_vocab: int
    scale: float


@dataclass
class Space:
    """A `types.LatentSpace`."""

    Options: type[StrictModel]
    codec: Callable[[Any], LatentCodec]
    noise_index: int
