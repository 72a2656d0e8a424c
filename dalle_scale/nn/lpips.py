"""LPIPS: how different two images look (Zhang et al., arXiv 1801.03924, "lin" with VGG16, version 0.1).

Features of VGG16 after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, each position scaled to unit length; squared
differences, weighted by one non-negative number a channel, averaged over positions and summed over the five layers.

A ruler, not a part of what is trained: frozen, fp32 whatever the nets run in, in no engine, checkpoint or export. The
weights come from files on this machine; nothing is downloaded. Without files there are random features, on which
distances mean something too, if less: they see edges and textures, but were never trained to weigh them.

VGG16 is spelled out here (its layers carry torchvision's names), because torchvision would take seconds to import. The
packages lpips and torchmetrics have the same values, but download the trunk, take files that do not fit, and compute in
16 bits under autocast (tests/nn/test_library_metrics.py).
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from pydantic import model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dalle_scale.nn.blocks import no_autocast
from dalle_scale.types import StrictModel, UserError

WIDTHS = (64, 128, 256, 512, 512)  # channels of the five groups
DEPTHS = (2, 2, 3, 3, 3)  # convolutions of each
SMALLEST_PIXELS = 2 ** (len(WIDTHS) - 1)  # side of an image of which the last group still sees a pixel
# Mean and standard deviation of ImageNet where pixels span -1 .. 1, with the digits of the published weights
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
_EPS = 1e-10  # below the square root of the length: its derivative at 0 is infinite


class PerceptualConfig(StrictModel):
    """Features that the distance is measured on."""

    kind: Literal["lpips", "random", "none"] = "lpips"
    # lpips: files on this machine, .safetensors or torch's own. VGG16 as torchvision publishes it (vgg16-397923af.pth)
    vgg: str | None = None
    heads: str | None = None  # lpips: the five rows of weights, as published (lpips/weights/v0.1/vgg.pth)
    seed: int = 0  # random: of the features

    @model_validator(mode="after")
    def _has_files(self) -> PerceptualConfig:
        if self.kind == "lpips" and (self.vgg is None or self.heads is None):
            raise ValueError("lpips needs the files vgg and heads; without files take kind: random, or none")
        return self


class Lpips(nn.Module):
    """Distance of two images: fp32 [B, 3, H, W] in -1 .. 1, twice -> fp32 [B], 0 or more. H and W from 16 pixels.

    Takes no gradient itself but hands one on to its inputs, finite for equal images too.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = vgg16()
        self.heads = nn.ParameterList([nn.Parameter(torch.full((width,), 1 / len(WIDTHS))) for width in WIDTHS])
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        assert first.shape[-1] >= SMALLEST_PIXELS and first.shape[-2] >= SMALLEST_PIXELS
        with no_autocast(first.device.type):
            distance = first.new_zeros(len(first), dtype=torch.float32)
            layers = zip(self._layers(first), self._layers(second), self.heads, strict=True)
            for one, other, head in layers:
                distance = distance + torch.einsum("bchw,c->bhw", (one - other).square(), head).mean(dim=(1, 2))
            return distance

    def _layers(self, images: Tensor) -> list[Tensor]:
        """Unit features of the five layers, [B, C, h, w] each."""
        x, found = (images.float() - self.shift) / self.scale, []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):  # what goes into a pooling is the last of its group
                found.append(unit_features(x))
            x = layer(x)
        return [*found, unit_features(x)]


def unit_features(x: Tensor) -> Tensor:
    """Each position's channels at length 1: [B, C, h, w] -> the same."""
    return x * torch.rsqrt(x.square().sum(dim=1, keepdim=True) + _EPS)


def vgg16() -> nn.Sequential:
    """The convolutions of VGG16 (arXiv 1409.1556, configuration D) without the last pooling, numbered as torchvision's
    `vgg16().features`; random weights."""
    layers: list[nn.Module] = []
    before = 3
    for width, depth in zip(WIDTHS, DEPTHS, strict=True):
        layers += [nn.MaxPool2d(2)] if layers else []
        for _ in range(depth):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
    return nn.Sequential(*layers)


def build_lpips(config: PerceptualConfig, device: torch.device | str = "cpu") -> Lpips:
    """The ruler that a config describes (not for kind "none"), ready to use.

    Raises:
        UserError: a file is missing, not readable, or holds something else.
    """
    assert config.kind != "none"
    with torch.random.fork_rng(devices=[]):  # fresh weights draw random numbers; the run's stream stays as it was
        model = Lpips()
    if config.kind == "random":
        _randomise(model.features, config.seed)
    else:
        assert config.vgg is not None and config.heads is not None
        saved = _read(config.vgg)
        wanted = {f"features.{name}": tensor for name, tensor in model.features.state_dict().items()}
        _fill(wanted, {key: value for key, value in saved.items() if key.startswith("features.")}, config.vgg, "VGG16")
        rows = {f"lin{i}.model.1.weight": head.data[None, :, None, None] for i, head in enumerate(model.heads)}
        _fill(rows, _read(config.heads), config.heads, "the heads of LPIPS")
    return model.to(device)


@torch.no_grad()
def _randomise(features: nn.Sequential, seed: int) -> None:
    """He initialization from one seed, biases 0: the activations keep their size through the depth."""
    generator = torch.Generator().manual_seed(seed)
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            fan_in = layer.weight[0].numel()
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * (2 / fan_in) ** 0.5)
            assert layer.bias is not None
            layer.bias.zero_()


def _read(path: str) -> dict[str, Any]:
    """The tensors of a file by name."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; it should hold weights of the perceptual loss")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        raise UserError(f"{path}: neither .safetensors nor weights as torch saves them") from None
    if not isinstance(saved, dict):
        raise UserError(f"{path}: holds a {type(saved).__name__}; expected a state_dict, names and tensors")
    return saved


@torch.no_grad()
def _fill(wanted: dict[str, Tensor], saved: dict[str, Any], path: str, what: str) -> None:
    """Copy tensors of the same names and shapes; none may be missing or left over."""
    for key in [*wanted, *saved]:
        if key not in wanted:
            raise UserError(f"{path}: not {what}: there is a '{key}' too many")
        value = saved.get(key)
        shape = list(value.shape) if isinstance(value, Tensor) else "missing"
        if shape != list(wanted[key].shape):
            raise UserError(f"{path}: not {what}: '{key}' is {shape}, expected {list(wanted[key].shape)}")
    for key, tensor in wanted.items():
        tensor.copy_(saved[key])
