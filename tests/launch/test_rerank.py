"""Scores against direct calls of open_clip and transformers; the order; the program. Tiny random models, no network."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from support.ranking import (
    LONG,
    PROGRAM,
    PROMPTS,
    SCORE_ROUNDING,
    clip_export,
    noise,
    pillows,
    rerank_program,
    spread,
    write_samples,
)

from dalle_scale.checkpoint import export
from dalle_scale.nn.torchvision_compat import import_open_clip, import_transformers
from dalle_scale.sampling import rerank
from dalle_scale.types import UserError


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    return clip_export(tmp_path_factory.mktemp("clip"), PROMPTS)


@pytest.fixture(scope="module")
def open_clip_model(tmp_path_factory) -> tuple[Any, Any, Path]:
    """A model that open_clip knows as "tiny-test", its preprocessing, and the folder of its checkpoint files."""
    folder = tmp_path_factory.mktemp("open_clip")
    open_clip = import_open_clip()
    description = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / "tiny-test.json").write_text(json.dumps(description))
    open_clip.add_model_config(folder / "tiny-test.json")
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-test")
    spread(model)
    torch.save(model.state_dict(), folder / "weights.pt")
    save_file(model.state_dict(), folder / "weights.safetensors")
    return model, preprocess, folder


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory) -> Path:
    """A folder that CLIPModel and CLIPProcessor wrote."""
    folder = tmp_path_factory.mktemp("hugging_face")
    transformers = import_transformers()
    letters = [chr(number) for number in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    merges.write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(vocab=str(vocab), merges=str(merges))
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(pieces) - 2, "eos_token_id": len(pieces) - 1, "pad_token_id": len(pieces) - 1}
    config = transformers.CLIPConfig(
        text_config={**tower, **ends, "vocab_size": len(pieces), "max_position_embeddings": 32},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    spread(transformers.CLIPModel(config)).save_pretrained(folder)
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_order_is_by_score_then_seed():
    scores, seeds = [0.5, 0.9, 0.5, -1.0, 0.9], [7, 3, 2, 1, 9]
    expected = [3, 9, 2, 7, 1]
    assert [seeds[place] for place in rerank.order(torch.tensor(scores), seeds)] == expected
    pairs = list(zip(scores, seeds, strict=True))
    for trial in range(10):
        random.Random(trial).shuffle(pairs)
        shuffled = [seed for _, seed in pairs]
        order = rerank.order(torch.tensor([score for score, _ in pairs]), shuffled)
        assert [shuffled[place] for place in order] == expected


def test_nan_is_an_error():
    with pytest.raises(UserError, match="seed 4 is NaN"):
        rerank.order(torch.tensor([0.5, float("nan")]), [3, 4])


def test_ranks_are_within_a_prompt():
    rows = [{"prompt_index": index, "seed": seed} for index, seed in ((5, 1), (2, 2), (5, 3), (2, 4), (5, 5))]
    ranked = rerank.rank(rows, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.2]))
    assert [row["rank"] for row in ranked] == [3, 2, 1, 1, 2]
    assert [row["seed"] for row in ranked] == [1, 2, 3, 4, 5] and ranked[2]["score"] == pytest.approx(0.3)


def test_our_export_against_open_clip(ours):
    """The exported weights, loaded into open_clip's class by hand."""
    opened = export.load(ours)
    architecture = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 56, "width": 32, "layers": 1, "heads": 2, "pool_type": "last"},
    }
    model = import_open_clip().CustomTextCLIP(**architecture).eval()
    model.load_state_dict(load_file(ours / "model.safetensors"))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(opened.part("text_tokenizer")))
    captions = [PROMPTS[0], PROMPTS[2], PROMPTS[0]]
    tokens = torch.arange(48, 56).repeat(3, 1)
    for row, caption in enumerate(captions):
        ids = pieces.encode(caption)[:8]
        tokens[row, : len(ids)] = torch.tensor(ids)
    images = noise(3, side=16)
    with torch.no_grad():
        pixels = images.float() / 127.5 - 1
        expected = F.cosine_similarity(model.encode_image(pixels), model.encode_text(tokens))
    scorer = rerank.open_scorer(str(ours))
    torch.testing.assert_close(scorer.score(images, captions), expected)
    assert scorer.truncated_captions == 0
    for _ in range(2):
        scorer.score(images, [LONG, PROMPTS[0], LONG])
    assert scorer.truncated_captions == 1, "a caption counts once"


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_open_clip_checkpoint_against_open_clip(open_clip_model, suffix):
    model, preprocess, folder = open_clip_model
    images = noise(3)
    scorer = rerank.open_scorer(f"tiny-test:{folder}/weights.{suffix}")
    scores = scorer.score(images, PROMPTS)
    with torch.no_grad():
        pixels = torch.stack([preprocess(image) for image in pillows(images)])
        tokens = import_open_clip().get_tokenizer("tiny-test")(PROMPTS)
        expected = F.cosine_similarity(model.encode_image(pixels), model.encode_text(tokens))
        probabilities = (model.get_logits(pixels, tokens)[0]).softmax(dim=1)
    torch.testing.assert_close(scores, expected)
    cosines = scorer.image_vectors(images) @ scorer.caption_vectors(PROMPTS).T
    torch.testing.assert_close((scorer.scale * cosines).softmax(dim=1), probabilities)
    assert scorer.truncated_captions == 0 and scores.std() > 0.01
    scorer.score(images, [LONG, PROMPTS[0], PROMPTS[1]])
    assert scorer.truncated_captions == 1


def test_hugging_face_folder_against_transformers(hugging_face):
    transformers = import_transformers()
    model = transformers.CLIPModel.from_pretrained(hugging_face).eval()
    processor = transformers.CLIPProcessor.from_pretrained(hugging_face)
    images, captions = noise(3), ["red", "a cup", "red"]
    with torch.no_grad():
        inputs = processor(text=captions, images=pillows(images), return_tensors="pt", padding=True)
        expected = model(**inputs).logits_per_image.diag() / model.logit_scale.exp()
    scorer = rerank.open_scorer(str(hugging_face))
    torch.testing.assert_close(scorer.score(images, captions), expected)
    assert scorer.scale == pytest.approx(float(model.logit_scale.detach().exp()))
    assert scorer.truncated_captions == 0
    scorer.score(images, [LONG, LONG, "red"])
    assert scorer.truncated_captions == 1


def test_a_score_does_not_depend_on_its_batch(ours):
    scorer = rerank.open_scorer(str(ours))
    images = noise(6)
    captions = [PROMPTS[place % 3] for place in range(6)]
    alone = torch.cat([scorer.score(images[n : n + 1], captions[n : n + 1]) for n in range(6)])
    torch.testing.assert_close(scorer.score(images, captions), alone)


class Payload:
    """Unpickling it would run code."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_what_cannot_be_opened_is_one_line(open_clip_model, hugging_face, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = torch.load(open_clip_model[2] / "weights.pt", weights_only=True)
    torch.save({key: value for key, value in weights.items() if "visual" not in key}, tmp_path / "half.pt")
    torch.save({"state_dict": Payload()}, tmp_path / "code.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    for file in hugging_face.iterdir():
        (lacking / file.name).write_bytes(file.read_bytes())
    state = load_file(lacking / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, lacking / "model.safetensors", metadata={"format": "pt"})
    for name, message in {
        "ViT-B-23": "did you mean 'ViT-B-32'",
        "no such thing at all": "neither a folder nor a model of open_clip",
        "tiny-test": "open_clip lists none",
        "ViT-B-32:absent.pt": "published weights: openai, ",
        "tiny-test:half.pt": "open_clip cannot open it",
        "tiny-test:code.pt": "open_clip cannot open it",
        "empty": "not an export",
        "bert": "describes a 'bert' model",
        "lacking": "the weights lack visual_projection.weight",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            rerank.open_scorer(name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "unpickled").exists()


def test_only_an_export_of_clip_scores(ours, tmp_path):
    folder = tmp_path / "mute"
    opened = export.load(ours)
    export.save(folder, "clip", opened.config, {"model": opened.nets["model"].state_dict()})
    with pytest.raises(UserError, match="holds no text tokenizer"):
        rerank.open_scorer(str(folder))


# ---- the program ----


@pytest.fixture
def samples(tmp_path) -> Path:
    """Three prompts with four candidates each."""
    return write_samples(tmp_path / "samples", PROMPTS, 4)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_program(ours, samples, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ("--samples", samples, "--clip", ours, "--out", out, "--batch-size", 5)
    assert rerank_program(monkeypatch, *arguments, "--keep", 2) == 0
    assert str(out / "gallery.png") in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    images = torch.stack([torch.from_numpy(pixels(samples / row["file"]).copy()).permute(2, 0, 1) for row in rows])
    scores = rerank.open_scorer(str(ours)).score(images, [row["prompt"] for row in rows])
    assert [row["score"] for row in rows] == pytest.approx(scores.tolist(), abs=SCORE_ROUNDING)
    assert len(rows) == 12 and {path.name for path in (out / "best").iterdir()} == {
        f"{index:05d}_{rank:04d}.png" for index in range(3) for rank in (1, 2)
    }
    for index in range(3):
        members = sorted(rows[4 * index : 4 * index + 4], key=lambda row: -row["score"])
        assert [row["rank"] for row in members] == [1, 2, 3, 4]
        for row in members[:2]:
            kept = out / "best" / f"{index:05d}_{row['rank']:04d}.png"
            assert np.array_equal(pixels(kept), pixels(samples / row["file"]))
    page = (out / "gallery.html").read_text()
    assert all(prompt in page for prompt in PROMPTS) and page.count("<img") == 6

    assert rerank_program(monkeypatch, *arguments, "--keep", 1) == 0
    assert len(list((out / "best").iterdir())) == 3, "images of the earlier ranking are gone"
    assert not (out / "trade_off.json").exists()

    assert rerank_program(monkeypatch, *arguments, "--keep-share", 0.75) == 0
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert all(row["kept"] == (row["rank"] <= 3) for row in rows)
    assert len(list((out / "best").iterdir())) == 9 == (out / "gallery.html").read_text().count("<img")


def test_gallery_shows_what_all_prompts_have_and_says_so(ours, samples, tmp_path, monkeypatch):
    """Prompts with four, four and two candidates: all are kept, two are shown."""
    rows = (samples / "samples.jsonl").read_text().splitlines()
    (samples / "samples.jsonl").write_text("\n".join(rows[:10]))
    out = tmp_path / "out"
    assert rerank_program(monkeypatch, "--samples", samples, "--clip", ours, "--out", out, "--keep-share", 1) == 0
    page = (out / "gallery.html").read_text()
    assert page.count("<img") == 6 and "Up to 2 images" in page and len(list((out / "best").iterdir())) == 10


def test_program_tells_what_is_wrong(ours, samples, tmp_path, monkeypatch, capsys):
    def expect(message: str, **changes: object) -> None:
        options = {"samples": samples, "clip": ours, "out": tmp_path / "out", **changes}
        assert rerank_program(monkeypatch, *(x for key, value in options.items() for x in (f"--{key}", value))) == 2
        lines = capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1 and message in errors[0], lines
        assert not (tmp_path / "out" / "scores.jsonl").exists()

    expect("make samples with launch/sample.py", samples=tmp_path)
    expect("a prompt has only 4 candidates", keep=5)
    expect("--batch-size: 0", **{"batch-size": 0})
    expect("--keep: 0", keep=0)
    expect("--keep-share: 0,", **{"keep-share": 0})
    expect("--keep-share: 1.5,", **{"keep-share": 1.5})
    expect("--keep-share: nan,", **{"keep-share": "nan"})
    expect("not both", keep=1, **{"keep-share": 0.5})
    expect("did you mean 'ViT-B-32'", clip="ViT-B-3")
    (tmp_path / "out" / "best").mkdir(parents=True)
    expect("not from an earlier ranking")
    (tmp_path / "out" / "best").rmdir()
    Image.new("RGB", (9, 7)).save(samples / "images" / "00002_0003.png")
    expect("00002_0003.png: is 9x7, others are 16x16")
    (samples / "images" / "00001_0001.png").write_bytes(b"not an image")
    expect("00001_0001.png: cannot read the image")
    (samples / "images" / "00000_0002.png").unlink()
    expect("00000_0002.png: cannot read the image")
    with (samples / "samples.jsonl").open("a") as file:
        file.write('{"prompt": "a cup"}\n')
    expect("line 13 is not a sample; it needs prompt_index, prompt, candidate, seed, file")
    (samples / "samples.jsonl").write_text("")
    expect("holds no samples")


def test_program_runs_by_itself(tmp_path):
    """A fresh interpreter outside the repository: exit code 2 and one line, no traceback."""
    line = [sys.executable, str(PROGRAM), "--samples", "nowhere", "--clip", "x", "--out", "out"]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert (
        result.stderr
        == "error: nowhere/samples.jsonl: no such file; make samples with launch/sample.py --out nowhere\n"
    )
