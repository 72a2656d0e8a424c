"""Captions to tokens: id ranges, lower-casing, cutting, seeded BPE dropout, any tokenizer."""

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dalle_scale.data.text import open_text
from dalle_scale.types import UserError

CAPTION = "a small striped triangle above the green square"


WORDS = f"{CAPTION} big red blue circle plain left of on below naïve".split()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "bpe"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(rng.choices(WORDS, k=7)) for _ in range(500)),
        model_prefix=str(path),
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc_cf",
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    return f"{path}.model"


def test_tokens_are_sentencepieces_and_pads_stand_at_vocab_plus_position(model_path):
    tokenizer = open_text(model_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=model_path)
    captions = [CAPTION, "", "red", CAPTION]
    tokens = tokenizer.encode(captions, 16)
    assert tokens.dtype == torch.int64 and tokens.shape == (4, 16)
    for row, caption in zip(tokens.tolist(), captions, strict=True):
        ids = reference.encode(caption)
        assert row == ids + [tokenizer.vocab + position for position in range(len(ids), 16)]
    assert open_text(model_path, vocab=500).encode([""], 3).tolist() == [[500, 501, 502]]


def test_upper_case_makes_no_difference_and_decoding_comes_back(model_path):
    tokenizer = open_text(model_path)
    assert torch.equal(tokenizer.encode([CAPTION.upper()], 32), tokenizer.encode([CAPTION], 32))
    for caption in (CAPTION, "日本 🎉 naïve"):
        assert tokenizer.decode(tokenizer.encode([caption], 64)[0]) == caption
    assert tokenizer.truncated_samples == 0


def test_long_captions_are_cut_and_counted(model_path):
    tokenizer = open_text(model_path)
    whole = tokenizer.encode([CAPTION], 64)
    cut = tokenizer.encode([CAPTION, "red", CAPTION], 4)
    assert torch.equal(cut[0], whole[0, :4]) and tokenizer.truncated_samples == 2


def test_bpe_dropout_is_a_function_of_the_seed_alone(model_path):
    tokenizer = open_text(model_path)
    seeds = [5, 1 << 62, 5, 7, -3 % (1 << 63)]
    rows = tokenizer.encode([CAPTION] * 5, 64, dropout=0.3, seeds=seeds)
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[3])
    alone = torch.cat([tokenizer.encode([CAPTION], 64, 0.3, [seed]) for seed in reversed(seeds)]).flip(0)
    assert torch.equal(alone, rows), "whatever was encoded before"
    with ThreadPoolExecutor(2) as pool:
        threaded = list(pool.map(lambda _: tokenizer.encode([CAPTION] * 5, 64, 0.3, seeds), range(8)))
    assert all(torch.equal(result, rows) for result in threaded)
    texts = {tokenizer.decode(row) for row in rows}
    assert texts == {CAPTION}, "dropout changes the pieces, never the text"


def test_more_dropout_gives_more_pieces(model_path):
    tokenizer = open_text(model_path)

    def mean_pieces(dropout: float) -> float:
        rows = tokenizer.encode([CAPTION] * 200, 64, dropout, range(200))
        return float((rows < tokenizer.vocab).sum() / 200)

    plain, little, much = mean_pieces(0.0), mean_pieces(0.1), mean_pieces(0.5)
    assert plain < little < much
    everything = tokenizer.encode([CAPTION], 64, 1.0, [0])
    assert int((everything < tokenizer.vocab).sum()) == len(CAPTION) + 1, "no merges: one piece a character"


def test_any_hugging_face_tokenizer_is_lower_cased_and_bare(tmp_path):
    words = ["[UNK]", "[CLS]", "a", "red", "circle"]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", cls_token="[CLS]").save_pretrained(tmp_path)
    tokenizer = open_text(tmp_path)
    assert tokenizer.vocab == 5
    assert tokenizer.encode(["A RED circle", "a blue circle"], 4).tolist() == [[2, 3, 4, 8], [2, 0, 4, 8]]
    assert tokenizer.decode([2, 3, 4, 8]) == "a red circle"
    assert not tokenizer.can_drop


def test_wrong_files_get_one_line(tmp_path, model_path):
    with pytest.raises(UserError, match="no such text tokenizer"):
        open_text(tmp_path / "missing.model")
    garbage = tmp_path / "garbage.model"
    garbage.write_bytes(b"garbage")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        open_text(garbage)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="transformers cannot open"):
        open_text(tmp_path / "empty")
    with pytest.raises(UserError, match="360 tokens, the model has room for 359"):
        open_text(model_path, vocab=359)
    assert np.array_equal(open_text(model_path).encode([], 4), np.zeros((0, 4)))
