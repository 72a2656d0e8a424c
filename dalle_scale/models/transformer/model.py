"""The text+image transformer of arXiv 2102.12092 (Sec. 2.2, App. B): one decoder over caption tokens and image codes.

    states   start-of-text  t_1 ... t_T  start-of-image  i_0 ... i_{N-1}
    predict  t_1 ... t_T        -          i_0  ... i_{N-1}      -

The states of t_T and of the last code predict nothing; they stay so that every image state sees the whole caption and
the image states form a full grid, which column layers need.

Not given by the paper and chosen here: pre-norm LayerNorm blocks, GELU, no dropout, weights from N(0, 0.02), those of
projections back onto the residual path divided by sqrt(2 * layers), biases 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_scale.models.transformer.block import Block, DecodingBlock
from dalle_scale.models.transformer.decode_graph import DecodeGraph
from dalle_scale.models.transformer.kv_cache import KVCache
from dalle_scale.models.transformer.masks import Kind, Layout
from dalle_scale.nn.blocks import run
from dalle_scale.nn.chunked_cross_entropy import weighted_entropy
from dalle_scale.nn.linear import Linear
from dalle_scale.nn.residual_scaling import BranchScale


def paper_order(layers: int) -> tuple[Kind, ...]:
    """Attention kinds of App. B.1: the last layer conv, layer i (from 1) column if (i - 2) mod 4 = 0, others row."""
    kinds: list[Kind] = ["column" if (layer - 2) % 4 == 0 else "row" for layer in range(1, layers)]
    return (*kinds, "conv")


class Head(nn.Module):
    """Logits over a vocabulary, or the loss of them, in fp32 whatever the precision of the weights (App. D)."""

    def __init__(self, width: int, vocab: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, width))

    def forward(self, x: Tensor, targets: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """States [..., D] -> fp32 logits [..., vocab]; with targets int64 [B, N] and a weight a sample [B] instead the
        mean over samples of weight times cross entropy, which is the mean over N, a scalar."""
        if targets is None or weight is None:
            return F.linear(x.float(), self.weight.float())
        shares = (weight.float() / targets.numel()).repeat_interleave(targets.shape[1])
        return weighted_entropy(x.float().flatten(0, 1), self.weight.float(), targets.flatten(), shares)


@dataclass
class Decoding:
    """Images in the middle of being sampled."""

    blocks: list[DecodingBlock]  # each with its KV cache
    graph: DecodeGraph | None = None  # of a step, on a GPU


class Transformer(nn.Module):
    """T caption tokens and grid x grid image codes -> logits of each from all that comes before it.

    An empty caption position p (counted from 0) holds the pad text_vocab + p: a token with its own embedding, seen
    by all later states and predicted like any other, so the text vocabulary has text_vocab + T entries. With T = 0
    only the two start states precede the image: a prior over codes alone.
    """

    def __init__(
        self,
        *,
        text_vocab: int,
        text_length: int,
        image_vocab: int,
        grid: int,
        width: int,
        heads: int,
        kinds: Sequence[Kind],
        mlp_ratio: int = 4,
        conv_kernel: int = 11,
    ) -> None:
        """kinds: the attention of each layer, first to last."""
        super().__init__()
        self.kinds, self.layout = tuple(kinds), Layout(text_length + 2, grid, conv_kernel)
        self.text_length = text_length
        self.activation_checkpointing = False  # set from outside: recompute each block in the backward pass
        self.start = nn.Parameter(torch.empty(2, width))  # start-of-text, start-of-image
        if text_length:
            self.text_token = nn.Embedding(text_vocab + text_length, width)
            self.text_position = nn.Parameter(torch.empty(text_length, width))
        self.image_code = nn.Embedding(image_vocab, width)
        self.image_row = nn.Parameter(torch.empty(grid, width))
        self.image_column = nn.Parameter(torch.empty(grid, width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, kind, self.layout) for kind in kinds)
        self.norm = nn.LayerNorm(width)
        if text_length:
            self.text_head = Head(width, text_vocab + text_length)
        self.image_head = Head(width, image_vocab)
        self._initialize()

    def _initialize(self) -> None:
        """Sample the weights and mark embeddings and unembeddings for the optimizer."""
        residual_std = 0.02 * (2 * len(self.blocks)) ** -0.5
        for name, parameter in self.named_parameters():
            block = name.startswith("blocks.")
            if not block and not name.startswith("norm."):
                parameter.is_embedding = True  # type: ignore[attr-defined]
            if parameter.ndim >= 2:
                onto_residual = block and name.endswith(("output.weight", "contract.weight_t"))
                nn.init.normal_(parameter, std=residual_std if onto_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def branches(self) -> list[tuple[BranchScale, list[nn.Parameter]]]:
        """The residual branches, first to last: the scale of each and the parameters in it."""
        return [branch for block in self.blocks for branch in cast(Block, block).branches()]

    def store_by_columns(self) -> None:
        """Lay out the matrices in memory column by column, in place; shapes and values stay what they are.

        CPUs read them faster so in products of few rows, which take most of the time of sampling. A `TransposedLinear`
        lies like that already.
        """
        for module in self.modules():
            if isinstance(module, Linear | Head):
                module.weight.data = module.weight.data.t().contiguous().t()

    def forward(
        self, text: Tensor, codes: Tensor, weights: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits of every token and code of whole sequences, or the losses of them without the logits.

        text int64 [B, T], codes int64 [B, N] -> fp32 (text logits [B, T, text_vocab + T], image logits
        [B, N, image_vocab]). Logits k are of token or code k itself: the shift by one state is done here.

        With `weights`, of captions [B] and of codes [B] -> the losses of both, scalars: the mean over samples of weight
        times cross entropy, which is in nats a position.
        """
        position = (self.image_row[:, None] + self.image_column).flatten(0, 1)
        x = torch.cat([*self._prefix(text), self.image_code(codes) + position], dim=1)
        for block in self.blocks:
            x = run(block, x, recompute=self.activation_checkpointing)
        x = self.norm(x)
        of_text, of_codes = ((text, weights[0]), (codes, weights[1])) if weights is not None else ((), ())
        image = self.image_head(x[:, self.text_length + 1 : -1], *of_codes)
        if not self.text_length:
            return image.new_zeros(()) if weights is not None else image.new_empty(len(x), 0, 0), image
        return self.text_head(x[:, : self.text_length], *of_text), image

    def prefill(self, text: Tensor, prefix_index: Tensor) -> tuple[Tensor, Decoding]:
        """Compute the prefixes of U captions, from which N images are sampled.

        text int64 [U, T], prefix_index int64 [N] (the caption of each image) -> (fp32 logits of code 0
        [N, image_vocab], the state that `decode_step` continues).
        """
        x = torch.cat(self._prefix(text), dim=1)
        blocks = []
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            cache = KVCache(kind, self.layout, prefix_index)
            x = block(x, cache)
            blocks.append(DecodingBlock(cast(Block, block), cache))
        logits: Tensor = self.image_head(self.norm(x[:, -1]))
        return logits[prefix_index], Decoding(blocks)

    def decode_step(self, codes: Tensor, index: int | Tensor, decoding: Decoding) -> Tensor:
        """Code `index` of N images, int64 [N] -> fp32 logits of the code after it [N, image_vocab].

        On a GPU the first call records a graph that all replay. An index in a tensor, int64 [1], makes no difference to
        the result; that form is recorded.
        """
        if codes.device.type == "cuda" and isinstance(index, int):
            if decoding.graph is None:
                decoding.graph = DecodeGraph(lambda codes, at: self.decode_step(codes, at, decoding), codes, index)
            return decoding.graph(codes, index)
        position = self.image_row[index // self.layout.grid] + self.image_column[index % self.layout.grid]
        x = self.image_code(codes) + position
        for block in decoding.blocks:
            x = block.decode_step(x, index)
        logits: Tensor = self.image_head(self.norm(x))
        return logits

    def _prefix(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The states before the image, to be concatenated: [B, 1, D], [B, T, D], [B, 1, D]."""
        start_of_text, start_of_image = self.start[:, None].unbind()
        shape = (len(text), 1, self.start.shape[1])
        if self.text_length:
            caption = self.text_token(text) + self.text_position
        else:
            caption = self.start.new_empty(len(text), 0, shape[2])
        return start_of_text.expand(shape), caption, start_of_image.expand(shape)
