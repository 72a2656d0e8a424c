"""launch/fidelity.py: numbers against plain recomputation and torch-fidelity, the protocol beside them, wrong input."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.exports import DAMAGED, save, save_dvae, write_data
from support.processes import ROOT
from support.programs import run_here
from support.runs import write_images
from support.sampled import blobs, save_clip, save_samples, values

from dalle_scale.data.decode import decode
from dalle_scale.data.manifest import Manifest
from dalle_scale.data.reader import Reader
from dalle_scale.data.transforms import square
from dalle_scale.evaluation import feature_extractors, fidelity, image_sets, result_schema
from dalle_scale.sampling import rerank
from dalle_scale.types import UserError

PROGRAM = ROOT / "launch" / "fidelity.py"
CPU = torch.device("cpu")
TOLD = {"models": ["runs/dalle/export"], "models_sha256": ["ab"], "seed": 3}
TOLD |= {"options": {"method": "ancestral", "guidance": 2.0}}
run = partial(run_here, PROGRAM)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`valid`: a data set with a damaged image; `clip/export`, `other/export`; `samples`: 30 images."""
    folder = tmp_path_factory.mktemp("fidelity")
    write_data(folder / "valid")
    save_clip(folder / "clip")
    save_clip(folder / "other", seed=1)
    save_samples(folder / "samples", blobs(30, 20), **TOLD)
    return folder


@pytest.fixture(scope="module")
def done(work: Path) -> dict[str, Any]:
    """fidelity.json of the samples against the data set."""
    options = ["--reference", work / "valid", "--clip", work / "clip/export", "--subset", 12, "--batch-size", 7]
    code, printed = run(
        "--samples", work / "samples", *options, "--out", work / "out", "--save-reference", work / "ref"
    )
    assert code == 0, printed
    return json.loads((work / "out" / "fidelity.json").read_text())


def read_all(folder: Path, size: int) -> torch.Tensor:
    """Every readable image, uint8 [44, 3, S, S], in the order of the shards."""
    reader = Reader(Manifest.open(folder))
    images = [square(decode(reader.read_image(sample)), size) for sample in range(45) if sample != DAMAGED]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def test_numbers_are_those_of_a_plain_computation(work, done):
    scorer = rerank.open_scorer(str(work / "clip" / "export"))
    x = scorer.image_vectors(blobs(30, 20)).double().numpy()
    y = scorer.image_vectors(read_all(work / "valid", 20)).double().numpy()
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    trace = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    expected = np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2) + np.trace(a) + np.trace(b) - 2 * trace
    got = values(done)
    assert expected > 0.01 and got["frechet"] == pytest.approx(expected, rel=1e-5)
    for measure, points, centres in (("precision", x, y), ("recall", y, x)):
        distances = np.linalg.norm(centres[:, None] - centres, axis=2)
        radii = np.sort(distances, axis=1)[:, 3]
        inside = np.linalg.norm(points[:, None] - centres, axis=2) <= radii
        assert got[measure] == pytest.approx(inside.any(axis=1).mean())
    kernels = [(u @ v.T / 8 + 1) ** 3 for u, v in ((x, x), (y, y), (x, y))]
    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in kernels[:2]]
    kernel = next(number for number in done["numbers"] if number["measure"] == "kernel")
    assert abs(kernel["value"] - (sum(within) - 2 * kernels[2].mean())) < 4 * kernel["std"] / 10
    assert kernel["std"] > 0 and (kernel["subsets"], kernel["subset_samples"], kernel["seed"]) == (100, 12, 2020)


def test_distances_of_another_extractor_are_not_called_fid(work, done):
    digest = feature_extractors.digest(work / "clip" / "export")
    names = [number["name"] for number in done["numbers"]]
    assert names == [f"{m}_clip({digest[:12]})" for m in ("frechet", "kernel", "precision", "recall")]
    assert done["extractor"]["sha256"] == digest != feature_extractors.digest(work / "other" / "export")


def test_only_published_weights_measure_fid():
    def name(
        measure: str, sha256: str = "6726825d" + 56 * "0", layer: str = "2048", reconstructions: bool = False
    ) -> str:
        extractor = feature_extractors.Extractor(
            "inception", "f", sha256, layer, 8, 0, "", lambda images: (images, images)
        )
        return extractor.name(measure, reconstructions)

    assert (name("frechet"), name("kernel"), name("score")) == ("fid", "kid", "inception_score")
    assert (name("frechet", reconstructions=True), name("recall", reconstructions=True)) == (
        "rfid",
        "reconstruction_recall_inception",
    )
    assert name("frechet", layer="64").startswith("frechet_inception64(6726825d")
    assert name("frechet", sha256="f" * 64) == "frechet_inception2048(ffffffffffff)"


def test_protocol_is_told(work, done):
    samples, reference = done["samples"], done["reference"]
    assert (reference["folder"], reference["split"]) == (str(work / "valid"), "valid")
    assert reference["digest"] == Manifest.open(work / "valid").digest
    assert (reference["samples"], reference["samples_lost"], samples["samples"]) == (44, 1, 30)
    assert "area-resized to 20 x 20" in reference["resize"] and samples["resize"] == "none"
    assert {key: samples["made_by"][key] for key in TOLD} == TOLD
    assert samples["made_by"]["step"] == "unknown" and samples["made_by"]["kept"] == "all"
    assert set(samples["made_by"]) == set(result_schema.MADE_BY)
    rows = [json.loads(line) for line in (work / "out" / "ledger.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == ["00025"]


def test_markdown_tells_every_number_and_field(work, done):
    text = (work / "out" / "fidelity.md").read_text()
    for number in done["numbers"]:
        [line] = [line for line in text.splitlines() if line.startswith(f"| {number['name']} |")]
        assert f"| {number['value']:.6g} |" in line and f"| {number['samples']} |" in line
    assert "made by options method: ancestral" in text and done["reference"]["digest"] in text
    assert "subset samples 12" in text and "bicubic" in text


def paths(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every field at any depth."""
    for key, inner in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        if isinstance(tree, dict):
            yield (*at, key)
        yield from paths(inner, (*at, key))


def test_result_with_a_field_missing_is_refused(work, done, tmp_path):
    assert result_schema.read(work / "out" / "fidelity.json").model_dump(mode="json") == done
    fields = [path for path in paths(done) if "options" not in path[:-1]]  # each stage has its own
    assert len(fields) > 60
    for path in fields:
        broken = copy.deepcopy(done)
        inner = broken
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        (tmp_path / "fidelity.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match="not a whole result"):
            result_schema.read(tmp_path / "fidelity.json")
    (tmp_path / "fidelity.json").write_text(json.dumps({**done, "also": 1}))
    with pytest.raises(UserError, match="also"):
        result_schema.read(tmp_path / "fidelity.json")


def test_saved_reference_gives_the_same_numbers(work, done, tmp_path):
    options = ["--samples", work / "samples", "--clip", work / "clip/export", "--subset", 12, "--batch-size", 7]
    code, printed = run(*options, "--reference", work / "ref", "--out", tmp_path)
    assert code == 0, printed
    assert json.loads((tmp_path / "fidelity.json").read_text()) == done


def test_samples_without_a_record_are_of_unknown_origin(work, tmp_path):
    folder = save_samples(tmp_path / "samples", blobs(12, 20))
    made_by = image_sets.open_samples(folder, None, 4).about.made_by
    assert set(made_by.values()) == {"unknown", "all"} and set(made_by) == set(result_schema.MADE_BY)
    (folder / "sampling.json").write_text("[1]")
    with pytest.raises(UserError, match="not a JSON object"):
        image_sets.open_samples(folder, None, 4)


def test_what_a_reranking_kept(work, tmp_path):
    rows = rerank.read_samples(work / "samples")
    scores = tmp_path / "scores.jsonl"
    scores.write_text("".join(json.dumps({**row, "kept": row["candidate"] == 1}) + "\n" for row in rows))
    source = image_sets.open_samples(work / "samples", None, 4, scores)
    read = torch.cat([images[good] for images, good in source.read(CPU)])
    assert torch.equal(read, blobs(30, 20)[1::2]) and source.about.made_by["kept"].startswith("15 by ")
    scores.write_text("".join(json.dumps({**row, "kept": True}) + "\n" for row in rows[1:]))
    with pytest.raises(UserError, match="other samples"):
        image_sets.open_samples(work / "samples", None, 4, scores)


@pytest.mark.parametrize("batch", [1, 30, 64])
def test_batch_size_does_not_matter(work, done, batch):
    extractor = feature_extractors.open_clip(str(work / "clip" / "export"), CPU)
    sources = [
        image_sets.open_samples(work / "samples", None, batch),
        image_sets.open_data(work / "valid", 20, None, batch, work / "ledger.jsonl"),
    ]
    samples, reference = (fidelity.collect(source, extractor, CPU) for source in sources)
    result = fidelity.compare(samples, reference, extractor, ["frechet", "neighbours"], 12, batch)
    for number in result.numbers:
        assert number.value == pytest.approx(values(done)[number.measure], rel=1e-4)


def test_limits_and_what_stays_in_memory(work, monkeypatch):
    monkeypatch.setattr(fidelity, "KEPT", 10)
    extractor = feature_extractors.open_clip(str(work / "clip" / "export"), CPU)
    got = fidelity.collect(image_sets.open_samples(work / "samples", 25, 8), extractor, CPU)
    expected = extractor.extract(blobs(30, 20)[:25])[0]
    torch.testing.assert_close(got.features, expected[:10])
    np.testing.assert_allclose(got.covariance, np.cov(expected.double().numpy(), rowvar=False), rtol=1e-4, atol=1e-9)
    assert got.about.samples == 25


def test_reconstructions_against_their_originals(work, tmp_path):
    save(tmp_path / "exact", "support.exact", size=24)
    save_dvae(tmp_path / "dvae")
    got = {}
    for name in ("exact", "dvae"):
        options = ["--samples", work / "valid", "--reference", work / "valid", "--clip", work / "clip/export"]
        code, printed = run(
            *options, "--reconstruct", tmp_path / name, "--subset", 44, "--out", tmp_path / f"{name}_out"
        )
        assert code == 0, printed
        got[name] = json.loads((tmp_path / f"{name}_out" / "fidelity.json").read_text())
    assert abs(values(got["exact"])["frechet"]) < 1e-12 < 1e-3 < values(got["dvae"])["frechet"]
    assert values(got["exact"])["precision"] == values(got["exact"])["recall"] == 1
    assert all(number["name"].startswith("reconstruction_") for number in got["dvae"]["numbers"])
    samples = got["dvae"]["samples"]
    assert (samples["kind"], samples["image_size"]) == ("reconstructions", 32)
    assert samples["made_by"] == {
        "model": str(tmp_path / "dvae"),
        "model_sha256": feature_extractors.digest(tmp_path / "dvae"),
    }


def test_a_data_set_against_another(work, tmp_path):
    write_images(tmp_path / "train", 30, seed=9)
    options = [
        "--reference",
        work / "valid",
        "--clip",
        work / "clip/export",
        "--measures",
        "frechet",
        "--out",
        tmp_path,
    ]
    code, printed = run("--samples", tmp_path / "train", "--image-size", 16, *options)
    assert code == 0, printed
    document = json.loads((tmp_path / "fidelity.json").read_text())
    assert document["samples"]["made_by"] == {} and document["samples"]["image_size"] == 16
    assert values(document)["frechet"] > 0


def test_features_that_are_not_finite(work):
    broken = feature_extractors.Extractor(
        "clip",
        "x",
        "0",
        "",
        2,
        0,
        "",
        lambda images: (torch.full((len(images), 2), torch.nan), torch.zeros(len(images), 0)),
    )
    with pytest.raises(UserError, match="not finite"):
        fidelity.collect(image_sets.open_samples(work / "samples", None, 8), broken, CPU)


WRONG = {
    "frechet of too few": ("--limit-reference 8", "reference: 8 images, but features of 8 dimensions"),
    "samples too few": ("--limit 7", "samples: 7 images, but features of 8 dimensions"),
    "subset too large": ("--subset 31", "samples subsets of 31"),
    "no neighbours": ("--limit 3 --measures neighbours", "3 nearest neighbours"),
    "no classifier": ("--measures score", "needs a classifier"),
    "size of samples": ("--image-size 32", "the images have 20"),
    "no size": ("--samples {work}/valid", "--image-size: name the side"),
    "reconstruct samples": ("--reconstruct {work}/clip/export", "not an image tokenizer"),
    "scores of data": ("--samples {work}/valid --scores x --image-size 8", "scores are of samples"),
    "no samples": ("--samples {work}/clip", "samples.jsonl: no such file"),
    "no reference": ("--reference {work}/nothing", "nothing"),
    "reference is an image": ("--reference {work}/samples/images/00000_0000.png", "cannot read the statistics"),
    "other extractor": ("--reference {work}/ref --clip {work}/other/export", "name the data set, or the same weights"),
    "finished statistics": ("--reference {work}/ref --limit-reference 9", "--limit-reference: goes with a data set"),
    "batch": ("--batch-size 0", "--batch-size: 0"),
    "clip from the network": ("--clip ViT-B-32:openai", "nothing is downloaded"),
    "out is a file": ("--out {work}/ref", "is a file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_one_line(work, done, tmp_path, name):
    options, message = WRONG[name]
    line = {"--samples": work / "samples", "--reference": work / "valid", "--clip": work / "clip/export"}
    line |= {"--out": tmp_path / "out", "--subset": 12}
    extra = options.format(work=work).split()
    code, printed = run(*(part for pair in line.items() for part in pair), *extra)
    assert code == 2 and printed.startswith("error: ") and printed.count("\n") == 1, printed
    assert message in printed and not (tmp_path / "out" / "fidelity.json").exists()


def test_saved_reference_of_other_sizes(work, done, tmp_path):
    save_samples(tmp_path / "samples", blobs(30, 16))
    options = ["--reference", work / "ref", "--clip", work / "clip/export", "--out", tmp_path / "out", "--subset", 12]
    code, printed = run("--samples", tmp_path / "samples", *options)
    assert code == 2 and "of images of 20 pixels, the samples have 16" in printed


def test_samples_of_two_sizes_and_oblong_ones(work, tmp_path):
    folder = save_samples(tmp_path / "two", blobs(8, 20))
    small = save_samples(tmp_path / "small", blobs(8, 16))
    for file in ("images/00002_0000.png", "images/00002_0001.png"):
        shutil.copy(small / file, folder / file)
    source = image_sets.open_samples(folder, None, 2)
    with pytest.raises(UserError, match=r"00002_0000.png: another size than images/00000_0000.png"):
        list(source.read(CPU))
    save_samples(tmp_path / "oblong", blobs(4, 20)[:, :, :10])
    with pytest.raises(UserError, match="20 x 10"):
        image_sets.open_samples(tmp_path / "oblong", None, 2)
