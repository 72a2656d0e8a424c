"""CLIP (arXiv 2103.00020): one space for images and captions, used to rank samples by how well they fit.

The model is open_clip's (`CustomTextCLIP`), so the weights of an export load into open_clip with the configuration that
`architecture` gives.

Captions keep this project's tokens: below `text_vocab` words, at `text_vocab + position` empty places. The text tower
attends causally and is read at its last position. That place sees the whole caption whatever its length; open_clip's
usual rule, the highest token number, would pick a word wherever a caption fills all places.

The loss compares every image with every caption of one micro-batch over all ranks: by a softmax over each image's
captions and each caption's images, or, with `loss: siglip`, by a sigmoid of each pair for itself (SigLIP, arXiv
2303.15343). Accumulating micro-batches adds such losses, it does not enlarge the comparison:
`engine.micro_batch_size` x ranks is the contrastive batch. For the same reason a sample's loss depends on what else
is in the batch, unlike in other stages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from dalle_scale import dist, types
from dalle_scale.models.capabilities import TwoEncoders
from dalle_scale.nn.half_on_cpu import attention_kernel
from dalle_scale.nn.torchvision_compat import import_open_clip
from dalle_scale.types import Batch, BatchSpec, Losses, Nets, StrictModel


class Stage(types.Stage):
    """Contrastive training of an image tower and a text tower."""

    class Config(StrictModel):
        """Both towers. The defaults are ViT-B/32's (arXiv 2103.00020, Table 20) but for the caption tokens."""

        image_size: int = Field(default=224, gt=0)  # side in pixels
        patch: int = Field(default=32, gt=0)  # side of a patch in pixels
        width: int = Field(default=768, gt=0)
        layers: int = Field(default=12, gt=0)
        heads: int = Field(default=12, gt=0)
        embed_dim: int = Field(default=512, gt=0)  # of the common space
        text_width: int = Field(default=512, gt=0)
        text_layers: int = Field(default=12, gt=0)
        text_heads: int = Field(default=8, gt=0)
        text_vocab: int = Field(default=16_384, gt=0)
        text_length: int = Field(default=256, gt=0)  # caption tokens, empty places included
        bpe_dropout: float = Field(default=0.0, ge=0, lt=1)
        augment: Literal["none", "dvae", "transformer"] = "none"  # as in types.BatchSpec
        loss: Literal["softmax", "siglip"] = "softmax"
        # inverse temperature at the start; None = 1 / 0.07 of softmax, 10 of siglip (arXiv 2303.15343, Sec. 3.2)
        logit_scale: float | None = Field(default=None, gt=0)
        logit_scale_max: float = Field(default=100.0, gt=0)  # for both losses; the paper of siglip has no such cap
        logit_bias: float | None = None  # of siglip, at the start; None = -10, as in the same section

        @model_validator(mode="after")
        def _divisible(self) -> Stage.Config:
            for size, part in (("image_size", "patch"), ("width", "heads"), ("text_width", "text_heads")):
                if getattr(self, size) % getattr(self, part):
                    raise ValueError(f"{size} {getattr(self, size)} does not divide by {part} {getattr(self, part)}")
            if self.first_scale > self.logit_scale_max:
                raise ValueError(f"logit_scale {self.first_scale} is above logit_scale_max {self.logit_scale_max}")
            if self.logit_bias is not None and self.loss != "siglip":
                raise ValueError(f"logit_bias {self.logit_bias}: the softmax loss has none; set loss: siglip")
            return self

        @property
        def first_scale(self) -> float:
            """Inverse temperature at the start."""
            return self.logit_scale or (10.0 if self.loss == "siglip" else 1 / 0.07)

        @property
        def first_bias(self) -> float | None:
            """Bias of the logits at the start; None where the loss has none."""
            bias = -10.0 if self.logit_bias is None else self.logit_bias
            return bias if self.loss == "siglip" else None

    config: Config

    @property
    def inputs(self) -> BatchSpec:
        names = {"image_size", "augment", "text_length", "text_vocab", "bpe_dropout"}
        return BatchSpec(**self.config.model_dump(include=names))

    @property
    def architecture(self) -> dict[str, Any]:
        """Arguments of `open_clip.CustomTextCLIP`."""
        c = self.config
        return {
            "embed_dim": c.embed_dim,
            "vision_cfg": {
                "image_size": c.image_size,
                "patch_size": c.patch,
                "width": c.width,
                "layers": c.layers,
                "head_width": c.width // c.heads,
            },
            "text_cfg": {
                "context_length": c.text_length,
                "vocab_size": c.text_vocab + c.text_length,
                "width": c.text_width,
                "layers": c.text_layers,
                "heads": c.text_heads,
                "pool_type": "last",
            },
            "init_logit_scale": math.log(c.first_scale),
            "init_logit_bias": c.first_bias,
            "nonscalar_logit_scale": True,  # DeepSpeed cannot share a parameter without dimensions
        }

    def nets(self) -> Nets:
        model = import_open_clip().CustomTextCLIP(**self.architecture)
        for table in (model.text.token_embedding.weight, model.text.positional_embedding):
            table.is_embedding = True
        model.visual.positional_embedding.is_embedding = True
        return {"model": model}

    def loss(self, net: str, nets: Nets, batch: Batch, step: int) -> Losses:
        """`contrastive_loss` or, where there is a bias, `sigmoid_loss`, in nats. On rank r of W it covers r's rows of
        the global logits; its mean over the ranks is the loss of the joint batch, and so is its gradient."""
        pixels = self._pixels(nets, batch["image"])
        with attention_kernel(pixels):
            images, texts, scale, *bias = nets["model"](pixels, batch["text"])
        scale = _CappedScale.apply(scale.float().squeeze(), self.config.logit_scale_max)  # type: ignore[no-untyped-call]
        features = images.float(), texts.float()
        if bias:
            return sigmoid_loss(*features, scale, bias[0].float().squeeze(), batch["text"], batch["weight"])
        return contrastive_loss(*features, scale, batch["text"], batch["weight"])

    def image_features(self, nets: Nets, images: Tensor) -> Tensor:
        """uint8 images [N, 3, H, W] -> unit vectors [N, embed_dim]. Other sizes than `image_size` are resized."""
        side = self.config.image_size
        if images.shape[-2:] != (side, side):
            resized = F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True, align_corners=False)
            images = resized.round().clamp(0, 255).to(torch.uint8)
        features: Tensor = nets["model"](self._pixels(nets, images), None)[0]
        return features.float()

    def text_features(self, nets: Nets, text: Tensor) -> Tensor:
        """Caption tokens [N, T] -> unit vectors [N, embed_dim]."""
        features: Tensor = nets["model"](None, text)[1]
        return features.float()

    def image_text_encoder(self, nets: Nets) -> TwoEncoders:
        """Both towers. As in the loss, the cap holds the scale, not the parameter."""
        c, scale = self.config, nets["model"].get_parameter("logit_scale").detach().float().exp()
        images, texts = partial(self.image_features, nets), partial(self.text_features, nets)
        return TwoEncoders(images, texts, c.text_length, c.text_vocab, min(float(scale), c.logit_scale_max))

    def scores(self, nets: Nets, images: Tensor, text: Tensor) -> Tensor:
        """Cosine similarity float32 [N] of uint8 images [N, 3, H, W] and caption tokens [N, T], pair by pair."""
        return (self.image_features(nets, images) * self.text_features(nets, text)).sum(dim=1)

    def preview(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        """Cosine similarities of all images (rows) and captions (columns): -1 is black, 1 white. A trained model
        shows a bright diagonal."""
        images = self.image_features(nets, batch["image"])
        similarity = images @ self.text_features(nets, batch["text"]).T
        levels = ((similarity + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        cells = levels.repeat_interleave(8, dim=0).repeat_interleave(8, dim=1)
        return {"similarity": cells.expand(1, 3, -1, -1)}

    def flops_per_sample(self) -> float:
        """Matrix products of both towers, twice as much again for the backward pass. Logits are left out."""
        c = self.config
        patches = (c.image_size // c.patch) ** 2
        image = _tower_flops(patches + 1, c.width, c.layers) + 2 * patches * 3 * c.patch**2 * c.width
        text = _tower_flops(c.text_length, c.text_width, c.text_layers)
        return 3.0 * (image + text + 2 * (c.width + c.text_width) * c.embed_dim)

    def _pixels(self, nets: Nets, images: Tensor) -> Tensor:
        """uint8 -> [-1, 1] in the precision of the weights."""
        dtype = next(nets["model"].parameters()).dtype
        return (images.float() / 127.5 - 1).to(dtype)


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, tokens: Tensor, weight: Tensor) -> Losses:
    """open_clip's symmetric contrastive loss over all ranks, blind to empty slots.

    Every rank must hold the same number of slots. An empty slot (weight 0) is neither a positive nor a negative.
    With all weights 1 in one process the total is `open_clip.ClipLoss`.

    Args:
        images: unit vectors [B, E] of this rank's images.
        texts: unit vectors [B, E] of their captions.
        scale: inverse temperature, a scalar.
        tokens: caption tokens [B, T].
        weight: [B] as in a batch.

    Returns:
        Terms: `loss` in nats; `accuracy_image_to_text` and `accuracy_text_to_image`: share of samples whose best
        partner has the sample's own caption (equal captions in a batch cannot be distinguished, and count as right);
        `logit_scale`.
    """
    pairs = _compare(images, texts, scale, tokens, weight)

    def one_way(logits: Tensor) -> Tensor:
        return (F.cross_entropy(logits, pairs.labels, reduction="none") * weight).mean()

    total = (one_way(pairs.image_logits) + one_way(pairs.text_logits)) / 2
    return Losses(total, {"loss": total.detach(), **pairs.accuracies, "logit_scale": scale.detach()})


def sigmoid_loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, tokens: Tensor, weight: Tensor) -> Losses:
    """SigLIP's pairwise loss (arXiv 2303.15343, Eq. 1 and Algorithm 1) over all ranks, blind to empty slots.

    Each image and caption of the joint batch are a question of their own: do they belong together?

        -1/n  sum over i, j of  log sigmoid(z_ij (scale * <image_i, text_j> + bias)),  z_ii = 1, others -1

    where i and j run over the n samples that are there: a sum over captions, a mean over images. As in the paper, an
    equal caption of another sample counts as wrong. Every rank must hold the same number of slots; it computes its own
    images' rows, [B, ranks * B]. With all weights 1 in one process the total is `open_clip.SigLipLoss`.

    Args:
        bias: of the logits, a scalar.
        images, texts, scale, tokens, weight: as in `contrastive_loss`.

    Returns:
        Terms as in `contrastive_loss`, and `logit_bias`.
    """
    pairs = _compare(images, texts, scale, tokens, weight)
    signs = torch.full_like(pairs.image_logits, -1).scatter_(1, pairs.labels[:, None], 1)
    per_sample = -F.logsigmoid(signs * (pairs.image_logits + bias)).sum(dim=1)  # a hidden pair adds 0
    total = (per_sample * weight).mean()
    terms = {"loss": total.detach(), **pairs.accuracies}
    return Losses(total, terms | {"logit_scale": scale.detach(), "logit_bias": bias.detach()})


@dataclass(frozen=True)
class _Pairs:
    """This rank's B images against all captions of the joint batch, and its captions against all images."""

    image_logits: Tensor  # [B, ranks * B]; -inf where the column is an empty slot
    text_logits: Tensor
    labels: Tensor  # int64 [B]: the column of each row's own partner
    accuracies: dict[str, Tensor]


def _compare(images: Tensor, texts: Tensor, scale: Tensor, tokens: Tensor, weight: Tensor) -> _Pairs:
    """Logits of this rank's rows; arguments as in `contrastive_loss`. Gradients reach the vectors of all ranks."""
    ranks, slots, size = dist.world_size(), len(weight), images.shape[1]
    features: Tensor = _Gather.apply(torch.cat([images, texts], dim=1))  # type: ignore[no-untyped-call]
    all_images, all_texts = features[:, :size], features[:, size:]
    both = scale * images @ all_texts.T, scale * texts @ all_images.T
    labels = slots * dist.rank() + torch.arange(slots, device=weight.device)  # columns of this rank's own partners

    empty = _gather((weight == 0).long()).bool()
    all_tokens = _gather(tokens)
    own = torch.arange(slots * ranks, device=weight.device) == labels[:, None]
    hidden = empty & ~own  # an empty row keeps its own column: all hidden would be 0/0
    image_logits, text_logits = (logits.masked_fill(hidden, float("-inf")) for logits in both)

    def accuracy(logits: Tensor) -> Tensor:
        return ((all_tokens[logits.argmax(dim=1)] == tokens).all(dim=1) * weight).mean()

    accuracies = {
        "accuracy_image_to_text": accuracy(image_logits),
        "accuracy_text_to_image": accuracy(text_logits),
    }
    return _Pairs(image_logits, text_logits, labels, accuracies)


class _CappedScale(torch.autograd.Function):
    """min(scale, cap) that gradient descent can leave only downwards.

    In place of clamping the parameter after each step: under ZeRO the optimizer owns another copy of it. Like the
    clamp, and unlike a plain `minimum`, it lets the scale come back from the cap."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, cap: float) -> Tensor:
        ctx.save_for_backward(scale >= cap)
        return scale.clamp(max=cap)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (at_cap,) = ctx.saved_tensors
        return torch.where(at_cap, gradients[0].clamp(min=0), gradients[0]), None


class _Gather(torch.autograd.Function):
    """`_gather` whose gradient is the sum of what all ranks have for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _gather(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        summed = dist.all_reduce(gradients[0].clone(memory_format=torch.contiguous_format))
        own: Tensor = summed.chunk(dist.world_size())[dist.rank()]
        return own


def _gather(values: Tensor) -> Tensor:
    """[B, ...] of every rank, joined in rank order. No gradient."""
    joined = values.new_zeros(dist.world_size(), *values.shape)
    joined[dist.rank()] = values
    return dist.all_reduce(joined).flatten(0, 1)


def _tower_flops(positions: int, width: int, layers: int) -> float:
    """Forward pass of a transformer: projections and MLP (24 W^2 a position and layer), scores and mixing."""
    return float(layers * positions * (24 * width**2 + 4 * positions * width))
