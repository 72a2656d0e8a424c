"""The inference artifact: one folder that holds everything a trained stage needs, readable without deepspeed.

    export/
        config.yaml         format, stage, model (the stage's Config), nets, parts, trained
        <net>.safetensors   one file a net: parameters and buffers as `state_dict` names them, fp32
        <part>...           copies of what the model depends on: text tokenizer, export of the image tokenizer

No pickle: weights are safetensors, the rest is YAML.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dalle_scale import stages
from dalle_scale.checkpoint import convert
from dalle_scale.config import parse
from dalle_scale.io import replacing
from dalle_scale.nn import precision
from dalle_scale.types import ImageTokenizer, LatentCodec, Nets, Stage, StrictModel, UserError

FORMAT = "dalle_scale export 2"
UPSTREAM_PART = "tokenizer"  # the part that becomes `Stage.upstream`


@dataclass(frozen=True)
class Export:
    """An opened export. `nets` are in eval mode and take no gradient."""

    folder: Path
    name: str  # of the stage
    config: StrictModel  # the stage's Config
    stage: Stage  # its `upstream` is the part "tokenizer" where there is one
    nets: Nets
    parts: dict[str, Path]
    trained: dict[str, Any]  # as `save` got it; {} where nothing is known
    dtype: str = "fp32"  # of the nets

    def part(self, name: str) -> Path | None:
        """Path of the part `name`, None if the export has no such part."""
        return self.parts.get(name)


def save(
    folder: str | Path,
    stage_name: str,
    model_config: StrictModel,
    states: Mapping[str, Mapping[str, Tensor]],
    parts: Mapping[str, Path] | None = None,
    trained: Mapping[str, Any] | None = None,
) -> None:
    """Write an export, whole or not at all; an export that was there before is replaced.

    Args:
        folder: where it appears.
        stage_name: as in `stage:` of a run's config.
        model_config: the stage's Config.
        states: net name -> its full `state_dict` (parameters and buffers).
        parts: name -> file or folder to copy in; keeps its file suffix.
        trained: for protocols: step, steps (of the whole run), weights (net -> "raw", or "ema" and its decay).

    Raises:
        UserError: a part does not exist.
    """
    parts = {name: Path(path) for name, path in (parts or {}).items()}
    for name, path in parts.items():
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; it is the '{name}' part of {folder}")
    files = {name: name + (path.suffix if path.is_file() else "") for name, path in parts.items()}
    with replacing(Path(folder)) as temporary:
        for net, state in states.items():
            save_file(_separate(state), temporary / f"{net}.safetensors")
        for name, path in parts.items():
            target = temporary / files[name]
            assert not target.exists(), f"part '{name}' would overwrite {target.name}"
            shutil.copytree(path, target) if path.is_dir() else shutil.copyfile(path, target)
        header = {
            "format": FORMAT,
            "stage": stage_name,
            "model": model_config.model_dump(mode="json"),
            "nets": sorted(states),
            "parts": files,
            "trained": dict(trained or {}),
        }
        (temporary / "config.yaml").write_text(yaml.safe_dump(header, sort_keys=False), encoding="utf-8")


def load(folder: str | Path, device: str | torch.device = "cpu", dtype: str = "fp32") -> Export:
    """Open an export: the stage, its nets with the saved weights, the paths of its parts.

    Args:
        dtype: fp32, bf16, or "auto": what `nn.precision.cast` makes of the nets. Of parts fp32 all the same.

    Raises:
        UserError: the folder is no export, or its weights do not fit the architecture that its config describes.
    """
    folder = Path(folder)
    header = _read_header(folder)
    parts = {name: folder / file for name, file in header["parts"].items()}
    stage_class = stages.resolve(header["stage"])
    old = header["format"] == convert.FORMAT
    if old:
        header = convert.header(header, stage_class.Config)
    config = parse(stage_class.Config, header["model"], where=f"{folder}/config.yaml: model")
    upstream = open_upstream(parts[UPSTREAM_PART], stage_class, device) if UPSTREAM_PART in parts else None
    stage = stage_class(config, upstream)
    with torch.random.fork_rng(devices=[]):  # fresh weights sample random numbers; the caller's stream stays as it was
        nets = stage.nets()
    if sorted(nets) != sorted(header["nets"]):
        raise UserError(f"{folder}: holds the nets {header['nets']}, stage '{header['stage']}' has {sorted(nets)}")
    for name, net in nets.items():
        _load_weights(net, folder / f"{name}.safetensors", old)
        net.to(device).eval().requires_grad_(False)
    dtype = precision.cast(nets, torch.device(device), dtype)
    return Export(folder, header["stage"], config, stage, nets, parts, header.get("trained", {}), dtype)


def open_tokenizer(folder: str | Path, device: str | torch.device = "cpu") -> ImageTokenizer:
    """Open the export of a stage that can encode images to codes and back.

    Raises:
        UserError: no export, or its stage is not an image tokenizer.
    """
    return tokenizer_of(load(folder, device))


def tokenizer_of(export: Export) -> ImageTokenizer:
    """The image tokenizer in an opened export. Raises UserError if its stage is none."""
    tokenizer = export.stage.tokenizer(export.nets)
    if tokenizer is None:
        raise UserError(
            f"{export.folder}: stage '{export.name}' is not an image tokenizer; give the export of one (dvae)"
        )
    return tokenizer


def open_upstream(
    folder: str | Path, stage_class: type[Stage], device: str | torch.device = "cpu"
) -> ImageTokenizer | LatentCodec:
    """Open the export below a stage: an image tokenizer, or a latent codec for one that `takes_latents`.

    Raises:
        UserError: no export, or one of another kind.
    """
    if not stage_class.takes_latents:
        return open_tokenizer(folder, device)
    export = load(folder, device)
    codec = export.stage.latents(export.nets)
    if codec is None:
        raise UserError(f"{folder}: stage '{export.name}' has no continuous latents; give the export of a VAE")
    return codec


def _read_header(folder: Path) -> dict[str, Any]:
    """The checked content of config.yaml."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such export folder")
    path = folder / "config.yaml"
    try:
        header = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except yaml.YAMLError:
        header = None
    if not isinstance(header, dict) or not str(header.get("format", "")).startswith(FORMAT.rsplit(" ", 1)[0]):
        inner = folder / "export"
        hint = f"did you mean {inner}?" if inner.is_dir() else "a training run writes one to <run>/export"
        raise UserError(f"{folder}: not an export; {hint}")
    if header["format"] not in (FORMAT, convert.FORMAT):
        raise UserError(f"{folder}: written as '{header['format']}', this version reads '{FORMAT}'; step dalle_scale")
    return header


def _load_weights(net: nn.Module, path: Path, old: bool) -> None:
    """Fill `net` from a safetensors file (`old`: of 0.1): every tensor present, none to spare, shapes equal."""
    if not path.is_file():
        raise UserError(f"{path}: the weights are missing")
    try:
        saved = convert.tensors(load_file(path)) if old else load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None
    expected = net.state_dict()
    for key in [*expected, *saved]:
        if key not in saved or key not in expected or saved[key].shape != expected[key].shape:
            has = list(saved[key].shape) if key in saved else "missing"
            wants = list(expected[key].shape) if key in expected else "no such tensor"
            raise UserError(f"{path}: another architecture: '{key}' is {has} in the file, the config wants {wants}")
    net.load_state_dict(saved)


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU copies that share no memory, as safetensors demands; tied weights are written once for each name."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return result
