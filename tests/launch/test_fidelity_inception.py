"""launch/fidelity.py on FID's Inception: net and numbers are torch-fidelity's, foreign weights are refused."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.processes import ROOT
from support.programs import run_here
from support.runs import write_images
from support.sampled import blobs, save_samples, values
from torch import nn

from dalle_scale.data.decode import decode
from dalle_scale.data.manifest import Manifest
from dalle_scale.data.reader import Reader
from dalle_scale.evaluation import feature_extractors
from dalle_scale.evaluation.metrics import distribution
from dalle_scale.nn.torchvision_compat import declare_missing_operators
from dalle_scale.types import UserError

PROGRAM = ROOT / "launch" / "fidelity.py"
CPU = torch.device("cpu")
run = partial(run_here, PROGRAM)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """weights.pth and weights.safetensors: the names and shapes of FID's Inception, random values."""
    declare_missing_operators()
    pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed: no Inception")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        model = FeatureExtractorInceptionV3("random", ["2048"])
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    nn.init.normal_(model.fc.weight, std=0.05)
    folder = tmp_path_factory.mktemp("inception")
    torch.save(model.state_dict(), folder / "weights.pth")
    save_file(model.state_dict(), folder / "weights.safetensors")
    return folder


def test_inception_is_that_of_torch_fidelity(inception):
    """Features and logits of its own class on its own way of loading; and the numbers made of them."""
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = blobs(3, 24)
    model = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(inception / "weights.pth"))
    with torch.no_grad():
        expected = model(images)
    for suffix in ("pth", "safetensors"):
        extractor = feature_extractors.open_inception(inception / f"weights.{suffix}", "2048", CPU)
        found = extractor.extract(images)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        assert found[0].std() > 0.01 and found[1].std() > 0.01
        assert (extractor.dimensions, extractor.classes) == (found[0].shape[1], found[1].shape[1]) == (2048, 1008)

    x, y = torch.randn(60, 20) + 0.5, torch.randn(70, 20)
    quiet = {"verbose": False}
    theirs = metric_kid.kid_features_to_metric(x, y, kid_subsets=5, kid_subset_size=30, rng_seed=2020, **quiet)
    ours = torch.tensor(list(distribution.kernel_distances(x, y, 30, 5, 2020)))
    assert float(ours.mean()) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4), "theirs in fp32"
    assert float(ours.std(correction=0)) == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-4)
    theirs = metric_isc.isc_features_to_metric(x, splits=10, rng_seed=2020)
    assert float(distribution.inception_scores(x, 10, 2020).mean()) == pytest.approx(theirs["inception_score_mean"])
    theirs = metric_prc.prc_features_to_metric(x, y, **quiet)
    assert distribution.covered_share(x, y, distribution.neighbour_radii(y, 3)) == pytest.approx(theirs["precision"])
    assert distribution.covered_share(y, x, distribution.neighbour_radii(x, 3)) == pytest.approx(theirs["recall"])
    sets = [metric_fid.fid_features_to_statistics(features) for features in (x.double(), y.double())]
    both = [torch.from_numpy(values) for one in sets for values in (one["mu"], one["sigma"])]
    theirs = metric_fid.fid_statistics_to_metric(*sets, False)
    assert distribution.frechet_distance(*both) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)


def test_program_on_the_inception(inception, tmp_path):
    """Against torch-fidelity's own program on the same images; the 64 channels come early and cost little."""
    torch_fidelity = pytest.importorskip("torch_fidelity")
    save_samples(tmp_path / "samples", blobs(10, 8))
    write_images(tmp_path / "valid", 10)
    weights = inception / "weights.pth"
    options = ["--inception", weights, "--layer", 64, "--measures", "kernel", "--subset", 10, "--batch-size", 5]
    options += ["--samples", tmp_path / "samples", "--reference", tmp_path / "valid", "--out", tmp_path / "out"]
    code, printed = run(*options)
    assert code == 0, printed
    got = json.loads((tmp_path / "out" / "fidelity.json").read_text())

    reader = Reader(Manifest.open(tmp_path / "valid"))
    real = torch.from_numpy(np.stack([decode(reader.read_image(sample)) for sample in range(10)])).permute(0, 3, 1, 2)
    theirs = torch_fidelity.calculate_metrics(
        input1=Listed(blobs(10, 8)),
        input2=Listed(real),
        kid=True,
        kid_subsets=2,
        kid_subset_size=10,
        feature_layer_kid="64",
        feature_extractor_weights_path=str(weights),
        cuda=False,
        verbose=False,
        cache=False,
        save_cpu_ram=True,
    )
    assert values(got)["kernel"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert got["numbers"][0]["name"] == f"kernel_inception64({feature_extractors.digest(weights)[:12]})"
    assert "299 x 299" in got["extractor"]["resize"]


class Listed(torch.utils.data.Dataset):
    """Images as torch-fidelity takes them."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> torch.Tensor:
        return self.images[place]


class Payload:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def test_weights_are_read_without_running_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Payload()}, "weights.pth")
    with pytest.raises(UserError, match="nor weights as torch saves them"):
        feature_extractors.open_inception(Path("weights.pth"), "2048", CPU)
    torch.save([torch.zeros(1)], "weights.pth")
    with pytest.raises(UserError, match="state_dict"):
        feature_extractors.open_inception(Path("weights.pth"), "2048", CPU)
    assert not Path("ran").exists()


def test_other_weights_are_not_the_inception(inception, tmp_path):
    state = load_file(inception / "weights.safetensors")
    del state["Mixed_5b.branch1x1.conv.weight"]
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(UserError, match=r"not the Inception of FID: .*Mixed_5b.branch1x1.conv.weight"):
        feature_extractors.open_inception(tmp_path / "short.safetensors", "2048", CPU)


def test_without_torch_fidelity_the_line_says_what_to_install(tmp_path, monkeypatch):
    torch.save({}, tmp_path / "weights.pth")
    for name in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'dalle_scale\[eval\]'"):
        feature_extractors.open_inception(tmp_path / "weights.pth", "2048", CPU)
