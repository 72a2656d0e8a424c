"""BPE dropout (Provilkov et al., arXiv 1910.13267) over a sentencepiece model, a pure function of the seed.

sentencepiece samples too, but its generator is salted anew in every process, whatever seed is set (0.2.3, measured):
the same caption would come out differently after a restart or in another worker. So the merges are done here, in
sentencepiece's order: the best-scored pair first, leftmost among equals; a pair that is dropped comes back only when
one of its sides has grown.
"""

from __future__ import annotations

import heapq
import random
from typing import Any


class BpeDropout:
    """Samples segmentations of captions with a sentencepiece model of type BPE."""

    def __init__(self, model: Any) -> None:
        assert is_bpe(model), "BPE dropout needs a BPE model"
        self._model = model
        size = model.get_piece_size()
        self._ids = {model.id_to_piece(token): token for token in range(size) if _is_normal(model, token)}
        self._ranks = {piece: -model.get_score(token) for piece, token in self._ids.items()}
        self._bytes = [model.piece_to_id(f"<0x{value:02X}>") for value in range(256)]
        self._has_bytes = any(model.is_byte(token) for token in range(size))

    def encode(self, caption: str, dropout: float, seed: int) -> list[int]:
        """Token ids of `caption`, every merge left out with probability `dropout`."""
        symbols = self._merge(self._model.normalize(caption), dropout, random.Random(seed))
        ids: list[int] = []
        unknown = self._model.unk_id()
        for symbol in symbols:
            token = self._ids.get(symbol)
            if token is not None:
                ids.append(token)
            elif self._has_bytes:
                ids.extend(self._bytes[value] for value in symbol.encode())
            elif ids[-1:] != [unknown]:  # sentencepiece makes one token of a run of unknown characters
                ids.append(unknown)
        return ids

    def _merge(self, text: str, dropout: float, rng: random.Random) -> list[str]:
        """Characters, merged pair by pair. A symbol lives at the place of its first character; the others are ""."""
        symbols = list(text)
        after = [*range(1, len(symbols)), -1]
        before = list(range(-1, len(symbols) - 1))
        queue: list[tuple[float, int, int, str]] = []  # rank, left place, right place, merged symbol

        def propose(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                merged = symbols[left] + symbols[right]
                rank = self._ranks.get(merged)
                if rank is not None:
                    heapq.heappush(queue, (rank, left, right, merged))

        for place in range(len(symbols) - 1):
            propose(place, place + 1)
        while queue:
            _, left, right, merged = heapq.heappop(queue)
            if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != merged:
                continue  # one side was merged with another neighbour meanwhile
            if dropout and rng.random() < dropout:
                continue
            symbols[left], symbols[right] = merged, ""
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
            propose(before[left], left)
            propose(left, after[left])
        return [symbol for symbol in symbols if symbol]


def is_bpe(model: Any) -> bool:
    """Whether the model's scores are the merge ranks 0, -1, -2, ... of BPE (unigram models hold log-probabilities)."""
    scores = [model.get_score(token) for token in range(model.get_piece_size()) if _is_normal(model, token)]
    return scores == [-float(rank) for rank in range(len(scores))]


def _is_normal(model: Any, token: int) -> bool:
    return not (model.is_unknown(token) or model.is_control(token) or model.is_byte(token) or model.is_unused(token))
