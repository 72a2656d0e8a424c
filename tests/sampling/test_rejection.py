"""Probabilities, kept sets and trade-offs against brute force; the program on a tiny untrained CLIP."""

from __future__ import annotations

import json
import math
from itertools import permutations
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.ranking import LONG, clip_export, rerank_program, write_samples
from torch import Tensor

from dalle_scale.checkpoint import export
from dalle_scale.data.text import open_text
from dalle_scale.sampling import rejection, rerank
from dalle_scale.types import UserError

CLASSES = ["a photo of a frog", "a photo of a ship", "a photo of a red car", "a photo of a cat"]
SAMPLED = [CLASSES[2], CLASSES[0], CLASSES[3]]  # not all classes, in another order
CANDIDATES, SCALE = 8, 6.0


def unit(generator: torch.Generator, *shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def sample_rows(*candidates: int) -> list[dict[str, Any]]:
    """Rows of prompts 10, 11, ... with so many candidates each; prompts take turns, seeds fall."""
    places = sorted((number, 10 + index) for index, count in enumerate(candidates) for number in range(count))
    return [
        {"prompt_index": index, "prompt": CLASSES[index - 10], "candidate": number, "seed": 1000 - place}
        for place, (number, index) in enumerate(places)
    ]


def test_probabilities_by_hand():
    generator = torch.Generator().manual_seed(0)
    images, classes, scale = unit(generator, 5, 6), unit(generator, 4, 6), 30.0
    table = rejection.class_probabilities(images, classes, scale)
    for image, row in zip(images.tolist(), table.tolist(), strict=True):
        weights = [
            math.exp(scale * sum(a * b for a, b in zip(image, other, strict=True))) for other in classes.tolist()
        ]
        assert row == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-9)


def test_sure_probabilities_stay_apart():
    """Logits ahead by 20 and by 31: in float32 both probabilities are 1."""
    images = torch.tensor([[1.0, 0.0], [math.sqrt(0.91), -0.3]])
    classes = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    poor, good = rejection.class_probabilities(images, classes, 50.0)[:, 0]
    assert poor < good < 1 and poor.float() == good.float() == 1


def test_best_count_or_share_is_kept():
    """Of prompts with five and two candidates."""
    rows = [{"prompt_index": index, "rank": rank} for index, last in ((7, 5), (3, 2)) for rank in range(1, last + 1)]

    def kept(**how: Any) -> list[int]:
        return [sum(r["kept"] for r in rerank.keep(rows, **how) if r["prompt_index"] == index) for index in (7, 3)]

    assert kept() == [1, 1] and kept(count=2) == [2, 2]
    assert kept(share=1.0) == [5, 2] and kept(share=0.5) == [3, 1] and kept(share=0.01) == [1, 1]
    assert all(row["kept"] == (row["rank"] <= 2) for row in rerank.keep(rows, count=2))


def test_share_is_the_nearest_number_and_at_least_one():
    for share, candidates, expected in (
        (1.0, 7, 7),
        (0.5, 7, 4),
        (0.25, 10, 3),
        (0.24, 10, 2),
        (0.145, 100, 15),  # a half, though not in floating point
        (0.29, 100, 29),
        (0.1, 4, 1),
        (1e-9, 4, 1),
    ):
        assert rerank.share_of(share, candidates) == expected, (share, candidates)


def test_kept_set_by_brute_force():
    """Probabilities in steps of a quarter, so that many are equal: those go by the smaller seed, whatever the order of
    the rows."""
    rows = sample_rows(9, 4, 1)
    for trial in range(20):
        generator = torch.Generator().manual_seed(trial)
        order = torch.randperm(len(rows), generator=generator).tolist()
        values = torch.randint(5, (len(rows),), generator=generator).double() / 4
        for share in (1.0, 0.6, 0.5, 0.25, 0.1):
            expected = set()
            for prompt in (10, 11, 12):
                members = [
                    (value, -row["seed"])
                    for value, row in zip(values.tolist(), rows, strict=True)
                    if row["prompt_index"] == prompt
                ]
                members.sort(reverse=True)
                expected |= {-seed for _, seed in members[: max(1, int(share * len(members) + 0.5))]}
            ranked = rerank.rank([rows[place] for place in order], values[order])
            assert {row["seed"] for row in rerank.keep(ranked, share=share) if row["kept"]} == expected


def test_trade_off_by_brute_force():
    """Classes of forty and twenty samples: the nearer to the middle of the class, the surer."""
    sizes, shares = (40, 20), {1.0: (40, 20), 0.5: (20, 10), 0.3: (12, 6), 0.25: (10, 5), 0.1: (4, 2)}
    rows = sample_rows(*sizes)
    generator = torch.Generator().manual_seed(3)
    centres = unit(generator, 2, 6)
    own = torch.tensor([row["prompt_index"] - 10 for row in rows])
    far = 3 * torch.rand(len(rows), 1, generator=generator)
    vectors = F.normalize(centres[own] + far * unit(generator, len(rows), 6), dim=1)
    table = rejection.class_probabilities(vectors, centres, 5.0)
    probabilities, right = table[torch.arange(len(rows)), own], table.argmax(dim=1) == own
    ranked = rerank.rank(rows, probabilities)
    found = rejection.trade_off(ranked, rejection.Verdicts(probabilities, right, vectors), wanted=0.3)

    best = [
        sorted(torch.nonzero(own == label)[:, 0].tolist(), key=lambda n: -float(probabilities[n])) for label in (0, 1)
    ]
    distance = (1 - vectors @ vectors.T).tolist()
    assert [row["share"] for row in found] == list(shares)
    for row, counts in zip(found, shares.values(), strict=True):
        kept = [members[:count] for members, count in zip(best, counts, strict=True)]
        assert row["kept_samples"] == sum(counts)
        assert row["probability"] == pytest.approx(fmean(fmean(probabilities[part].tolist()) for part in kept))
        assert row["accuracy"] == pytest.approx(fmean(fmean(right[part].tolist()) for part in kept))
        pairs = [[distance[i][j] for i, j in permutations(part, 2)] for part in kept]
        assert row["diversity"] == pytest.approx(fmean(map(fmean, pairs)), abs=1e-6)
    all_kept, tenth = found[0], found[-1]
    assert all_kept["accuracy"] < tenth["accuracy"] and all_kept["diversity"] > 1.5 * tenth["diversity"], (
        "the trade-off"
    )


def test_shares_that_would_keep_less_than_a_sample_are_left_out():
    rows = sample_rows(40, 4)
    verdicts = rejection.Verdicts(torch.rand(44).double(), torch.ones(44, dtype=torch.bool), torch.rand(44, 3))
    ranked = rerank.rank(rows, verdicts.probabilities)
    table = rejection.trade_off(ranked, verdicts)
    assert [row["share"] for row in table] == [1.0, 0.5, 0.25]
    assert [row["diversity"] is None for row in table] == [False, False, True], "a quarter of four has no pair"
    assert [row["share"] for row in rejection.trade_off(ranked, verdicts, 0.01)] == [1.0, 0.5, 0.25, 0.01]
    assert "diversity not defined" in rejection.lines(table)[2]
    assert rejection.lines([]) == []


def test_diversity_of_known_vectors():
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert rejection.diversity(torch.stack([east, east, east])) == pytest.approx(0)
    assert rejection.diversity(torch.stack([east, -east])) == pytest.approx(2)
    assert rejection.diversity(torch.stack([east, east, north])) == pytest.approx(2 / 3)


# ---- the program ----


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return clip_export(tmp_path_factory.mktemp("clip"), CLASSES, logit_scale=SCALE)


@pytest.fixture
def samples(tmp_path) -> Path:
    return write_samples(tmp_path / "samples", SAMPLED, CANDIDATES)


@pytest.fixture
def classes(tmp_path) -> Path:
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(CLASSES) + "\n\n")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def expected_probabilities(model: Path, rows: list[dict[str, Any]], images: Tensor) -> tuple[Tensor, Tensor]:
    """Of the right class [N] and of all [N, C], from the stage's own forward pass."""
    opened = export.load(model)
    text = open_text(opened.part("text_tokenizer"), vocab=48)
    with torch.no_grad():
        features = opened.stage.image_features(opened.nets, images)
        captions = opened.stage.text_features(opened.nets, text.encode(CLASSES, 8))
        table = torch.softmax(SCALE * features @ captions.T, dim=1)
    own = torch.tensor([CLASSES.index(row["prompt"]) for row in rows])
    return table[torch.arange(len(rows)), own], table


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_program(model, samples, classes, batch, tmp_path, monkeypatch, capsys):
    """The same with any batch size, since each is compared with the same reference."""
    out = tmp_path / "out"
    arguments = ("--samples", samples, "--clip", model, "--out", out, "--batch-size", batch, "--classes", classes)
    assert rerank_program(monkeypatch, *arguments, "--keep-share", 0.4) == 0
    printed = capsys.readouterr().out
    rows = read(out / "scores.jsonl")
    images = rerank.read_images([samples / row["file"] for row in rows])
    expected, table = expected_probabilities(model, rows, images)
    assert [row["score"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-5)
    assert expected.std() > 0.05 and (table.amax(dim=1) < 0.5).any(), "the classifier has opinions, not all strong"
    for index in range(3):
        members = sorted(range(8 * index, 8 * index + 8), key=lambda place: -float(expected[place]))
        assert [rows[place]["rank"] for place in members] == list(range(1, 9))
        assert [rows[place]["kept"] for place in members] == [True] * 3 + [False] * 5
    assert {path.name for path in (out / "best").iterdir()} == {
        f"{index:05d}_{rank:04d}.png" for index in range(3) for rank in (1, 2, 3)
    }
    document = json.loads((out / "trade_off.json").read_text())
    shares = document["shares"]
    assert [(row["share"], row["kept_samples"]) for row in shares] == [(1.0, 24), (0.5, 12), (0.4, 9), (0.25, 6)]
    assert shares[0]["probability"] == pytest.approx(float(expected.mean()), abs=1e-5)
    right = table.argmax(dim=1) == torch.tensor([CLASSES.index(row["prompt"]) for row in rows])
    assert shares[0]["accuracy"] == pytest.approx(float(right.float().mean()))
    assert document["measures"]["caveat"] == rejection.CAVEAT
    page = (out / "gallery.html").read_text()
    for line in rejection.lines(shares):
        assert line in printed and line in page
    assert page.count("<img") == 9


def test_share_one_keeps_all_and_plain_reranking_forgets_the_table(model, samples, classes, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = ("--samples", samples, "--clip", model, "--out", out)
    assert rerank_program(monkeypatch, *arguments, "--classes", classes, "--keep-share", 1) == 0
    assert all(row["kept"] for row in read(out / "scores.jsonl")) and len(list((out / "best").iterdir())) == 24
    assert (out / "trade_off.json").is_file()
    assert rerank_program(monkeypatch, *arguments) == 0
    assert not (out / "trade_off.json").exists() and sum(row["kept"] for row in read(out / "scores.jsonl")) == 3


def test_classes_of_a_jsonl_file_and_more_than_a_batch_of_them(model, samples, classes, tmp_path, monkeypatch):
    other = tmp_path / "classes.jsonl"
    other.write_text("".join(json.dumps({"prompt": caption, "x": 1}) + "\n" for caption in CLASSES))
    scores = []
    for name, file, batch in (("a", classes, 64), ("b", other, 3)):
        arguments = ("--samples", samples, "--clip", model, "--out", tmp_path / name, "--classes", file)
        assert rerank_program(monkeypatch, *arguments, "--batch-size", batch) == 0
        scores.append([row["score"] for row in read(tmp_path / name / "scores.jsonl")])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_the_cap_holds_the_scale(tmp_path):
    """The stage's loss caps the scale, the parameter may be above it."""
    folder = clip_export(tmp_path, CLASSES)
    opened = export.load(folder)
    opened.nets["model"].logit_scale.data.fill_(math.log(250.0))
    parts = {"text_tokenizer": opened.part("text_tokenizer")}
    export.save(tmp_path / "high", "clip", opened.config, {"model": opened.nets["model"].state_dict()}, parts)
    assert rerank.open_scorer(str(folder)).scale == pytest.approx(1 / 0.07)
    assert rerank.open_scorer(str(tmp_path / "high")).scale == 100.0


def test_a_long_class_is_counted(model):
    scorer = rerank.open_scorer(str(model))
    scorer.caption_vectors([*CLASSES, LONG])
    assert scorer.truncated_captions == 1


def test_program_tells_what_is_wrong(model, samples, classes, tmp_path, monkeypatch, capsys):
    def expect(message: str, text: str | None, suffix: str = "txt") -> None:
        file = tmp_path / f"some.{suffix}"
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        arguments = ("--samples", samples, "--clip", model, "--out", tmp_path / "out", "--classes", file)
        assert rerank_program(monkeypatch, *arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines
        assert not (tmp_path / "out").exists()

    expect("cannot read the classes", None)
    expect("at least two classes, one a line; the file holds 0", "\n\n")
    expect("at least two classes, one a line; the file holds 1", CLASSES[0])
    expect(f"the class '{CLASSES[1]}' stands there 2 times", "\n".join([*CLASSES, CLASSES[1]]))
    expect(
        "'a photo of a cat' is none of the 4 classes; did you mean 'photo of a cat'?",
        "\n".join([*CLASSES[:3], "photo of a cat"]),
    )
    expect("is none of the 2 classes; add it", "0123456789\nxyz")
    expect('every line must be a JSON object with a "prompt"', '{"caption": "a"}\n', "jsonl")
    expect('every line must be a JSON object with a "prompt"', "a photo\n", "jsonl")
    rows = read(samples / "samples.jsonl")
    rows[-1]["prompt"] = SAMPLED[0]
    (samples / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expect(f"prompts 0 and 2 are the same class, '{SAMPLED[0]}'; sample a class once", "\n".join(CLASSES))


def test_broken_weights_are_an_error():
    rows = sample_rows(2)
    with pytest.raises(UserError, match="is NaN: the CLIP model's weights are broken"):
        rerank.rank(rows, rejection.class_probabilities(torch.full((2, 3), torch.nan), torch.eye(3), 1.0)[:, 0])
