"""The whole contract between data, stages, the training loop and the programs, on one page.

Data produces a `Batch`; a `Stage` turns it into `Losses`; the loop back-propagates them. Neither side knows the other:
they meet as the batch keys that `Stage.inputs` names. Whatever else a stage can do is a capability, one of the
protocols below; a program asks the stage for it (`stage.sampler(nets)`) and gets None where the stage has none.

Batch keys (B = samples of this micro-batch):
    image   uint8 [B, 3, S, S], RGB, 0..255 (channels-last in memory)
    text    int64 [B, T], caption tokens; an empty position p holds text_vocab + p
    codes   int64 [B, N], image codes in raster order
    label   int64 [B], class of the image; no data set has labels yet
    id      int64 [B], sample number in the data set, -1 for an empty slot
    seed    int64 [B], one number per (run seed, epoch, sample id): the source of all randomness of a sample
    weight  float32 [B], 0 for an empty slot; the loop scales the others so that the mean over the global batch is 1
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, runtime_checkable

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:  # torch takes a second to import, and what only reads or writes data does without
    from torch import Tensor, nn

Batch: TypeAlias = "dict[str, Tensor]"
Nets: TypeAlias = "dict[str, nn.Module]"
OnCode: TypeAlias = Callable[[int, int], None]  # called with (codes sampled so far, codes to sample) of each image


class UserError(ValueError):
    """An error that the user can fix: one line with the fault, the value and the remedy. Exit code 2."""


class StrictModel(BaseModel):
    """Base of every config section: unknown keys and wrong types are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


@dataclass(frozen=True)
class BatchSpec:
    """Inputs that a stage reads from each sample. A field left at its default is not loaded."""

    image_size: int = 0  # side of the square "image" in pixels
    augment: str = "none"  # "none" (centre crop), "dvae" (Listing 1) or "transformer" (Listing 2 of arXiv 2102.12092)
    text_length: int = 0  # T of "text"
    text_vocab: int = 0  # caption tokens are below this, pads at text_vocab + position
    bpe_dropout: float = 0.0  # share of BPE merges left out while training
    num_codes: int = 0  # N of "codes"
    code_vocab: int = 0  # codes are below this
    num_classes: int = 0  # values of "label" are below this

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the batch keys that hold content."""
        sizes = {"image": self.image_size, "text": self.text_length, "codes": self.num_codes, "label": self.num_classes}
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
    image_size: int  # side of the images in pixels

    def encode(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, S, S] -> codes int64 [B, N] of all levels, each in raster order."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, N] -> uint8 images [B, 3, S, S]."""
        ...

    def decode_grid(self, *levels: Tensor) -> Tensor:
        """Codes [B, h, w] of each level, of any size -> uint8 images larger or smaller as the grids are."""
        ...


@runtime_checkable
class LatentCodec(Protocol):
    """A trained, frozen net between images and continuous latents, as the stages after it see it."""

    shape: tuple[int, int, int]  # of a latent, [C, side, side]
    image_size: int  # side of the images in pixels

    def encode(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, S, S] -> latents fp32 [B, C, side, side]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, side, side] -> uint8 images [B, 3, S, S]."""
        ...


@dataclass(frozen=True)
class SampleRequest:
    """N images to sample together. An image depends on its own caption and seed only."""

    seeds: Tensor  # int64 [N], on the nets' device
    text: Tensor  # caption tokens int64 [N, T]; [N, 0] for a model without captions
    options: Any  # an instance of the sampler's `Options`
    prime: Tensor | None = None  # int64 [N, P], the first P codes, given
    on_progress: OnCode | None = None


@dataclass(frozen=True)
class SampleMemory:
    """Memory of a sampler in bytes, from which the number of images sampled at a time follows."""

    of_image: int
    of_caption: int  # once for all images of a caption
    fixed: int  # whatever is sampled


@runtime_checkable
class ImageSampler(Protocol):
    """A trained model that samples images, or their codes."""

    Options: type[StrictModel]  # settings a user may choose, with ranges, defaults and descriptions
    text_length: int  # T of the captions it takes, 0 = none
    text_vocab: int
    tokenizer: ImageTokenizer | None  # decodes the codes that `sample` returns; None = it returns images
    takes_half: bool  # its matrices may be bf16 or fp16

    def prepare(self) -> None:
        """Lay out the weights for sampling, once they have their type."""
        ...

    def sample(self, request: SampleRequest, /) -> Tensor:
        """Codes int64 [N, ...], or uint8 images [N, 3, S, S] where there is no tokenizer."""
        ...

    def resolve(self, options: Any, primed: bool, /) -> dict[str, Any]:
        """Options with the model's defaults written out, for a record.

        Raises:
            UserError: options that this model does not take, alone or with given (`primed`) codes.
        """
        ...

    def memory(self, options: Any, /) -> SampleMemory | None:
        """Bytes of an image; None where nobody counted them."""
        ...


@runtime_checkable
class CodePrior(Protocol):
    """A trained distribution over the codes of an image tokenizer, or over one level of them."""

    vocab: int  # of the tokenizer
    grids: tuple[int, ...]  # of all levels of the tokenizer, coarsest first
    level: int  # the level that it models, given the coarser ones
    text_length: int  # T of the captions it takes, 0 = none
    text_vocab: int
    without_captions: bool  # also models, or only, codes without a caption

    def bits(self, codes: Tensor, text: Tensor | None, /) -> Tensor:
        """-log2 probability of its level, summed over an image: codes of all levels int64 [B, N], captions int64
        [B, T] (None = without) -> fp64 [B]."""
        ...


@runtime_checkable
class Evaluable(Protocol):
    """A trained model that evaluates itself on images."""

    in_bytes: bool  # its bound `elbo_bits_per_dim`, if it has one, is of images of bytes

    def evaluate(self, batches: Iterable[Batch], /) -> dict[str, float]:
        """Results over all samples of all ranks (a collective)."""
        ...


@runtime_checkable
class ImageTextEncoder(Protocol):
    """A trained pair of encoders of images and captions into one space."""

    text_length: int  # T of the captions
    text_vocab: int
    scale: float  # factor of cosines before a softmax

    def image_features(self, images: Tensor, /) -> Tensor:
        """uint8 images [N, 3, H, W] of any size -> unit vectors fp32 [N, E]."""
        ...

    def text_features(self, text: Tensor, /) -> Tensor:
        """Caption tokens int64 [N, T] -> unit vectors fp32 [N, E]."""
        ...


@runtime_checkable
class LatentSpace(Protocol):
    """Latents that are standard normal where images are sampled, so that paths between images lie in them."""

    Options: type[StrictModel]
    noise_index: int  # of the noise that stands for a seed, as the stage's sampler counts it

    def codec(self, options: Any, /) -> LatentCodec:
        """Images to these latents and back. Raises UserError for options that the model does not take."""
        ...


class Stage(ABC):
    """One trainable system: networks, loss, capabilities. Describes training; is not a module itself.

    A stage is one file in `stages/`, found by its file name. It defines a class named `Stage` with a nested
    `Config` and the methods below.
    """

    Config: ClassVar[type[StrictModel]]
    takes_latents: ClassVar[bool] = False  # `tokenizer:` names a net of continuous latents, a `LatentCodec`

    def __init__(self, config: Any, upstream: Any = None) -> None:
        """upstream: the trained `ImageTokenizer`, or `LatentCodec`, below this stage."""
        self.config = config
        self.upstream = upstream

    @property
    @abstractmethod
    def inputs(self) -> BatchSpec:
        """Content of each sample that `loss` reads."""

    @abstractmethod
    def nets(self) -> Nets:
        """Build the networks, one engine each, with fresh weights. Called once, under a fixed seed."""

    def nets_to_update(self, step: int) -> tuple[str, ...]:
        """Names of the nets that take an optimizer step at `step`, in order."""
        return ("model",)

    @abstractmethod
    def loss(self, net: str, nets: Nets, batch: Batch, step: int) -> Losses:
        """Loss of the net named `net` at `step` (counted from 0). Reaches the nets only through `forward`.
        Same value for a sample whatever else is in the batch: noise comes from `batch["seed"]`."""

    def initialize(self, nets: Nets, batches: Iterator[Batch]) -> None:  # noqa: B027 (optional, not abstract)
        """Set weights from data before training starts (k-means, say). Runs once on rank 0, never on resume."""

    def after_step(self, nets: Nets, step: int) -> dict[str, Tensor]:
        """Update global statistics (EMA codebooks) once per step, on all ranks. Returns values to log."""
        return {}

    def preview(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        """Images for the log: name -> uint8 [N, 3, H, W]."""
        return {}

    def flops_per_sample(self) -> float:
        """Floating-point operations of one training sample, forward and backward."""
        return float("nan")

    # Capabilities of trained nets (raw modules in eval mode, not engines); None = the stage has no such capability

    def tokenizer(self, nets: Nets) -> ImageTokenizer | None:
        """The net as an image tokenizer."""
        return None

    def latents(self, nets: Nets) -> LatentCodec | None:
        """The net as an encoder to continuous latents."""
        return None

    def sampler(self, nets: Nets) -> ImageSampler | None:
        """A sampler of images.

        Raises:
            UserError: the stage has one, but it lacks something, the image tokenizer say.
        """
        return None

    def joint_sampler(self, models: Sequence[tuple[Stage, Nets]]) -> ImageSampler | None:
        """A sampler of several models together, this one the first of them. Raises UserError as `sampler`."""
        return None

    def code_prior(self, nets: Nets) -> CodePrior | None:
        """A prior over image codes."""
        return None

    def evaluator(self, nets: Nets) -> Evaluable | None:
        """The stage's own evaluation on images."""
        return None

    def image_text_encoder(self, nets: Nets) -> ImageTextEncoder | None:
        """Encoders of images and captions, for scores."""
        return None

    def latent_space(self, nets: Nets) -> LatentSpace | None:
        """Latents to interpolate in."""
        return None
