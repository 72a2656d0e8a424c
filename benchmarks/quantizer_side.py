"""One side of the comparison of quantizers in autoencoders.py: "step" does a forward pass, a backward pass and a
codebook update."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from side import quiet, serve
from torch import nn

VOCAB, WIDTH, SAMPLES, GRID = 8192, 256, 4, 32


def main() -> None:
    """Serve the side that the command line names."""
    answers = quiet()
    features = torch.randn(SAMPLES, WIDTH, GRID, GRID, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    quantizer, step = {"ours": ours, "vector-quantize-pytorch": theirs}[sys.argv[1]]()
    serve(answers, quantizer, {"step": lambda: step(features.clone().requires_grad_())})


def ours() -> tuple[nn.Module, Callable[[torch.Tensor], None]]:
    """The quantizer of the stages `vqvae` and `vqgan`."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from dalle_scale.nn.vector_quantizer import Quantizer, QuantizerConfig

    quantizer = Quantizer(QuantizerConfig(vocab=VOCAB), WIDTH).train()

    def step(features: torch.Tensor) -> None:
        quantized = quantizer(features)
        (quantized.values.square().mean() + quantized.loss.mean()).backward()
        quantizer.after_step(0)

    return quantizer, step


def theirs() -> tuple[nn.Module, Callable[[torch.Tensor], None]]:
    """vector-quantize-pytorch with the same settings; it steps its codebook in the forward pass."""
    from vector_quantize_pytorch import VectorQuantize

    quantizer = VectorQuantize(
        dim=WIDTH, codebook_size=VOCAB, decay=0.99, commitment_weight=0.25, accept_image_fmap=True
    ).train()

    def step(features: torch.Tensor) -> None:
        values, _, loss = quantizer(features)
        (values.square().mean() + loss.sum()).backward()

    return quantizer, step


if __name__ == "__main__":
    main()
