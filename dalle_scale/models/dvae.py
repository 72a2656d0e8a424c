"""Residual encoder and decoder of the discrete VAE (arXiv 2102.12092, App. A.1), for any size.

Two stems. "resnet" is the paper's: a 7x7 convolution at full resolution, then groups with max-pooling between them.
"patch" folds each downsampling x downsampling square into channels and works at the resolution of the codes
throughout: far cheaper, and the form that k-means can initialize. The decoders mirror them.

Logits and assignments have the codes last, [B, h, w, K]: what softmax and matrix products want, and for
channels-last images a view. The 1x1 convolutions on either side of the relaxation run in fp32 whatever the rest
runs in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_scale.nn.blocks import Halve, conv, double, embedding_parameter, no_autocast, on_cpu, own_conv, run
from dalle_scale.nn.conv import Conv


class Bottleneck(nn.Module):
    """x + gain * branch(x); the branch is four times ReLU and convolution, n_out / 4 wide inside.

    The skip is a 1x1 convolution where the width changes, else nothing.
    """

    def __init__(self, n_in: int, n_out: int, kernels: Sequence[int], gain: float) -> None:
        super().__init__()
        widths = [n_in, *[n_out // 4] * (len(kernels) - 1), n_out]
        layers: list[nn.Module] = []
        for kernel, before, after in zip(kernels, widths, widths[1:], strict=False):
            layers += [nn.ReLU(), own_conv(before, after, kernel)]
        self.skip = nn.Identity() if n_in == n_out else own_conv(n_in, n_out, 1)
        self.branch = nn.Sequential(*layers)
        self.gain = gain
        self.activation_checkpointing = False  # set from outside: recompute the branch in the backward pass

    def forward(self, x: Tensor, doubled: bool = False) -> Tensor:
        """[B, n_in, h, w] -> [B, n_out, h, w]; doubled, of `double(x)` -> [B, n_out, 2 h, 2 w]."""
        if on_cpu(x):
            return self._on_cpu(x, doubled)
        x = double(x) if doubled else x
        branch = run(self.branch, x, recompute=self.activation_checkpointing)
        return torch.add(self.skip(x), branch, alpha=self.gain)

    def _on_cpu(self, x: Tensor, doubled: bool) -> Tensor:
        """The same, with ReLU and sum as parts of the convolutions, and 1x1 convolutions before the map is doubled."""

        def branch(x: Tensor, residual: Tensor) -> Tensor:
            layers = [layer for layer in self.branch if isinstance(layer, Conv)]
            for number, layer in enumerate(layers[:-1]):
                x = layer(x, relu=True)
                if doubled and number == 0:
                    x = double(x)
            x = layers[-1](x, relu=True, residual=residual, gain=self.gain)
            return x

        if doubled and self.branch[1].kernel_size != (1, 1):
            x, doubled = double(x), False
        residual = self.skip(x)
        return run(branch, x, double(residual) if doubled else residual, recompute=self.activation_checkpointing)


class _CodeMatrix(nn.Module):
    """A matrix with one row a code, weights ~ N(0, 1 / sqrt(inputs)), and biases 0 of the outputs."""

    def __init__(self, vocab: int, width: int, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = embedding_parameter(torch.empty(vocab, width))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.normal_(self.weight, std=1 / math.sqrt(inputs))


class CodeHead(_CodeMatrix):
    """1x1 convolution to the K logits, in fp32: [B, C, h, w] -> [B, h, w, K]."""

    def __init__(self, n_in: int, vocab: int) -> None:
        super().__init__(vocab, n_in, outputs=vocab, inputs=n_in)

    def forward(self, x: Tensor) -> Tensor:
        with no_autocast(x.device.type):
            return F.linear(x.permute(0, 2, 3, 1).float(), self.weight.float(), self.bias.float())


class CodeEmbedding(_CodeMatrix):
    """1x1 convolution from the K codes, in fp32: relaxed [B, h, w, K] or hard int64 [B, h, w] -> [B, n_out, h, w]."""

    def __init__(self, vocab: int, n_out: int) -> None:
        super().__init__(vocab, n_out, outputs=n_out, inputs=vocab)

    def forward(self, assignment: Tensor) -> Tensor:
        with no_autocast(assignment.device.type):
            weight = self.weight.float()
            rows = assignment @ weight if assignment.is_floating_point() else F.embedding(assignment, weight)
            return (rows + self.bias.float()).permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """Image in phi space [B, 3, S, S] -> logits fp32 [B, S / downsampling, S / downsampling, K].

    Args:
        widths: channels of each group of residual blocks; the paper's are 256, 512, 1024, 2048.
        blocks: residual blocks a group.
        vocab: K.
        downsampling: a power of two; "resnet" pools after each of the first log2(downsampling) groups.
        stem: "resnet" or "patch".
    """

    def __init__(self, widths: Sequence[int], blocks: int, vocab: int, downsampling: int, stem: str) -> None:
        super().__init__()
        self.patch, pools = _folding(downsampling, stem)
        self.input = conv(3 * self.patch**2, widths[0], 1 if stem == "patch" else 7)
        layers: list[nn.Module] = []
        gain = 1 / (len(widths) * blocks) ** 2  # the paper's
        for group, width in enumerate(widths):
            layers += bottlenecks(widths[max(group - 1, 0)], width, blocks, (3, 3, 3, 1), gain)
            if group < pools:
                layers.append(Halve())
        self.trunk = nn.Sequential(*layers)
        self.output = CodeHead(widths[-1], vocab)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_unshuffle(x, self.patch).to(self.input.weight.dtype)
        logits: Tensor = self.output(torch.relu(self.trunk(self.input(x))))
        return logits


class Decoder(nn.Module):
    """Assignment to codes, relaxed [B, h, w, K] or hard int64 [B, h, w] -> maps [B, channels, S, S].

    Args:
        widths: channels of each group in the encoder's order; built in reverse.
        blocks: residual blocks a group.
        vocab: K.
        n_init: width of the first 1x1 convolution.
        channels: maps per image.
        downsampling: S / h.
        stem: "resnet" or "patch", as in the encoder.
    """

    def __init__(
        self, widths: Sequence[int], blocks: int, vocab: int, n_init: int, channels: int, downsampling: int, stem: str
    ) -> None:
        super().__init__()
        self.patch, pools = _folding(downsampling, stem)
        self.input = CodeEmbedding(vocab, n_init)
        layers: list[nn.Module] = []
        gain = 1 / (len(widths) * blocks) ** 2
        for group in reversed(range(len(widths))):
            before = n_init if group == len(widths) - 1 else widths[group + 1]
            layers += bottlenecks(before, widths[group], blocks, (1, 3, 3, 3), gain)
            if 0 < group <= pools:  # where the encoder pooled between this group and the one before it
                layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
        self.trunk = nn.Sequential(*layers)
        self.output = own_conv(widths[0], channels * self.patch**2, 1)

    def forward(self, assignment: Tensor) -> Tensor:
        x, doubled = self.input(assignment).to(self.output.weight.dtype), False
        for layer in self.trunk:
            if isinstance(layer, Bottleneck):
                x, doubled = layer(x, doubled), False
            else:  # an Upsample, which the block that follows does as well
                doubled = True
        return F.pixel_shuffle(self.output(x, relu=True), self.patch)


def _folding(downsampling: int, stem: str) -> tuple[int, int]:
    """(side of the square folded into channels, number of poolings)."""
    assert stem in ("resnet", "patch")
    return (downsampling, 0) if stem == "patch" else (1, downsampling.bit_length() - 1)


def bottlenecks(n_in: int, width: int, blocks: int, kernels: Sequence[int], gain: float) -> list[nn.Module]:
    """`blocks` residual blocks, n_in -> width, each branch with this gain."""
    return [Bottleneck(width if index else n_in, width, kernels, gain) for index in range(blocks)]
