"""Our merges are sentencepiece's merges: exactly without dropout, in distribution with it, and repeatable."""

import random
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece

from dalle_scale.data.bpe_dropout import BpeDropout, is_bpe

SYLLABLES = ["an", "ti", "dis", "est", "ab", "lish", "ment", "ar", "ian", "ism", "tri", "angle", "red", "er", "s", "qu"]


def captions(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [
        " ".join("".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 6)))
        for _ in range(count)
    ]


def train(path, kind="bpe", byte_fallback=True, vocab=420) -> sentencepiece.SentencePieceProcessor:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions(400, seed=1)),
        model_prefix=str(path),
        model_type=kind,
        vocab_size=vocab,
        byte_fallback=byte_fallback,
        normalization_rule_name="nmt_nfkc_cf",
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=f"{path}.model")


@pytest.fixture(scope="module", params=[True, False], ids=["bytes", "unknown"])
def model(request, tmp_path_factory):
    return train(tmp_path_factory.mktemp("bpe") / "m", byte_fallback=request.param, vocab=420 if request.param else 160)


def test_without_dropout_it_is_plain_encoding(model):
    sampler = BpeDropout(model)
    odd = ["", " ", "  an  ti ", "ANTI", "日本日本 an", "ünti½ ﬁ", "zzz 🎉🎉 zz", "an\ttri\nangle", "1234!"]
    for caption in captions(300, seed=2) + odd:
        assert sampler.encode(caption, 0.0, seed=0) == model.encode(caption)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_with_dropout_it_agrees_with_sentencepiece_in_distribution(model, dropout):
    sampler = BpeDropout(model)
    caption, samples = "antidisestablishmentarianism triangle", 1500
    ours = [tuple(sampler.encode(caption, dropout, seed)) for seed in range(samples)]
    theirs = [tuple(model.encode(caption, enable_sampling=True, alpha=dropout, nbest_size=-1)) for _ in range(samples)]
    for statistic in (len, lambda ids: ids[1], lambda ids: len(set(ids))):
        a, b = (np.array([statistic(ids) for ids in group], float) for group in (ours, theirs))
        error = np.sqrt((a.var() + b.var()) / samples) + 1e-9
        assert abs(a.mean() - b.mean()) < 5 * error
    assert {model.decode(list(ids)) for ids in ours} == {caption}


def test_another_process_gives_the_same_pieces(model, tmp_path):
    path = tmp_path / "m.model"
    path.write_bytes(model.serialized_model_proto())
    code = (
        "import sentencepiece, sys; from dalle_scale.data.bpe_dropout import BpeDropout\n"
        "sampler = BpeDropout(sentencepiece.SentencePieceProcessor(model_file=sys.argv[1]))\n"
        "print([sampler.encode('antidisestablishmentarianism', 0.5, seed) for seed in range(20)])"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    sampler = BpeDropout(model)
    assert result.stdout.strip() == str([sampler.encode("antidisestablishmentarianism", 0.5, s) for s in range(20)])


def test_a_unigram_model_is_told_apart(tmp_path):
    assert not is_bpe(train(tmp_path / "unigram", kind="unigram", vocab=330))
    assert is_bpe(train(tmp_path / "bpe"))
