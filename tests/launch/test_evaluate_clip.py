"""launch/evaluate_clip.py: ranks, recalls, accuracies and the best of N against plain enumeration; wrong input."""

from __future__ import annotations

import itertools
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.clips import CAPTIONS, IMAGES, NAMES, NO_CAPTION, NO_IMAGE, save_clip, write_pairs, write_samples
from support.processes import ROOT
from support.programs import run_here
from support.runs import write_images

from dalle_scale.data.decode import decode
from dalle_scale.data.manifest import Manifest
from dalle_scale.data.reader import Reader
from dalle_scale.data.transforms import square
from dalle_scale.evaluation import best_of_n as best
from dalle_scale.evaluation import clip, clip_page
from dalle_scale.evaluation.clip import Classes, Pairs
from dalle_scale.sampling import rerank
from dalle_scale.types import UserError

PROGRAM = ROOT / "launch" / "evaluate_clip.py"
run = partial(run_here, PROGRAM)
pytestmark = pytest.mark.usefixtures("one_thread")


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def pairs_of(images: torch.Tensor, texts: torch.Tensor, own: list[int], captions: list[str] | None = None) -> Pairs:
    names = captions or [f"caption {number}" for number in range(len(texts))]
    return Pairs(torch.arange(len(images)), images, names, texts, torch.tensor(own), 0)


# ---- ranks ----


@pytest.mark.parametrize("block", [1, 7 * 5, 1 << 23])
def test_ranks_are_places_in_a_sorted_list(monkeypatch, block):
    monkeypatch.setattr(clip, "_BLOCK", block)
    own = torch.randint(5, (23,), generator=torch.Generator().manual_seed(1))
    own[:5] = torch.arange(5)
    images, captions = unit(23, 4, seed=2), unit(5, 4, seed=3)
    ranks = clip.rank_pairs(images, captions, own)
    cosines = images.numpy() @ captions.numpy().T
    for image in range(23):
        order = sorted(range(5), key=lambda caption: -cosines[image, caption])
        assert order.index(own[image]) + 1 == ranks.of_captions[image]
        assert next(caption for caption in order if caption != own[image]) == ranks.rivals[image]
    for caption in range(5):
        order = sorted(range(23), key=lambda image: -cosines[image, caption])
        first = next(place for place, image in enumerate(order) if own[image] == caption)
        assert ranks.of_images[caption] == first + 1, "no image of its own stands before its best one"
    pairs = [cosines[image, own[image]] for image in range(23)]
    assert ranks.right_cosine == pytest.approx(np.mean(pairs), abs=1e-6)
    assert ranks.wrong_cosine == pytest.approx((cosines.sum() - np.sum(pairs)) / (23 * 4), abs=1e-6)


def test_a_constant_model_is_never_right():
    """All vectors equal, but for the noise that float32 leaves in them."""
    images = unit(1, 64).expand(30, -1) + 1e-8 * unit(30, 64, seed=1)
    texts = F.normalize(images[:1].expand(12, -1) + 1e-8 * unit(12, 64, seed=2), dim=1)
    pairs = pairs_of(F.normalize(images, dim=1), texts, [number % 12 for number in range(30)])
    row = clip.retrieval(pairs)
    for way, k in itertools.product(("image_to_text", "text_to_image"), (1, 5, 10)):
        assert row[f"{way}_r{k}"] == 0 < row[f"chance_{way}_r{k}"]
    classes = Classes(tuple(pairs.captions), ("{}",), "test")
    result = clip.classification(pairs, classes, texts)
    assert result["top1"] == result["top5"] == result["mean_class_accuracy"] == 0
    assert not any(name in row for name, row in result["confusion"].items()), "the diagonal is empty"


def test_a_perfect_model_is_always_right():
    own = [0, 1, 2, 2, 1, 0, 0]
    row = clip.retrieval(pairs_of(torch.eye(3)[own], torch.eye(3), own))
    assert row["image_to_text_r1"] == row["text_to_image_r1"] == 1
    assert (row["cosine_of_pairs"], row["cosine_of_others"], row["images"], row["captions"]) == (1, 0, 7, 3)


def test_equal_captions_are_right():
    """The nearest image of caption 0 is the other one that has it; a wrong one comes next."""
    images = F.normalize(torch.tensor([[1.0, 0.6], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0]]), dim=1)
    row = clip.retrieval(pairs_of(images, torch.eye(2), [0, 0, 1, 1]))
    assert row["text_to_image_r1"] == 1.0 and row["image_to_text_r1"] == 0.75


@pytest.mark.parametrize(("count", "right", "k"), [(7, 2, 1), (7, 2, 3), (6, 5, 2), (4, 1, 10)])
def test_chance_by_enumeration(count, right, k):
    draws = list(itertools.combinations(range(count), min(k, count)))
    hits = sum(any(image < right for image in sample) for sample in draws)
    assert clip._chance(count, right, k) == pytest.approx(hits / len(draws), rel=1e-12)


def test_one_caption_cannot_be_told_apart():
    with pytest.raises(UserError, match="nothing to tell apart"):
        clip.retrieval(pairs_of(unit(3, 4), unit(1, 4), [0, 0, 0]))


# ---- classes ----


def test_classification_against_a_plain_one():
    own = [number % 4 for number in range(40)]
    pairs = pairs_of(unit(40, 6, seed=4), unit(4, 6, seed=5), own, CAPTIONS)
    classes = Classes((*NAMES[:2], "unseen", NAMES[3]), ("a photo of a {}",), "test")
    vectors = unit(4, 6, seed=6)
    row = clip.classification(pairs, classes, vectors)
    there = [image for image in range(40) if own[image] != 2]  # "red truck" is no class, "unseen" no caption
    cosines = (pairs.images @ vectors.T).numpy()
    predicted = {image: int(cosines[image].argmax()) for image in there}
    top5 = [own[image] in np.argsort(-cosines[image])[:5] for image in there]
    assert (row["images"], row["images_without_class"], row["classes"]) == (30, 10, 4)
    assert row["top1"] == sum(predicted[p] == own[p] for p in there) / 30 and row["top5"] == np.mean(top5) == 1
    shares = []
    for number, name in enumerate(classes.names):
        of_class = [image for image in there if own[image] == number]
        if not of_class:
            assert row["per_class"][name] == {"images": 0, "accuracy": None} and name not in row["confusion"]
            continue
        shares.append(sum(predicted[image] == number for image in of_class) / len(of_class))
        assert row["per_class"][name] == {"images": 10, "accuracy": pytest.approx(shares[-1])}
        for other, text in enumerate(classes.names):
            count = sum(predicted[image] == other for image in of_class)
            assert row["confusion"][name].get(text, 0) == count
    assert 0 < row["top1"] < 1 and row["mean_class_accuracy"] == pytest.approx(np.mean(shares))
    assert (row["chance_top1"], row["chance_top5"]) == (0.25, 1.0)


def test_a_class_is_the_mean_of_its_prompts(tmp_path):
    [subject] = clip.open_subjects([str(save_clip(tmp_path / "clip"))], torch.device("cpu"))
    templates = ("a photo of a {}", "an image: {}", "{} it is: {}")
    classes = Classes(NAMES, templates, "test")
    vectors = clip.embed_classes(subject, classes, 8, batch=5)
    for number, name in enumerate(NAMES):
        prompts = [f"a photo of a {name}", f"an image: {name}", f"{name} it is: {name}"]
        mean = np.mean([subject.scorer.caption_vectors([prompt])[0].numpy() for prompt in prompts], axis=0)
        np.testing.assert_allclose(vectors[number], mean / np.linalg.norm(mean), atol=1e-5)
        assert np.linalg.norm(mean) < 0.999, "the prompts differ"


def test_labels_of_captions():
    classes = Classes(("frog", "ship"), ("a {}", "the {}"), "names.txt")
    assert classes.labels(["a frog", "ship", "the ship", "cat"]) == [0, 1, 1, -1]
    with pytest.raises(UserError, match=r"names.txt: 'cat' and all other captions"):
        classes.labels(["cat", "dog"])
    with pytest.raises(UserError, match="'a b' is a caption of two classes"):
        Classes(("b", "a b"), ("a {}", "a a {}"), "names.txt").labels(["b"])


def test_few_captions_are_classes():
    for captions, images, wanted in ((4, 8, True), (4, 7, False), (1, 50, False), (1001, 9999, False)):
        found = clip.caption_classes([str(n) for n in range(captions)], images, ("{}",))
        assert (found is not None) == wanted


# ---- the best of N ----


@pytest.mark.parametrize("candidates", [1, 2, 5, 8])
def test_best_of_n_by_enumeration(candidates):
    """Ranked by one score, judged by another: the mean over all subsets of what the best of each has."""
    generator = torch.Generator().manual_seed(candidates)
    keys, values = torch.randn(2, candidates, generator=generator)
    rows = [{"prompt_index": 0, "seed": number} for number in range(candidates)]
    table = best.best_of(rows, {"a": keys, "b": values})
    assert [row["best_of"] for row in table[: len(table) // 4]] == best.numbers_of(candidates)
    for row in table:
        ranked, judged = ({"a": keys, "b": values}[row[name]] for name in ("ranked_by", "judged_by"))
        subsets = itertools.combinations(range(candidates), row["best_of"])
        chosen = [float(judged[max(subset, key=lambda place: float(ranked[place]))]) for subset in subsets]
        assert row["score"] == pytest.approx(math.fsum(chosen) / len(chosen), abs=1e-6)
        assert row["standard_error"] is None and row["gain_standard_error"] is None


def test_weights_of_many_candidates():
    """Where binomial coefficients pass what a float can hold."""
    weights = best.best_of_weights(3000, 1500)
    assert float(weights.sum()) == pytest.approx(1, rel=1e-12) and float(weights[0]) == pytest.approx(0.5, rel=1e-12)
    expected = [math.comb(60 - place, 19) / math.comb(60, 20) for place in range(1, 61)]
    assert best.best_of_weights(60, 20).tolist() == pytest.approx(expected, rel=1e-12)
    assert best.best_of_weights(5, 1).tolist() == [0.2] * 5 and best.best_of_weights(5, 5).tolist() == [1, 0, 0, 0, 0]
    assert best.numbers_of(12) == [1, 2, 4, 8, 12] and best.numbers_of(8) == [1, 2, 4, 8] and best.numbers_of(1) == [1]


def test_mean_and_error_over_prompts():
    """Prompts with different numbers of candidates, in mixed order."""
    scores = {0: [0.1, 0.5, 0.3], 1: [0.9, 0.2], 2: [0.4, 0.4, 0.4, 0.8]}
    rows = [{"prompt_index": p, "seed": s, "value": v} for p, values in scores.items() for s, v in enumerate(values)]
    rows = [rows[place] for place in torch.randperm(9, generator=torch.Generator().manual_seed(0)).tolist()]
    table = best.best_of(rows, {"m": torch.tensor([row["value"] for row in rows])})
    one = [np.mean(values) for values in scores.values()]
    two = [np.mean([max(pair) for pair in itertools.combinations(values, 2)]) for values in scores.values()]
    assert [row["best_of"] for row in table] == [1, 2], "as many as the prompt with the fewest has"
    for row, values in zip(table, (one, two), strict=True):
        gains = np.subtract(values, one)
        assert row["score"] == pytest.approx(np.mean(values), abs=1e-6)
        assert row["standard_error"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(3), abs=1e-6)
        assert row["gain"] == pytest.approx(np.mean(gains), abs=1e-6)
        assert row["gain_standard_error"] == pytest.approx(np.std(gains, ddof=1) / math.sqrt(3), abs=1e-6)


def test_equal_scores_go_by_the_seed():
    rows = [{"prompt_index": 0, "seed": seed} for seed in (5, 2)]
    table = best.best_of(rows, {"m": torch.tensor([0.5, 0.5]), "j": torch.tensor([0.0, 1.0])})
    [row] = [r for r in table if (r["ranked_by"], r["judged_by"], r["best_of"]) == ("m", "j", 2)]
    assert row["score"] == 1, "the smaller seed is better, as in rerank"


# ---- the program ----


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`valid`: pairs; `samples`; `a/export`, `b/export`: models, the second trained by the other loss."""
    folder = tmp_path_factory.mktemp("evaluate_clip")
    write_pairs(folder / "valid")
    write_samples(folder / "samples")
    save_clip(folder / "a" / "export")
    save_clip(folder / "b" / "export", seed=1, loss="siglip")
    (folder / "names.txt").write_text("\n".join(NAMES))
    (folder / "templates.txt").write_text("a photo of a {}\nan image: {}\n")
    return folder


@pytest.fixture(scope="module")
def done(work: Path) -> Path:
    models = (work / "a" / "export", work / "b" / "export")
    places = ("--data", work / "valid", "--samples", work / "samples", "--out", work / "out", "--batch-size", 5)
    words = ("--classes", work / "names.txt", "--templates", work / "templates.txt")
    code, printed = run(*(word for model in models for word in ("--clip", model)), *places, *words)
    assert code == 0, printed
    return work / "out"


def numbers(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "clip.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    return found


def plain(work: Path, model: str) -> tuple[np.ndarray, list[int], rerank.Scorer]:
    """Cosines [images, 4] with the captions, each image's own, read one by one; and the scorer."""
    scorer = rerank.open_scorer(str(work / model / "export"))
    reader = Reader(Manifest.open(work / "valid"))
    there = [sample for sample in range(IMAGES) if sample not in (NO_IMAGE, NO_CAPTION)]
    own = [CAPTIONS.index(reader.read(sample, "txt").decode()) for sample in there]
    pixels = np.stack([square(decode(reader.read_image(sample)), 16) for sample in there])
    images = torch.cat([scorer.image_vectors(torch.from_numpy(image[None]).permute(0, 3, 1, 2)) for image in pixels])
    return (images @ scorer.caption_vectors(CAPTIONS).T).numpy(), own, scorer


@pytest.mark.parametrize(("place", "model"), [(0, "a"), (1, "b")])
def test_numbers_are_those_of_a_plain_computation(work, done, place, model):
    row = numbers(done)["models"][place]
    cosines, own, scorer = plain(work, model)
    nearest = cosines.argmax(axis=1)
    assert (row["name"], row["pairs"], row["pairs_lost"], row["image_size"]) == (model, 40, 2, 16)
    assert row["retrieval"]["image_to_text_r1"] == np.mean(nearest == own)
    best_images = cosines.argmax(axis=0)
    assert row["retrieval"]["text_to_image_r1"] == np.mean([own[p] == c for c, p in enumerate(best_images)])
    assert row["retrieval"]["cosine_of_pairs"] == pytest.approx(np.mean(cosines[range(40), own]), abs=1e-6)
    assert (row["classification"]["images"], row["classification"]["classes"]) == (40, 4)
    assert row["classification"]["per_class"]["red truck"]["images"] == own.count(2)
    rows = rerank.read_samples(work / "samples")
    scores = rerank.score(scorer, work / "samples", rows, 3)
    means = [float(scores[[r["prompt_index"] == p for r in rows]].mean()) for p in (0, 1)]
    [one] = [r for r in numbers(done)["best_of"] if r["ranked_by"] == r["judged_by"] == model and r["best_of"] == 1]
    assert one["score"] == pytest.approx(np.mean(means), abs=1e-6)


def test_what_was_done_stands_beside_the_numbers(work, done):
    found = numbers(done)
    assert found["protocol"]["digest"] == evaluate_digest(work / "valid") and found["protocol"]["samples"] == IMAGES
    assert found["protocol"]["classes"] == str(work / "names.txt")
    assert found["protocol"]["templates"] == ["a photo of a {}", "an image: {}"]
    digests = {row["model_sha256"] for row in found["models"]}
    assert len(digests) == 2 and all(len(digest) == 64 for digest in digests)
    assert (found["samples"]["images"], found["samples"]["prompts"]) == (13, 2)
    lost = [json.loads(line) for line in (done / "ledger.jsonl").read_text().splitlines()]
    assert sorted(int(row["key"]) for row in lost) == [NO_IMAGE, NO_CAPTION]


def evaluate_digest(folder: Path) -> str:
    [subject] = clip.open_subjects([str(folder.parent / "a" / "export")], torch.device("cpu"))
    return clip.open_pairs(folder, subject, None, 5, folder.parent / "unused.jsonl").digest


def test_tables_and_images_agree(done):
    found, text = numbers(done), (done / "clip.md").read_text()
    for row in found["models"]:
        assert f"| {row['name']} | 40 | 2 | 4 | {row['retrieval']['image_to_text_r1']:.1%} |" in text
        assert f"{row['classification']['mean_class_accuracy']:.1%} |" in text
        page = (done / f"examples_{row['name']}" / "gallery.html").read_text()
        assert page.count("<img") == 5 * 4 and all(caption in page for caption in CAPTIONS)
    lines = (done / "best_of.csv").read_text().splitlines()
    assert lines[0].startswith("ranked_by,judged_by,best_of,score") and len(lines) == 1 + 4 * len(best.numbers_of(6))
    assert float(lines[1].split(",")[3]) == found["best_of"][0]["score"]
    assert all(f"- {name}: " in text for name in clip_page.DEFINITIONS)


def test_many_captions_are_no_classes(work, tmp_path):
    """Each image has its own: retrieval only. And --limit takes the first in the order of validation."""
    write_images(tmp_path / "data", 13)
    code, printed = run(
        "--clip", work / "a/export", "--data", tmp_path / "data", "--out", tmp_path / "out", "--limit", 9
    )
    assert code == 0, printed
    found = numbers(tmp_path / "out")
    assert "classification" not in found["models"][0] and found["protocol"]["classes"] is None
    assert found["models"][0]["retrieval"]["captions"] == found["models"][0]["pairs"] == 9
    assert "best_of" not in found and not (tmp_path / "out" / "best_of.csv").exists()


def test_wrong_input_is_one_line(work, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "bad.txt").write_text("a photo of\n")
    (tmp_path / "twice.txt").write_text("a {}\na {}\n")
    (tmp_path / "other.txt").write_text("dog\nhorse\n")
    model, data, out = work / "a" / "export", ("--data", work / "valid"), ("--out", tmp_path / "out")
    for message, options in {
        "nothing to evaluate on": ("--clip", model, *out),
        "--limit: 0": ("--clip", model, *data, *out, "--limit", 0),
        "--batch-size: 0": ("--clip", model, *data, *out, "--batch-size", 0),
        "is a file": ("--clip", model, *data, "--out", tmp_path / "file"),
        "are for --data": ("--clip", model, "--samples", work / "samples", *out, "--classes", work / "names.txt"),
        "has no {} for the class": ("--clip", model, *data, *out, "--templates", tmp_path / "bad.txt"),
        "stands there twice": ("--clip", model, *data, *out, "--templates", tmp_path / "twice.txt"),
        "holds no templates": ("--clip", model, *data, *out, "--templates", tmp_path / "file"),
        "make samples with launch/sample.py": ("--clip", model, "--samples", work / "valid", *out),
        "named twice": ("--clip", model, "--clip", model, *data, *out),
        "not an export": ("--clip", work / "valid", *data, *out),
        "neither a class nor a prompt": (
            "--clip",
            model,
            *data,
            "--out",
            tmp_path / "o",
            "--classes",
            tmp_path / "other.txt",
        ),
    }.items():
        code, printed = run(*options)
        last = printed.strip().splitlines()[-1]
        assert code == 2 and last.startswith("error: ") and message in last, (message, printed)
    assert not (tmp_path / "out").exists(), "nothing is written before all is checked"
