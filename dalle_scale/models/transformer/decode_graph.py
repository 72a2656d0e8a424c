"""A decoding step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class DecodeGraph:
    """A decoding step as a CUDA graph: one launch instead of some twenty operations a layer.

    Recorded at the first call and replayed at every one, on the same memory.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], codes: Tensor, index: int) -> None:
        """step: (codes int64 [N], index int64 [1]) -> logits; calling it twice for an index does no harm. codes, index:
        of the first call."""
        self._codes, self._index = codes.clone(), torch.tensor([index], device=codes.device)
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step(self._codes, self._index)  # libraries set themselves up at the first call, which cannot be recorded
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # Another thread, which decodes the images of an earlier batch, may allocate meanwhile
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits = step(self._codes, self._index)

    def __call__(self, codes: Tensor, index: int) -> Tensor:
        """Logits of the code after `index`."""
        self._codes.copy_(codes)
        self._index.fill_(index)
        self._graph.replay()
        return self._logits.clone()
