"""Exports that model the codes of image tokenizers: what the codes of an image cost under them, in bits.

The prior of a tokenizer is one export of the stage `dalle`, or one of `vqvae2_prior` for each level of codes; the
probability of an image's codes is the product over its levels.
"""

from __future__ import annotations

import filecmp
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dalle_scale.checkpoint import export
from dalle_scale.checkpoint.export import UPSTREAM_PART, Export
from dalle_scale.types import CodePrior, ImageTokenizer, UserError


@dataclass(frozen=True)
class _Level:
    """An opened export, and its prior over the codes of a level."""

    export: Export
    prior: CodePrior


class Prior:
    """The prior of all levels of a tokenizer."""

    def __init__(self, levels: Sequence[_Level], text_tokenizer: str | Path | None) -> None:
        """Raises:
        UserError: a level is missing or there twice, or levels take captions of several lengths.
        """
        self._levels = sorted(levels, key=lambda level: level.prior.level)
        numbers, count = [level.prior.level for level in self._levels], len(levels[0].prior.grids)
        if numbers != list(range(count)):
            known = ", ".join(str(level.export.folder) for level in self._levels)
            raise UserError(
                f"{known}: priors of levels {numbers} of {count}; give that of each level 0 .. {count - 1} once"
            )
        captioned = [level for level in self._levels if level.prior.text_length]
        sizes = {(level.prior.text_length, level.prior.text_vocab) for level in captioned}
        if len(sizes) > 1:
            raise UserError(f"text_length and text_vocab: {sorted(sizes)}; priors of one tokenizer take the same")
        self.text_length, self.text_vocab = sizes.pop() if sizes else (0, 0)
        self.without_captions = all(level.prior.without_captions for level in self._levels)
        self._text_tokenizer = text_tokenizer or (captioned[0].export.part("text_tokenizer") if captioned else None)

    @property
    def folder(self) -> Path:
        """Of the first level."""
        return self._levels[0].export.folder

    @property
    def text_tokenizer(self) -> str:
        """Path or name of the tokenizer of its captions. Raises UserError where there is none."""
        if self._text_tokenizer is None:
            raise UserError(
                f"{self.folder}: holds no text tokenizer; name the one of its training with --text-tokenizer"
            )
        return str(self._text_tokenizer)

    def bits(self, codes: Tensor, text: Tensor | None = None) -> Tensor:
        """-log2 of the probability of the codes of all levels: int64 [B, N] -> fp64 [B] on the CPU.

        text: captions int64 [B, T]; None = without, for a prior that models codes `without_captions`.
        """
        bits = torch.zeros(len(codes), dtype=torch.float64)
        for level in self._levels:
            bits += level.prior.bits(codes, text if level.prior.text_length else None).cpu()
        return bits


def open_priors(
    folders: Sequence[Path],
    tokenizers: Mapping[str, tuple[Export, ImageTokenizer]],
    device: torch.device,
    text_tokenizer: str | Path | None = None,
) -> dict[str, Prior]:
    """Open exports and find whose priors they are.

    Args:
        tokenizers: by name.
        text_tokenizer: file, folder or name; None = the exports' own.

    Returns:
        name -> prior, for those that have one.

    Raises:
        UserError: an export is no prior, or that of none of these tokenizers; a level is missing.
    """
    found: dict[str, list[_Level]] = {}
    for folder in folders:
        level = _open_level(folder, device)
        for name in _owners(level, tokenizers):
            found.setdefault(name, []).append(level)
    return {name: Prior(levels, text_tokenizer) for name, levels in found.items()}


def _open_level(folder: Path, device: torch.device) -> _Level:
    opened = export.load(folder, device)
    prior = opened.stage.code_prior(opened.nets)
    if prior is None:
        raise UserError(f"{folder}: stage '{opened.name}' does not model codes; give a prior, dalle or vqvae2_prior")
    return _Level(opened, prior)


def _owners(level: _Level, tokenizers: Mapping[str, tuple[Export, ImageTokenizer]]) -> list[str]:
    """Names of the tokenizers that this is the prior of: those of the same sizes, and of the same weights as the
    tokenizer that it holds, if it holds one. Raises UserError."""
    folder, own = level.export.folder, level.export.part(UPSTREAM_PART)
    sizes = {name: _describe(tokenizer.grids, tokenizer.vocab) for name, (_, tokenizer) in tokenizers.items()}
    wanted = _describe(level.prior.grids, level.prior.vocab)
    fitting = [name for name, size in sizes.items() if size == wanted]
    if not fitting:
        there = "; ".join(f"{name} has {size}" for name, size in sizes.items()) or "none makes codes"
        raise UserError(f"{folder}: a prior of {wanted}, but {there}; evaluate the tokenizer that it was trained with")
    if own is None:
        if len(fitting) > 1:
            raise UserError(f"{folder}: does not tell which of {', '.join(fitting)} is its tokenizer; give one of them")
        return fitting
    same = [name for name in fitting if _same_weights(own, tokenizers[name][0])]
    if not same:
        raise UserError(
            f"{folder}: the prior of another tokenizer: the weights in {own} are not those of {', '.join(fitting)}; "
            "evaluate the tokenizer that it was trained with"
        )
    return same


def _describe(grids: Sequence[int], vocab: int) -> str:
    return f"{' + '.join(f'{grid} x {grid}' for grid in grids)} codes of {vocab}"


def _same_weights(copy: Path, original: Export) -> bool:
    """Whether the files of the nets are the same; a part of an export is a copy of another one."""
    files = [f"{name}.safetensors" for name in original.nets]
    return all((copy / file).exists() and filecmp.cmp(copy / file, original.folder / file, False) for file in files)
