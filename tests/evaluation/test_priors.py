"""What codes cost: against the sampling path of the same nets, code by code, and summed over all codes there can be."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from support.exports import save, save_dvae
from support.priors import DALLE, PIXELSNAIL, TEXT, save_prior, save_text
from torch import Tensor

from dalle_scale.checkpoint import export
from dalle_scale.evaluation.code_priors import open_priors
from dalle_scale.types import UserError

CPU = torch.device("cpu")
TEXTS = torch.tensor([[5, 7, 9, 43, 44, 45], [1, 2, 3, 4, 5, 6], [30, 41, 42, 43, 44, 45]])
EMPTY = torch.arange(40, 46).expand(3, -1)


class Sizes:
    """What a tokenizer says of itself."""

    image_size = 16

    def __init__(self, vocab: int, *grids: int) -> None:
        self.vocab, self.grids = vocab, grids


def priors_of(folders: list[Path], **tokenizers: Sizes):
    """As `open_priors`, for tokenizers without weights."""
    return open_priors(folders, {name: (None, sizes) for name, sizes in tokenizers.items()}, CPU)


def all_codes(vocab: int, count: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(vocab), repeat=count)))


@torch.no_grad()
def drawn_bits(folder: Path, codes: Tensor, text: Tensor | None, upper: Tensor | None = None) -> Tensor:
    """-log2 of the probability with which the net would sample the codes [B, N] one after the other, fp64 [B]."""
    model = export.load(folder).nets["model"]
    transformer = hasattr(model, "image_head")
    if transformer:
        text = torch.empty(len(codes), 0, dtype=torch.int64) if text is None else text
        logits, state = model.prefill(text, torch.arange(len(codes)))
    else:
        state = model.prefill(len(codes), upper, text)
    bits = torch.zeros(len(codes), dtype=torch.float64)
    for index in range(codes.shape[1]):
        if not transformer:
            logits = model.decode_step(codes[:, index - 1] if index else None, state)
        shares = logits.double().exp()
        bits -= torch.log2(shares.gather(1, codes[:, index, None])[:, 0] / shares.sum(1))
        if transformer and index + 1 < codes.shape[1]:
            logits = model.decode_step(codes[:, index], index, state)
    return bits


@pytest.mark.parametrize("changes", [{}, {"caption_dropout": 0.1}, {"text_length": 0}], ids=str)
def test_transformer_code_by_code(tmp_path, changes):
    folder = save_prior(tmp_path / "prior", "dalle", image_vocab=13, grid=3, **{**DALLE, **changes})
    prior = priors_of([folder], it=Sizes(13, 3))["it"]
    codes = torch.randint(13, (3, 9), generator=torch.Generator().manual_seed(0))
    captions = prior.text_length > 0
    assert prior.without_captions == bool(changes)
    plain, want = prior.bits(codes), drawn_bits(folder, codes, EMPTY if captions else None)
    assert plain.dtype == torch.float64
    torch.testing.assert_close(plain, want, rtol=1e-6, atol=0)
    assert (plain - 9 * math.log2(13)).abs().max() > 1, "this prior is not the uniform one"
    if captions:
        given = prior.bits(codes, TEXTS)
        torch.testing.assert_close(given, drawn_bits(folder, codes, TEXTS), rtol=1e-6, atol=0)
        assert (given - plain).abs().min() > 1e-3


@pytest.mark.parametrize("text", [None, TEXTS[:1]], ids=["empty", "caption"])
def test_transformer_over_all_codes(tmp_path, text):
    folder = save_prior(tmp_path / "prior", "dalle", image_vocab=4, grid=2, caption_dropout=0.1, **DALLE)
    codes = all_codes(4, 4)
    bits = priors_of([folder], it=Sizes(4, 2))["it"].bits(codes, text if text is None else text.expand(256, -1))
    assert float((2**-bits).sum()) == pytest.approx(1, abs=1e-5)


def levels(folder: Path, vocab: int, grids: list[int], captioned: int = 1) -> list[Path]:
    """Priors of each level; one of them takes captions."""
    paths = []
    for level in range(len(grids)):
        text = TEXT if level == captioned else {}
        sizes = {"vocab": vocab, "grids": grids, "level": level, **text}
        paths.append(save_prior(folder / f"level{level}", "vqvae2_prior", **PIXELSNAIL, **sizes))
    return paths


def test_levels_code_by_code(tmp_path):
    paths = levels(tmp_path, 7, [2, 4])
    prior = priors_of(paths[::-1], it=Sizes(7, 2, 4))["it"]
    assert not prior.without_captions and prior.text_length == 6
    codes = torch.randint(7, (3, 20), generator=torch.Generator().manual_seed(0))
    top = drawn_bits(paths[0], codes[:, :4], None)
    bottom = drawn_bits(paths[1], codes[:, 4:], TEXTS, codes[:, :4])
    torch.testing.assert_close(prior.bits(codes, TEXTS), top + bottom, rtol=1e-6, atol=0)
    assert bottom.min() > 1 and top.min() > 1


def test_levels_over_all_codes(tmp_path):
    prior = priors_of(levels(tmp_path, 3, [1, 2], captioned=9), it=Sizes(3, 1, 2))["it"]
    assert prior.without_captions
    assert float((2 ** -prior.bits(all_codes(3, 5))).sum()) == pytest.approx(1, abs=1e-5)


def test_a_prior_finds_its_tokenizer_by_the_weights(tmp_path):
    first, second = save_dvae(tmp_path / "one", image_size=16), save_dvae(tmp_path / "two", image_size=16)
    weights = (second / "model.safetensors").read_bytes()
    (second / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    opened = {path.name: (export.load(path), export.open_tokenizer(path)) for path in (first, second)}
    sizes = {"image_vocab": 64, "grid": 4, "caption_dropout": 0.1, **DALLE}
    of_second = save_prior(tmp_path / "prior", "dalle", {"tokenizer": second}, **sizes)
    assert list(open_priors([of_second], opened, CPU)) == ["two"]
    with pytest.raises(UserError, match=r"prior of another tokenizer: the weights in .* are not those of one;"):
        open_priors([of_second], {"one": opened["one"]}, CPU)
    bare = save_prior(tmp_path / "bare", "dalle", **sizes)
    assert list(open_priors([bare], {"one": opened["one"]}, CPU)) == ["one"]
    with pytest.raises(UserError, match="does not tell which of one, two is its tokenizer"):
        open_priors([bare], opened, CPU)


def test_wrong_priors_are_told(tmp_path):
    top, bottom = levels(tmp_path, 7, [2, 4])
    dalle = save_prior(tmp_path / "dalle", "dalle", image_vocab=13, grid=3, **DALLE)
    other = {"vocab": 7, "grids": [2, 4], "level": 0, "text_length": 5, "text_vocab": 40}
    shorter = save_prior(tmp_path / "shorter", "vqvae2_prior", **PIXELSNAIL, **other)
    two = {"two": Sizes(7, 2, 4)}
    for message, folders, tokenizers in (
        (r"a prior of 3 x 3 codes of 13, but two has 2 x 2 \+ 4 x 4 codes of 7; evaluate the tokenizer", [dalle], two),
        ("a prior of 3 x 3 codes of 13, but it has 3 x 3 codes of 12;", [dalle], {"it": Sizes(12, 3)}),
        ("but none makes codes", [dalle], {}),
        (r"priors of levels \[0\] of 2; give that of each level 0 \.\. 1 once", [top], two),
        (r"priors of levels \[0, 0, 1\] of 2", [top, top, bottom], two),
        (r"priors of levels \[0, 0\] of 1", [dalle, dalle], {"it": Sizes(13, 3)}),
        ("text_length and text_vocab", [shorter, bottom], two),
        ("stage 'support.exact' does not model codes", [save(tmp_path / "exact", "support.exact")], two),
        ("no such export folder", [tmp_path / "none"], two),
    ):
        with pytest.raises(UserError, match=message):
            priors_of(folders, **tokenizers)


def test_text_tokenizer(tmp_path):
    text = save_text(tmp_path)
    sizes = {"image_vocab": 13, "grid": 3, **DALLE}
    bare = save_prior(tmp_path / "bare", "dalle", **sizes)
    whole = save_prior(tmp_path / "whole", "dalle", {"text_tokenizer": text}, **sizes)
    tokenizers = {"it": (None, Sizes(13, 3))}
    assert open_priors([whole], tokenizers, CPU)["it"].text_tokenizer == str(whole / "text_tokenizer.model")
    assert open_priors([bare], tokenizers, CPU, "mine")["it"].text_tokenizer == "mine"
    with pytest.raises(UserError, match="holds no text tokenizer; name the one of its training with --text-tokenizer"):
        _ = open_priors([bare], tokenizers, CPU)["it"].text_tokenizer
