"""The whole contract between data, stages and the loop, on one page.

Data produces a `Batch`; a `Stage` turns it into `Losses`; the loop back-propagates them.
Neither side knows the other: they meet as the batch keys that `Stage.needs` names.

Batch keys (B = samples of this micro-batch):
    image   uint8 [B, 3, S, S], RGB, 0..255 (channels-last in memory)
    text    int64 [B, T], caption tokens; an empty position p holds text_vocab + p
    codes   int64 [B, N], image codes in raster order
    id      int64 [B], sample number in the data set, -1 for an empty slot
    seed    int64 [B], one number per (run seed, epoch, sample id): the source of all randomness of a sample
    weight  float32 [B], 0 for an empty slot; the loop scales the others so that the mean over the global batch is 1
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, runtime_checkable

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:  # torch takes a second to import, and what only reads or writes data does without
    from torch import Tensor, nn

Batch: TypeAlias = "dict[str, Tensor]"
Nets: TypeAlias = "dict[str, nn.Module]"


class UserError(ValueError):
    """Something the user can mend: one line that says what is wrong, which value, what to do. Exit code 2."""


class StrictModel(BaseModel):
    """Base of every config section: unknown keys and wrong types are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


@dataclass(frozen=True)
class Needs:
    """What a stage reads from each sample. A field left at its default is not loaded."""

    image_size: int = 0  # side of the square "image" in pixels
    augment: str = "none"  # "none" (centre crop), "dvae" (Listing 1) or "transformer" (Listing 2 of arXiv 2102.12092)
    text_length: int = 0  # T of "text"
    text_vocab: int = 0  # caption tokens are below this, pads at text_vocab + position
    bpe_dropout: float = 0.0  # share of BPE merges left out while training
    num_codes: int = 0  # N of "codes"
    code_vocab: int = 0  # codes are below this

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the batch keys that hold content."""
        sizes = {"image": self.image_size, "text": self.text_length, "codes": self.num_codes}
        return tuple(key for key, size in sizes.items() if size)


@dataclass
class Losses:
    """`total` is back-propagated. `terms` are detached scalars for the log: means over the batch, weighted by
    `batch["weight"]`, so that their mean over equally sized micro-batches and ranks is the mean of the global batch."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class ImageTokenizer(Protocol):
    """A trained, frozen image tokenizer, as the stages after it see it."""

    vocab: int  # codes are in 0 .. vocab - 1
    grids: tuple[int, ...]  # codes form a square of this side at each level, coarsest first; most have one level
    image_size: int  # side of the pictures in pixels

    def encode(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, S, S] -> codes int64 [B, N] of all levels, each in raster order."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, N] -> uint8 images [B, 3, S, S]."""
        ...


@runtime_checkable
class PictureSource(Protocol):
    """A stage that draws pictures from seeds alone."""

    def sample_images(self, nets: Nets, seeds: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Seeds int64 [N] -> uint8 images [N, 3, S, S], each a function of its own seed."""
        ...


class Stage(ABC):
    """One trainable system: networks, loss, sampling. Describes training; is not a module itself.

    A stage is one file in `stages/`, found by its file name. It defines a class named `Stage` with a nested
    `Config` and the methods below.
    """

    Config: ClassVar[type[StrictModel]]
    takes_latents: ClassVar[bool] = (
        False  # whether `tokenizer:` is a net of continuous latents (models/latent_codec.py)
    )

    def __init__(self, config: Any, upstream: ImageTokenizer | None = None) -> None:
        self.config = config
        self.upstream = upstream

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What each sample must hold."""

    @abstractmethod
    def nets(self) -> Nets:
        """Build the networks, one engine each, with fresh weights. Called once, under a fixed seed."""

    def turns(self, step: int) -> tuple[str, ...]:
        """Names of the nets that take an optimizer step at update `step`, in order."""
        return ("model",)

    @abstractmethod
    def loss(self, turn: str, nets: Nets, batch: Batch, step: int) -> Losses:
        """Loss of player `turn` at update `step` (counted from 0). Reaches the nets only through `forward`.
        Same value for a sample whatever else is in the batch: noise comes from `batch["seed"]`."""

    def initialise(self, nets: Nets, batches: Iterator[Batch]) -> None:  # noqa: B027 (optional, not abstract)
        """Set weights from data before training starts (k-means, say). Runs once on rank 0, never on resume."""

    def after_step(self, nets: Nets, step: int) -> dict[str, Tensor]:
        """What happens once per update on all ranks (global statistics, EMA codebooks). Returns values to log."""
        return {}

    def preview(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        """Pictures for the log: name -> uint8 [N, 3, H, W]."""
        return {}

    def flops_per_sample(self) -> float:
        """Floating-point operations of one training sample, forward and backward."""
        return float("nan")
