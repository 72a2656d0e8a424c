"""Captions to tokens: a sentencepiece model of ours, or any Hugging Face tokenizer.

One table of id ranges (arXiv 2102.12092, Sec. 2.2): pieces are 0 .. vocab - 1, the empty position p of a caption holds
`vocab + p`, so every position has a pad token of its own. Captions are lower-cased: sentencepiece models carry that in
their normalisation rule (nmt_nfkc_cf), for the others it happens here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from dalle_scale.data.bpe_dropout import BpeDropout, is_bpe
from dalle_scale.types import UserError

_CACHE_CAPTIONS = 100_000


class TextTokenizer(ABC):
    """Text tokenizer, as `open_text` returns it.

    Attributes:
        vocab: token ids are below this, pads start here.
        truncated_samples: captions that `encode` has cut so far.
    """

    def __init__(self, num_pieces: int, vocab: int | None, path: str) -> None:
        if vocab is not None and num_pieces > vocab:
            raise UserError(
                f"{path}: this text tokenizer has {num_pieces} tokens, the model has room for {vocab}; "
                f"set the model's text vocabulary to {num_pieces} or train a smaller tokenizer"
            )
        self.vocab = num_pieces if vocab is None else vocab
        self.truncated_samples = 0
        self._num_pieces = num_pieces
        self._cache: dict[str, list[int]] = {}

    def encode(
        self, captions: Sequence[str], length: int, dropout: float = 0.0, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """Tokens int64 [B, length]; a longer caption keeps its first `length` tokens and is counted.

        Args:
            dropout: share of BPE merges left out (arXiv 1910.13267); sentencepiece BPE models only.
            seeds: one integer a caption, the only source of randomness of the dropout.
        """
        out = np.tile(np.arange(self.vocab, self.vocab + length, dtype=np.int64), (len(captions), 1))
        for row, caption in enumerate(captions):
            if dropout:
                assert seeds is not None, "BPE dropout needs one seed a caption"
                ids = self._pieces_with_dropout(caption, dropout, int(seeds[row]))
            else:
                ids = self.pieces(caption)
            self.truncated_samples += len(ids) > length
            ids = ids[:length]
            out[row, : len(ids)] = ids
        return torch.from_numpy(out)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The caption of one row of tokens; pads are skipped."""
        return self._text([int(token) for token in ids if int(token) < self._num_pieces])

    @property
    def can_drop(self) -> bool:
        """Whether `encode` knows BPE dropout."""
        return False

    def pieces(self, caption: str) -> list[int]:
        """All token ids of a caption, however many; remembered, since captions of small data sets repeat."""
        ids = self._cache.get(caption)
        if ids is None:
            if len(self._cache) >= _CACHE_CAPTIONS:
                self._cache.clear()
            ids = self._cache[caption] = self._pieces(caption)
        return ids

    @abstractmethod
    def _pieces(self, caption: str) -> list[int]:
        """`pieces` without the memory."""

    def _pieces_with_dropout(self, caption: str, dropout: float, seed: int) -> list[int]:
        """The same under BPE dropout."""
        raise AssertionError("open_stream refuses BPE dropout where `can_drop` is false")

    @abstractmethod
    def _text(self, ids: list[int]) -> str:
        """The caption of token ids."""


class _SentencePiece(TextTokenizer):
    """A sentencepiece model file."""

    def __init__(self, path: str, vocab: int | None) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=path)
        except RuntimeError:
            raise UserError(f"{path}: not a sentencepiece model; make one with data_tools/train_tokenizer.py") from None
        self._sampler: BpeDropout | None = None
        super().__init__(self._model.get_piece_size(), vocab, path)

    @property
    def can_drop(self) -> bool:
        return is_bpe(self._model)

    def _pieces(self, caption: str) -> list[int]:
        return list(self._model.encode(caption))

    def _pieces_with_dropout(self, caption: str, dropout: float, seed: int) -> list[int]:
        self._sampler = self._sampler or BpeDropout(self._model)
        return self._sampler.encode(caption, dropout, seed)

    def _text(self, ids: list[int]) -> str:
        return str(self._model.decode(ids))


class _HuggingFace(TextTokenizer):
    """Any tokenizer that transformers can open, without its special tokens."""

    def __init__(self, path: str, vocab: int | None) -> None:
        from transformers import AutoTokenizer  # three seconds of import that sentencepiece users do without

        try:
            self._model: Any = AutoTokenizer.from_pretrained(path, local_files_only=Path(path).exists())
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{path}: transformers cannot open this text tokenizer: {reason}") from None
        super().__init__(len(self._model), vocab, path)

    def _pieces(self, caption: str) -> list[int]:
        return list(self._model.encode(caption.lower(), add_special_tokens=False))

    def _text(self, ids: list[int]) -> str:
        return str(self._model.decode(ids))


def open_text(path: str | Path, vocab: int | None = None) -> TextTokenizer:
    """Open a sentencepiece `.model` file, or a folder / hub name of a Hugging Face tokenizer.

    Args:
        vocab: where the pads start, that is, the text vocabulary of the model that reads the tokens;
            None = the tokenizer's own size.

    Raises:
        UserError: no such file, not a tokenizer, or more tokens than `vocab`.
    """
    text = str(path)
    if Path(text).is_file():
        return _SentencePiece(text, vocab)
    if text.endswith(".model") or (text.startswith((".", "/")) and not Path(text).exists()):
        raise UserError(f"{text}: no such text tokenizer; make one with data_tools/train_tokenizer.py")
    return _HuggingFace(text, vocab)
