"""One side of the comparison of quantizers in autoencoders.py, in a process of its own so that its memory is known.

Reads lines: "run" does a forward pass, a backward pass and a codebook update, and answers with seconds; "memory"
answers with the most bytes that any run has taken beyond what was there before the first.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

VOCAB, WIDTH, SAMPLES, GRID = 8192, 256, 4, 32


def main() -> None:
    """Serve the side that the command line names."""
    torch.set_num_threads(1)
    features = torch.randn(SAMPLES, WIDTH, GRID, GRID, generator=torch.Generator().manual_seed(0))
    step = {"ours": ours, "vector-quantize-pytorch": theirs}[sys.argv[1]]()
    before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for line in sys.stdin:
        if line.strip() == "memory":
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before_bytes, flush=True)
        else:
            started = time.perf_counter()
            step(features.clone().requires_grad_())
            print(time.perf_counter() - started, flush=True)


def ours() -> Callable[[torch.Tensor], None]:
    """The quantizer of the stages `vqvae` and `vqgan`."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from dalle_scale.nn.quantizer import Quantizer, QuantizerConfig

    torch.manual_seed(0)
    quantizer = Quantizer(QuantizerConfig(vocab=VOCAB), WIDTH).train()

    def step(features: torch.Tensor) -> None:
        quantized = quantizer(features)
        (quantized.values.square().mean() + quantized.loss.mean()).backward()
        quantizer.after_step(0)

    return step


def theirs() -> Callable[[torch.Tensor], None]:
    """vector-quantize-pytorch with the same settings; it updates its codebook in the forward pass."""
    from vector_quantize_pytorch import VectorQuantize

    torch.manual_seed(0)
    quantizer = VectorQuantize(
        dim=WIDTH, codebook_size=VOCAB, decay=0.99, commitment_weight=0.25, accept_image_fmap=True
    ).train()

    def step(features: torch.Tensor) -> None:
        values, _, loss = quantizer(features)
        (values.square().mean() + loss.sum()).backward()

    return step


if __name__ == "__main__":
    main()
