"""The text-to-image transformer: training and sampling (arXiv 2102.12092, Sec. 2.2 and 2.3).

Loss, in nats: text_weight * CE(caption) + (1 - text_weight) * CE(codes), each a mean over the positions of its kind.
Pads are tokens like any other and count in the caption's mean (the paper does not say), so both counts are constants
and a sample's loss depends on nothing else in the batch.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dalle_scale import types
from dalle_scale.config import parse
from dalle_scale.models.capabilities import Prior, Sampler
from dalle_scale.models.transformer.cache_size import sampling_memory
from dalle_scale.models.transformer.masks import Kind, Layout, visible
from dalle_scale.models.transformer.model import Transformer, paper_order
from dalle_scale.nn.gumbel import gumbel_noise, gumbel_steps
from dalle_scale.types import (
    Batch,
    BatchSpec,
    ImageTokenizer,
    Losses,
    Nets,
    OnCode,
    SampleMemory,
    SampleRequest,
    StrictModel,
    UserError,
)

PREVIEW_SAMPLES = 8
_OF_TRANSFORMER = {"text_vocab", "text_length", "image_vocab", "grid", "width", "heads", "mlp_ratio", "conv_kernel"}


class SamplingOptions(StrictModel):
    """Sampling options of codes."""

    temperature: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="of the softmax; near 0 takes the likeliest code"
    )
    top_k: int = Field(default=0, ge=0, description="keep only this many of the likeliest codes; 0 = all")
    top_p: float = Field(default=1.0, gt=0, le=1, description="keep the likeliest codes that hold this share; 1 = all")
    guidance: float = Field(
        default=1.0, ge=0, allow_inf_nan=False, description="scale of classifier-free guidance; 1 = off"
    )
    size: tuple[int, int] | None = Field(
        default=None, description="[rows, columns] of codes, for images larger than in training"
    )


class Stage(types.Stage):
    """Next-token prediction over captions and image codes."""

    class Config(StrictModel):
        """The defaults, with 64 layers of width 3968 and 62 heads, are the paper's 12-billion-parameter model."""

        text_vocab: int = Field(default=16_384, gt=0)  # caption tokens, pads not counted
        text_length: int = Field(default=256, ge=0)  # caption tokens, empty places included; 0 = without captions
        image_vocab: int = Field(default=8192, gt=0)
        grid: int = Field(default=32, gt=0)  # codes on a side
        image_size: int = Field(default=256, gt=0)  # side in pixels, where images are encoded in the step
        width: int = Field(gt=0)
        layers: int = Field(gt=0)
        heads: int = Field(gt=0)
        mlp_ratio: int = Field(default=4, gt=0)
        attention: Literal["paper"] | tuple[Kind, ...] = "paper"  # kinds are repeated until every layer has one
        conv_kernel: int = Field(default=11, gt=0)  # side of the window of "conv" attention, odd
        text_weight: float = Field(default=0.125, ge=0, le=1)
        caption_dropout: float = Field(default=0.0, ge=0, lt=1)  # share emptied while training, for guided sampling
        bpe_dropout: float = Field(default=0.1, ge=0, lt=1)
        augment: Literal["none", "dvae", "transformer"] = "transformer"  # as in types.BatchSpec
        encode_in_step: bool = False  # read images and encode them with the frozen `tokenizer:`, not stored codes

    config: Config
    upstream: ImageTokenizer | None

    def __init__(self, config: Config, upstream: ImageTokenizer | None = None) -> None:
        """Raises:
        UserError: sizes that do not divide, or an image tokenizer that does not fit.
        """
        super().__init__(config, upstream)
        if config.width % config.heads:
            raise UserError(f"model.width: {config.width} does not divide by model.heads {config.heads}")
        if config.conv_kernel % 2 == 0:
            raise UserError(f"model.conv_kernel: {config.conv_kernel} is even; take {config.conv_kernel + 1}")
        if not config.attention:
            raise UserError('model.attention: no kind given; take "paper" or a list of full, row, column, conv')
        if upstream is not None:
            self._check_fit(upstream)

    def _check_fit(self, upstream: ImageTokenizer) -> None:
        c = self.config
        if len(upstream.grids) > 1:
            raise UserError(f"tokenizer: has {len(upstream.grids)} levels of codes; their priors are `vqvae2_prior`")
        sizes = [("image_vocab", c.image_vocab, upstream.vocab), ("grid", c.grid, upstream.grids[0])]
        if c.encode_in_step:
            sizes.append(("image_size", c.image_size, upstream.image_size))
        for name, ours, theirs in sizes:
            if ours != theirs:
                raise UserError(
                    f"model.{name}: {ours}, but the image tokenizer has {theirs}; set model.{name}={theirs}"
                )

    @property
    def inputs(self) -> BatchSpec:
        """Captions, and either stored codes or the images to encode.

        Raises:
            UserError: `encode_in_step` without an image tokenizer.
        """
        c = self.config
        if c.encode_in_step and self.upstream is None:
            raise UserError("model.encode_in_step: true, but there is no image tokenizer; set tokenizer: <its export>")
        return BatchSpec(
            text_length=c.text_length,
            text_vocab=c.text_vocab,
            bpe_dropout=c.bpe_dropout,
            image_size=c.image_size if c.encode_in_step else 0,
            augment=c.augment if c.encode_in_step else "none",
            num_codes=0 if c.encode_in_step else c.grid**2,
            code_vocab=0 if c.encode_in_step else c.image_vocab,
        )

    def nets(self) -> Nets:
        c = self.config
        model = Transformer(
            kinds=self._kinds(),
            **c.model_dump(include=_OF_TRANSFORMER),
        )
        return {"model": model}

    def _kinds(self) -> tuple[Kind, ...]:
        """The attention of each layer."""
        c = self.config
        if c.attention == "paper":
            return paper_order(c.layers)
        return tuple(c.attention[layer % len(c.attention)] for layer in range(c.layers))

    def loss(self, net: str, nets: Nets, batch: Batch, step: int) -> Losses:
        """See the module's docstring. Terms: `loss`, and `text` and `image`, the cross entropies in nats a position.

        While training, a share `caption_dropout` of the samples has an empty caption. These teach the codes alone:
        their text term is left out, and the others' divided by the share that is left, so that the balance between
        text and image stays as configured.
        """
        c = self.config
        weight = text_weight = batch["weight"]
        text = batch["text"] if c.text_length else self.no_captions(weight)
        if c.text_length and c.caption_dropout and nets[net].training:
            noise = gumbel_noise(batch["seed"], step=0, count=1)
            dropped = noise < -math.log(-math.log(c.caption_dropout))  # bool [B, 1]; the distribution function
            text = torch.where(dropped, self.empty_caption(text.device), text)
            text_weight = weight * ~dropped[:, 0] / (1 - c.caption_dropout)
        codes = self._codes(batch)
        text_loss, image_loss = nets[net](text, codes, (text_weight, weight))
        if not c.text_length:
            return Losses(image_loss, {"loss": image_loss.detach(), "image": image_loss.detach()})
        total = c.text_weight * text_loss + (1 - c.text_weight) * image_loss
        return Losses(total, {"loss": total.detach(), "text": text_loss.detach(), "image": image_loss.detach()})

    def _codes(self, batch: Batch) -> Tensor:
        """Image codes of a batch: stored ones, or from the frozen image tokenizer."""
        if not self.config.encode_in_step:
            return batch["codes"]
        assert self.upstream is not None
        with torch.no_grad():
            return self.upstream.encode(batch["image"])

    @torch.no_grad()
    def code_bits(self, nets: Nets, codes: Tensor, text: Tensor | None = None) -> Tensor:
        """Cost of the codes of images: -log2 p(codes | caption), fp64 [B], summed over an image.

        Args:
            nets: raw modules, not engines.
            codes: int64 [B, N].
            text: int64 [B, T]; None = the empty caption, which a model trained with `caption_dropout` knows, or no
                caption where the model takes none.
        """
        if not self.config.text_length:
            text = self.no_captions(codes)
        elif text is None:
            text = self.empty_caption(codes.device).expand(len(codes), -1)
        _, logits = nets["model"](text, codes)
        return cross_entropy(logits, codes).double() * (codes.shape[1] / math.log(2))

    def empty_caption(self, device: torch.device | str = "cpu") -> Tensor:
        """Tokens [T] of the caption that says nothing: all pads."""
        c = self.config
        return torch.arange(c.text_vocab, c.text_vocab + c.text_length, device=device)

    def no_captions(self, like: Tensor) -> Tensor:
        """Empty captions of B samples in a model without captions: int64 [B, 0]. like: any tensor [B, ...]."""
        return torch.empty(len(like), 0, dtype=torch.int64, device=like.device)

    @torch.inference_mode()
    def sample(
        self,
        nets: Nets,
        text: Tensor,
        seeds: Tensor,
        *,
        prime: Tensor | None = None,
        on_code: OnCode | None = None,
        **options: Any,
    ) -> Tensor:
        """Sample the codes of N images, int64 [N, grid * grid].

        An image depends on its caption and its seed, not on its batch, but for the rounding of matrix products. The
        prefix of a caption is computed once for all images that have it.

        Args:
            nets: raw modules, not engines.
            text: int64 [N, T]; [N, 0] for a model without captions.
            seeds: int64 [N], one an image.
            prime: int64 [N, P], the first P codes, given (the paper's image-to-image: the top rows of an image).
            on_code: called after each code; on a GPU ahead of it, by what is in its queue.
            options: of `SamplingOptions`, without `size`. top_p applies to what top_k leaves. Guidance with scale g is
                logits = empty + g * (caption - empty), each from its own caption; it wants `caption_dropout`.

        Raises:
            UserError: an option out of range.
        """
        how = self._checked(options)
        model = cast(Transformer, nets["model"])
        guided, primed = how.guidance != 1.0, 0 if prime is None else prime.shape[1]
        num_codes, vocab = self.config.grid**2, self.config.image_vocab
        if guided:
            text = torch.cat([text, self.empty_caption(text.device).expand_as(text)])
        captions, prefix_index = text[:1], torch.zeros(len(text), dtype=torch.int64, device=text.device)
        if self.config.text_length:
            captions, prefix_index = torch.unique(text, dim=0, return_inverse=True)
        logits, decoding = model.prefill(captions, prefix_index)
        codes = torch.empty(len(seeds), num_codes, dtype=torch.int64, device=text.device)
        if prime is not None:
            codes[:, :primed] = prime
        noise = gumbel_steps(seeds, range(primed, num_codes), vocab)
        for index in range(num_codes):
            if index >= primed:
                if guided:
                    with_caption, empty = logits.chunk(2)
                    logits = empty + how.guidance * (with_caption - empty)
                logits = truncate(logits / how.temperature, how.top_k, how.top_p)
                codes[:, index] = (logits + next(noise)).argmax(-1)
                if on_code is not None:
                    on_code(index + 1 - primed, num_codes - primed)
            if index + 1 < num_codes:
                logits = model.decode_step(codes[:, index].repeat(1 + guided), index, decoding)
        return codes

    @torch.inference_mode()
    def sample_larger(
        self,
        nets: Nets,
        text: Tensor,
        seeds: Tensor,
        rows: int,
        columns: int,
        *,
        on_code: OnCode | None = None,
        **options: Any,
    ) -> Tensor:
        """Sample codes of images larger than those of training, int64 [N, rows, columns], through a window of
        grid x grid codes that slides with the code in work near its middle (arXiv 2012.09841, Sec. 3.3).

        Costs a forward pass over a whole window for each code. The other arguments are those of `sample`.

        Raises:
            UserError: smaller than the grid, or an option out of range.
        """
        how = self._checked(options)
        model, grid = nets["model"], self.config.grid
        if min(rows, columns) < grid:
            raise UserError(f"rows and columns: {rows} x {columns} is smaller than the model's {grid} x {grid} codes")
        empty = self.empty_caption(text.device).expand_as(text)
        codes = torch.zeros(len(seeds), rows, columns, dtype=torch.int64, device=text.device)
        for y, x in itertools.product(range(rows), range(columns)):
            top, left = (min(max(at - grid // 2, 0), size - grid) for at, size in ((y, rows), (x, columns)))
            window = codes[:, top : top + grid, left : left + grid].flatten(1)
            index = (y - top) * grid + x - left
            logits = model(text, window)[1][:, index]
            if how.guidance != 1.0:
                unguided = model(empty, window)[1][:, index]
                logits = unguided + how.guidance * (logits - unguided)
            logits = truncate(logits / how.temperature, how.top_k, how.top_p)
            noise = gumbel_noise(seeds, y * columns + x, self.config.image_vocab)
            codes[:, y, x] = (logits + noise).argmax(-1)
            if on_code is not None:
                on_code(y * columns + x + 1, rows * columns)
        return codes

    def _checked(self, options: dict[str, Any]) -> SamplingOptions:
        how = parse(SamplingOptions, options, "options")
        if how.guidance != 1.0 and not self.config.text_length:
            raise UserError(f"guidance: {how.guidance}, but this model has no captions to be guided by; leave it at 1")
        return how

    def sampler(self, nets: Nets) -> Sampler:
        """Samples codes, and has them decoded by the image tokenizer below."""
        model, c = cast(Transformer, nets["model"]), self.config
        if self.upstream is None:
            raise UserError("no image tokenizer to decode with; train with `tokenizer: <its export>`")

        def sample(request: SampleRequest) -> Tensor:
            options, on_code = request.options.model_dump(), request.on_progress
            size = options.pop("size")
            if size is not None:
                return self.sample_larger(nets, request.text, request.seeds, *size, on_code=on_code, **options)
            return self.sample(nets, request.text, request.seeds, prime=request.prime, on_code=on_code, **options)

        def resolve(options: SamplingOptions, primed: bool) -> dict[str, Any]:
            if options.size is not None and primed:
                raise UserError("size: an image with given rows has the model's own size; leave out one of the two")
            return self._checked(options.model_dump()).model_dump()

        def memory(options: SamplingOptions) -> SampleMemory | None:
            return sampling_memory(model, guided=options.guidance != 1.0) if options.size is None else None

        def prepare() -> None:
            if model.start.device.type == "cpu":
                model.store_by_columns()

        texts = c.text_length, c.text_vocab
        return Sampler(SamplingOptions, sample, *texts, self.upstream, True, resolve, memory, prepare)

    def code_prior(self, nets: Nets) -> Prior:
        """The transformer as a prior over the codes of an image tokenizer of one level."""
        c = self.config
        bits = partial(self.code_bits, nets)
        without = not c.text_length or c.caption_dropout > 0
        return Prior(bits, c.image_vocab, (c.grid,), 0, c.text_length, c.text_vocab, without)

    def preview(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        """Images sampled for the batch's first captions, always from the same seeds; nothing without a tokenizer."""
        if self.upstream is None:
            return {}
        weight = batch["weight"][:PREVIEW_SAMPLES]
        text = batch["text"][: len(weight)] if self.config.text_length else self.no_captions(weight)
        codes = self.sample(nets, text, torch.arange(len(text), device=text.device))
        return {"samples": self.upstream.decode(codes)}

    def flops_per_sample(self) -> float:
        """Matrix products and visible keys only, twice as much again for the backward pass. Recomputed activations
        and the frozen image tokenizer are left out."""
        c = self.config
        layout = Layout(c.text_length + 2, c.grid, c.conv_kernel)
        kinds = self._kinds()
        pairs = {kind: int(visible(kind, layout).sum()) for kind in set(kinds)}
        products = c.layers * (4 + 2 * c.mlp_ratio) * c.width**2 * layout.length
        products += sum(2 * pairs[kind] * c.width for kind in kinds)
        products += c.width * (c.text_length * (c.text_vocab + c.text_length) + c.grid**2 * c.image_vocab)
        return 3.0 * 2 * products


def truncate(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits [N, V] with all but the kept codes at -inf; see `Stage.sample`. At least one code of each row is kept."""
    if top_k == 0 and top_p == 1.0:
        return logits
    vocab = logits.shape[-1]
    best, codes = logits.topk(min(top_k or vocab, vocab))
    if top_p < 1.0:
        shares = best.softmax(-1)
        share_before = shares.cumsum(-1) - shares
        best = best.masked_fill(share_before >= top_p, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, codes, best)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the positions of each sample, in nats: fp32 logits [B, P, V], int64 [B, P] -> [B]."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(dim=1)
