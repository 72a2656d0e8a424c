"""Vector quantizer: features to the nearest of K codes, with gradients past the choice.

van den Oord et al., arXiv 1711.00937 (VQ-VAE), Sec. 3 and App. A.1; Razavi et al., arXiv 1906.00446 (VQ-VAE-2),
Sec. 2; optionally the rotation trick (Fifty et al., arXiv 2410.06424, Sec. 4) and codes on the unit sphere in few
dimensions (Yu et al., arXiv 2110.04627, Sec. 3.2).

Distances, codebook and its statistics are fp32 whatever the rest runs in, and no tensor is vectors x codes large.
`forward` only collects statistics; `after_step` sums them over the ranks and moves the codebook, once a step. So
accumulation, recomputed activations and evaluation neither count twice nor change codes in the middle of a step.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_scale import dist
from dalle_scale.nn.blocks import embedding_parameter, no_autocast
from dalle_scale.nn.gumbel import gumbel_noise
from dalle_scale.nn.kmeans import Progress, assign, kmeans, silent
from dalle_scale.types import StrictModel, UserError

_RESTARTS_AT_ONCE = 256  # codes that may restart in one step
_RESTART_STREAM = -1  # the "step" of their random numbers, which no step has
_RESTART_GRACE = 1.1  # a restarted code starts with so many times the count below which it would restart again
_KMEANS_SEED = 0


class QuantizerConfig(StrictModel):
    """One codebook. The defaults are those of the VQ-VAE papers."""

    vocab: int = Field(default=512, ge=2, le=65536)  # K; code shards hold 16 bits a code
    code_dim: int | None = Field(default=None, ge=1)  # width of a code; None = the features', else linear maps around
    # who moves the codes: "ema" = means of the vectors assigned to them, "loss" = the optimizer, by the codebook loss
    update: Literal["ema", "loss"] = "ema"
    ema_decay: float = Field(default=0.99, ge=0, lt=1)  # gamma
    commitment: float = Field(default=0.25, ge=0)  # beta, on the term that pulls the encoder to the codes
    cosine: bool = False  # codes and vectors on the unit sphere
    rotation: bool = False  # gradients turned and scaled as the vector is to its code; False = straight through
    # ema: a code that gets fewer vectors a step (average over steps, all ranks) restarts from one of the global
    # batch; 0 = never
    restart_below: float = Field(default=0.0, ge=0, validate_default=True)
    init: Literal["random", "kmeans"] = "random"
    init_samples: int = Field(default=1_000, ge=1)  # kmeans: training images whose features are clustered
    init_iterations: int = Field(default=10, ge=0)

    @field_validator("restart_below")
    @classmethod
    def _check_restart_below(cls, value: float, info: ValidationInfo) -> float:
        if value > 0 and info.data.get("update") == "loss":
            raise ValueError("needs update: ema, since codes trained by the optimizer are not ours to move")
        return value


class Quantized(NamedTuple):
    """Quantizer outputs for the decoder and the loss. A tuple, because DeepSpeed's ZeRO 3 looks for tensors in what a
    module returns, to have its weights in place for the backward pass, and does not see into other classes."""

    values: Tensor  # [B, D, H, W], the codes' vectors in the dtype of the features
    codes: Tensor  # int64 [B, H, W]
    loss: Tensor  # fp32 [B]: beta x commitment, and the codebook loss where update is "loss"


class Linear(nn.Linear):
    """A linear map in fp32, whatever its weights are kept in."""

    def forward(self, vectors: Tensor) -> Tensor:
        return F.linear(vectors, self.weight.float(), self.bias.float())


class Quantizer(nn.Module):
    """K codes for features of `dim` channels.

    With update "ema" the codebook is a buffer: no optimizer touches it and ZeRO 3 leaves it whole. All state lies in
    buffers, equal on all ranks once rank 0's were broadcast, and stays equal because ranks only add what was summed
    over all of them.
    """

    codebook: Tensor  # [K, code_dim]
    ema_counts: Tensor
    ema_sums: Tensor
    mass: Tensor
    counts: Tensor
    sums: Tensor
    candidate_keys: Tensor
    candidates: Tensor

    def __init__(self, config: QuantizerConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        width = config.code_dim or dim
        self.down = nn.Identity() if config.code_dim is None else Linear(dim, width)
        self.up = nn.Identity() if config.code_dim is None else Linear(width, dim)
        codebook = torch.empty(config.vocab, width).uniform_(-1 / config.vocab, 1 / config.vocab)
        if config.cosine:
            codebook = F.normalize(torch.randn(config.vocab, width), dim=1)
        self._counted = False  # whether there are statistics that `after_step` has not seen
        if config.update == "loss":
            self.codebook = embedding_parameter(codebook)
            return
        self.register_buffer("codebook", codebook)
        # N and m of App. A.1 start at 0, and `mass` is the same average of ones: N / mass is a count without the pull
        # of the start, and m / N never has one
        self.register_buffer("ema_counts", torch.zeros(config.vocab))
        self.register_buffer("ema_sums", torch.zeros(config.vocab, width))
        self.register_buffer("mass", torch.zeros(1))
        # Of the current step, on this rank. At zero whenever a checkpoint is written
        self.register_buffer("counts", torch.zeros(config.vocab), persistent=False)
        self.register_buffer("sums", torch.zeros(config.vocab, width), persistent=False)
        slots = min(config.vocab, _RESTARTS_AT_ONCE) if config.restart_below > 0 else 0
        self.register_buffer("candidate_keys", torch.full((slots,), -torch.inf), persistent=False)
        self.register_buffer("candidates", torch.zeros(slots, width), persistent=False)

    def forward(self, features: Tensor, weight: Tensor | None = None, seeds: Tensor | None = None) -> Quantized:
        """Quantize, and count while training.

        Statistics are collected in training mode from features that require a gradient: not while another net's turn
        has this one frozen, not without gradients, and not when a backward pass runs a forward again.

        Args:
            features: [B, D, H, W].
            weight: [B], None = all 1; samples of weight 0 do not count.
            seeds: int64 [B], randomness of the restarts. With them the choice does not depend on how the global batch
                is spread over ranks and micro-batches; without, it is seeded by the bits of the features.
        """
        with no_autocast(features.device.type):
            vectors = self._vectors(features)
            codes, error = self._nearest(vectors.detach())
            chosen = F.embedding(codes, self._table())
            loss = self.config.commitment * (vectors - chosen.detach()).square().mean(dim=(1, 2, 3))
            if self.config.update == "loss":
                loss = loss + (vectors.detach() - chosen).square().mean(dim=(1, 2, 3))
            elif self.training and features.requires_grad and not _in_backward():
                self._count(vectors.detach(), codes, error, weight, seeds)
            through = rotate if self.config.rotation else straight_through
            values = self.up(through(vectors, chosen.detach())).permute(0, 3, 1, 2)
        return Quantized(values.to(features.dtype), codes, loss)

    def encode(self, features: Tensor) -> Tensor:
        """Codes int64 [B, H, W] of features [B, D, H, W], without statistics."""
        with no_autocast(features.device.type):
            return self._nearest(self._vectors(features))[0]

    def lookup(self, codes: Tensor) -> Tensor:
        """Decoder input of codes int64 [B, H, W]: fp32 [B, D, H, W]."""
        with no_autocast(codes.device.type):
            vectors: Tensor = self.up(F.embedding(codes, self._table()))
            return vectors.permute(0, 3, 1, 2)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the codes by the statistics of all ranks since the last call (a collective: all ranks call it).

        N <- gamma N + (1 - gamma) n, m <- gamma m + (1 - gamma) sum of vectors, code = m / N (App. A.1). A code that
        got no vector stays where it is exactly, as m / N would but for rounding.
        """
        if self.config.update == "loss" or not self._counted:
            return
        best = dist.all_reduce(self.candidate_keys.clone(), "max") if len(self.candidates) else self.candidate_keys
        ours = (self.candidate_keys == best) & (best > -torch.inf)
        parts = [self.counts, self.sums, ours.float(), self.candidates * ours[:, None]]
        packed = dist.all_reduce(torch.cat([part.flatten() for part in parts]))
        split = torch.split(packed, [part.numel() for part in parts])
        counts, sums, counted, candidates = (part.view_as(like) for part, like in zip(split, parts, strict=True))
        share = 1 - self.config.ema_decay
        self.mass.lerp_(torch.ones_like(self.mass), share)
        self.ema_counts.lerp_(counts, share)
        self.ema_sums.lerp_(sums, share)
        means = self.ema_sums / self.ema_counts.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        self._set(counts > 0, means)
        if len(candidates):
            self._restart(candidates / counted.clamp_min(1)[:, None], counted > 0)
        for part in (self.counts, self.sums, self.candidates):
            part.zero_()
        self.candidate_keys.fill_(-torch.inf)
        self._counted = False

    @torch.no_grad()
    def initialize(self, features: Tensor, progress: Progress = silent) -> None:
        """Start at the k-means centroids of features [M, D]; for rank 0, before its buffers are broadcast.

        Raises:
            UserError: fewer features than codes.
        """
        if len(features) < self.config.vocab:
            raise UserError(
                f"quantizer.init: k-means of {len(features)} vectors cannot give {self.config.vocab} codes; "
                f"raise quantizer.init_samples, now {self.config.init_samples}, or lower quantizer.vocab"
            )
        points = self._on_sphere(self.down(features.float())).cpu()
        weights = torch.ones(len(points))
        iterations = self.config.init_iterations
        centroids = kmeans(points, weights, self.config.vocab, iterations, _KMEANS_SEED, progress)
        self.codebook.copy_(self._on_sphere(centroids))

    def _vectors(self, features: Tensor) -> Tensor:
        """Vectors that are compared with the codes: [B, D, H, W] -> fp32 [B, H, W, code_dim]."""
        return self._on_sphere(self.down(features.permute(0, 2, 3, 1).float()))

    def _table(self) -> Tensor:
        """The codes, fp32 [K, code_dim]."""
        return self._on_sphere(self.codebook.float())

    def _on_sphere(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.config.cosine else vectors

    def _nearest(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes int64 [B, H, W] and squared distances [B, H, W] of vectors [B, H, W, code_dim]."""
        codes, error = assign(vectors.flatten(0, 2), self._table().detach())
        return codes.view(vectors.shape[:3]), error.view(vectors.shape[:3])

    @torch.no_grad()
    def _count(
        self, vectors: Tensor, codes: Tensor, error: Tensor, weight: Tensor | None, seeds: Tensor | None
    ) -> None:
        """Add a micro-batch to the statistics of this step."""
        self._counted = True
        valid = torch.ones_like(error) if weight is None else (weight > 0).float()[:, None, None].expand_as(error)
        masked = torch.where(valid[..., None] > 0, vectors, 0.0)  # an empty slot may hold anything
        self.counts.index_add_(0, codes.flatten(), valid.flatten())
        self.sums.index_add_(0, codes.flatten(), masked.flatten(0, 2))
        if len(self.candidates):
            if seeds is None:
                seeds = vectors.flatten(1).contiguous().view(torch.int32).sum(dim=1)
            self._collect_candidates(masked, torch.where(valid > 0, error, 0.0), seeds)

    def _collect_candidates(self, vectors: Tensor, error: Tensor, seeds: Tensor) -> None:
        """Keep one vector a slot: each falls into a random slot, and within one is chosen with probability in
        proportion to its squared distance from its code, as k-means++ does (the largest of log(error) + Gumbel noise).
        The winner over several micro-batches or ranks is the winner of the winners.
        """
        positions = error[0].numel()
        noise = gumbel_noise(seeds, _RESTART_STREAM, 2 * positions)
        keys = (noise[:, :positions] + error.flatten(1).log()).flatten()
        uniform = torch.exp(-torch.exp(-noise[:, positions:])).flatten()
        slots = (uniform * len(self.candidates)).long().clamp_max(len(self.candidates) - 1)
        best = torch.full_like(self.candidate_keys, -torch.inf).scatter_reduce_(0, slots, keys, "amax")
        rows = torch.arange(len(keys), device=keys.device)
        rows = torch.where(keys == best[slots], rows, len(keys) - 1)
        first = torch.full_like(best, len(keys) - 1, dtype=torch.long).scatter_reduce_(0, slots, rows, "amin")
        better = best > self.candidate_keys
        self.candidate_keys.copy_(torch.where(better, best, self.candidate_keys))
        self.candidates.copy_(torch.where(better[:, None], vectors.flatten(0, 2)[first], self.candidates))

    def _restart(self, candidates: Tensor, filled: Tensor) -> None:
        """Give the least used codes below the threshold the vectors of the filled slots, with a count to live on."""
        average = self.ema_counts / self.mass
        order = average.argsort(stable=True)[: len(candidates)]
        slots = (~filled).long().argsort(stable=True)  # filled ones first
        replaced = (average[order] < self.config.restart_below) & filled[slots]
        dead = torch.zeros_like(average, dtype=torch.bool).index_put((order,), replaced)
        vectors = torch.zeros_like(self.ema_sums).index_put((order,), candidates[slots])
        start = _RESTART_GRACE * self.config.restart_below * self.mass
        self.ema_counts.copy_(torch.where(dead, start, self.ema_counts))
        self.ema_sums.copy_(torch.where(dead[:, None], vectors * start, self.ema_sums))
        self._set(dead, vectors)

    def _set(self, chosen: Tensor, vectors: Tensor) -> None:
        """Put vectors [K, code_dim] in place of the codes that `chosen` [K] marks."""
        self.codebook.copy_(torch.where(chosen[:, None], self._on_sphere(vectors), self.codebook))


def straight_through(vectors: Tensor, chosen: Tensor) -> Tensor:
    """`chosen`, exactly, with the gradient passed to `vectors` unchanged. Same shapes, [..., D]."""
    return chosen + (vectors - vectors.detach())


def rotate(vectors: Tensor, chosen: Tensor) -> Tensor:
    """`chosen`, exactly, as the image of `vectors` under a constant rotation and scaling (arXiv 2410.06424, Sec. 4.2).

    With unit vectors e and q of a vector and its code and r = (e + q) / |e + q|, the rotation from e to q is
    I - 2 r r^T + 2 q e^T. Gradients go back through its transpose, so the angle between gradient and code becomes that
    between gradient and vector. A vector of length 0 has no direction: there the scale is 1. Shapes [..., D].
    """
    start, end = F.normalize(vectors.detach(), dim=-1), F.normalize(chosen, dim=-1)
    middle = F.normalize(start + end, dim=-1)
    length = vectors.detach().norm(dim=-1, keepdim=True)
    scale = torch.where(length > 0, chosen.norm(dim=-1, keepdim=True) / length, 1.0)
    along_middle = (vectors * middle).sum(dim=-1, keepdim=True)
    along_start = (vectors * start).sum(dim=-1, keepdim=True)
    turned = scale * (vectors - 2 * middle * along_middle + 2 * end * along_start)
    return chosen + (turned - turned.detach())


def _in_backward() -> bool:
    """Whether autograd is running: then this forward is a recomputation (`torch.utils.checkpoint` asks the same)."""
    return torch._C._current_graph_task_id() != -1
