"""LPIPS against torchvision's VGG16 and the paper's formula; gradients; loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dalle_scale import config as run_config
from dalle_scale.nn.lpips import Lpips, PerceptualConfig, build_lpips, unit_features, vgg16
from dalle_scale.nn.torchvision_compat import declare_missing_operators
from dalle_scale.types import UserError

RANDOM = PerceptualConfig(kind="random")


@pytest.fixture(scope="module")
def ruler() -> Lpips:
    return build_lpips(RANDOM)


def noise_images(count: int, size: int = 20, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_architecture_is_torchvisions() -> None:
    """Names, shapes and what comes out, but for the last pooling."""
    declare_missing_operators()
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        theirs = models.vgg16(weights=None).features
        ours = vgg16()
    shapes = [[(name, tensor.shape) for name, tensor in net.state_dict().items()] for net in (ours, theirs)]
    assert shapes[0] == shapes[1]
    kinds = [[type(layer).__name__ for layer in net] for net in (ours, theirs)]
    assert kinds[0] == kinds[1][:-1] and kinds[1][-1] == "MaxPool2d"
    assert sum(p.numel() for p in ours.parameters()) == 14_714_688


def test_is_the_papers_formula(ruler: Lpips) -> None:
    """Written out with the indices of torchvision's layers, in fp64."""
    first, second = noise_images(3), noise_images(3, seed=1)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]).double(), torch.tensor([0.458, 0.448, 0.450]).double()
    want = torch.zeros(3, dtype=torch.float64)
    features = vgg16().double()
    features.load_state_dict(ruler.features.state_dict())
    for number, stop in enumerate((4, 9, 16, 23, 30)):  # after relu1_2, 2_2, 3_3, 4_3, 5_3
        units = []
        for images in (first, second):
            x = features[:stop]((images.double() - shift[:, None, None]) / scale[:, None, None])
            units.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        squares = (units[0] - units[1]).square() * ruler.heads[number].double()[:, None, None]
        want += squares.sum(dim=1).mean(dim=(1, 2)).detach()
    torch.testing.assert_close(ruler(first, second).double(), want, rtol=1e-4, atol=1e-6)


def test_is_a_distance(ruler: Lpips) -> None:
    first, second = noise_images(4), noise_images(4, seed=1)
    assert ruler(first, first).tolist() == [0] * 4
    assert (ruler(first, second) > 0.001).all()
    torch.testing.assert_close(ruler(first, second), ruler(second, first))
    nearer = ruler(first, first.lerp(second, 0.3))
    assert (nearer < ruler(first, second)).all()
    alone = torch.cat([ruler(first[i : i + 1], second[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(ruler(first, second), alone, rtol=1e-4, atol=1e-6)


def test_gradient_reaches_the_input_and_nothing_else(ruler: Lpips) -> None:
    made = noise_images(2).requires_grad_()
    ruler(made, noise_images(2, seed=1)).sum().backward()
    assert made.grad is not None and (made.grad.abs().sum(dim=(1, 2, 3)) > 0).all()
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in ruler.parameters())
    assert not ruler.training


def test_gradient_of_equal_images_is_finite(ruler: Lpips) -> None:
    """Also where all features are zero and have no direction: not only because a ReLU stands before them."""
    made = noise_images(1, 16).requires_grad_()
    distance = ruler(made, made.detach())
    distance.sum().backward()
    assert distance.item() == 0 and made.grad is not None and made.grad.isfinite().all()
    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    unit_features(features).sum().backward()
    assert features.grad is not None and features.grad.isfinite().all()


def test_fp32_whatever_comes(ruler: Lpips) -> None:
    first, second = noise_images(1, 16).to(torch.bfloat16), noise_images(1, 16, seed=1).to(torch.bfloat16)
    want = ruler(first.float(), second.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ruler(first, second)
    assert got.dtype == torch.float32 and torch.equal(got, want)


def test_random_features_are_a_function_of_the_seed(ruler: Lpips) -> None:
    state = torch.get_rng_state()
    again, other = build_lpips(RANDOM), build_lpips(PerceptualConfig(kind="random", seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.features[0].weight, ruler.features[0].weight)
    assert not torch.equal(other.features[0].weight, ruler.features[0].weight)


def write(folder: Path, safe: bool) -> tuple[PerceptualConfig, dict[str, Tensor], dict[str, Tensor]]:
    """Files of the published names and shapes, classifier and all."""
    torch.manual_seed(3)
    vgg = {f"features.{name}": tensor for name, tensor in vgg16().state_dict().items()}
    widths = (64, 128, 256, 512, 512)
    heads = {f"lin{index}.model.1.weight": torch.rand(1, width, 1, 1) for index, width in enumerate(widths)}
    suffix, store = ("safetensors", save_file) if safe else ("pth", torch.save)
    files = {"vgg": str(folder / f"vgg.{suffix}"), "heads": str(folder / f"heads.{suffix}")}
    store({**vgg, "classifier.0.weight": torch.zeros(2, 2)}, files["vgg"])
    store(heads, files["heads"])
    return PerceptualConfig(kind="lpips", **files), vgg, heads


@pytest.mark.parametrize("safe", [True, False])
def test_loading(tmp_path: Path, safe: bool) -> None:
    config, vgg, heads = write(tmp_path, safe)
    model = build_lpips(config)
    assert all(torch.equal(model.features.state_dict()[name.removeprefix("features.")], vgg[name]) for name in vgg)
    for ours, theirs in zip(model.heads, heads.values(), strict=True):
        assert torch.equal(ours, theirs.flatten())


def test_wrong_files_get_one_clear_line(tmp_path: Path) -> None:
    config, vgg, heads = write(tmp_path, safe=True)
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"x": Path("/")}, tmp_path / "pickle.pth")  # runs no code: weights_only
    save_file({**heads, "lin5": torch.zeros(1)}, tmp_path / "more.safetensors")
    save_file({name: vgg[name] for name in list(vgg)[1:]}, tmp_path / "less.safetensors")
    save_file({**heads, "lin0.model.1.weight": torch.zeros(1, 3, 1, 1)}, tmp_path / "shape.safetensors")
    for key, file, message in [
        ("vgg", "absent.pth", "no such file"),
        ("vgg", "text.pth", "neither .safetensors nor weights as torch saves them"),
        ("vgg", "pickle.pth", "neither .safetensors nor weights as torch saves them"),
        ("heads", "text.safetensors", "neither .safetensors nor weights"),
        ("heads", "list.pth", "holds a list"),
        ("vgg", "heads.safetensors", "not VGG16: 'features.0.weight' is missing"),
        ("vgg", "less.safetensors", "not VGG16: 'features.0.weight' is missing"),
        ("heads", "more.safetensors", "not the heads of LPIPS: there is a 'lin5' too many"),
        ("heads", "shape.safetensors", r"'lin0.model.1.weight' is \[1, 3, 1, 1\], expected \[1, 64, 1, 1\]"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            build_lpips(config.model_copy(update={key: str(tmp_path / file)}))
        assert "\n" not in str(caught.value) and file in str(caught.value)
    with pytest.raises(UserError, match="lpips needs the files vgg and heads"):
        run_config.parse(PerceptualConfig, {"kind": "lpips", "vgg": "x"}, "test")
