"""Feature extractors that sets of images are compared by: the Inception of FID, or a CLIP model.

    extractor = open_inception(Path("weights-inception-2015-12-05-6726825d.pth"), "2048", device)
    extractor = open_clip("runs/clip/export", device)
    features, logits = extractor.extract(images)

Weights come from this machine, by path; nothing is downloaded. A distance bears the name FID only on the published
weights of the published network: every other extractor puts its kind and digest into the name.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dalle_scale.io import digest
from dalle_scale.nn.torchvision_compat import declare_missing_operators
from dalle_scale.sampling import rerank
from dalle_scale.types import UserError

PUBLISHED = "6726825d"  # how the sha256 of the published file begins; torch-fidelity calls it by that
LAYERS = ("2048", "768", "192", "64")  # of the Inception, by their number of channels; FID is of the first
CLASSES = 1008  # of the Inception
NAMES = {"frechet": "fid", "kernel": "kid", "score": "inception_score"}  # of measures on the published Inception


@dataclass(frozen=True)
class Extractor:
    """A frozen network that describes images."""

    kind: str  # inception or clip
    source: str  # where the weights lie
    sha256: str  # of the weights' file, or of all files of the folder
    layer: str  # what the features are
    dimensions: int  # D
    classes: int  # C, 0 without a classifier
    resize: str  # how images come to its input size
    # uint8 [B, 3, H, W] on any device -> features float32 [B, D], logits float32 [B, C], both on the CPU
    extract: Callable[[Tensor], tuple[Tensor, Tensor]]

    def name(self, measure: str, reconstructions: bool = False) -> str:
        """Name of a number: `fid` on the published Inception, else e.g. `frechet_clip(0a1b2c3d4e5f)`."""
        if self.kind == "inception" and self.layer == LAYERS[0] and self.sha256.startswith(PUBLISHED):
            # precision and recall are usually those of another network, VGG16: so the Inception is in their names
            name = NAMES.get(measure, f"{measure}_inception")
            return ("r" if name in ("fid", "kid") else "reconstruction_") + name if reconstructions else name
        layer = self.layer if self.kind == "inception" else ""
        return "reconstruction_" * reconstructions + f"{measure}_{self.kind}{layer}({self.sha256[:12]})"


def open_inception(path: Path, layer: str, device: torch.device) -> Extractor:
    """The Inception of 2015-12-05 that FID is defined by, as torch-fidelity ported it from TensorFlow.

    Args:
        path: weights as torch-fidelity publishes them (weights-inception-2015-12-05-6726825d.pth), or the same names
            and shapes as .safetensors.
        layer: one of LAYERS. Only the first has a classifier after it.

    Raises:
        UserError: torch-fidelity is not installed; the file is missing, not readable, or holds something else.
    """
    assert layer in LAYERS, layer
    state = _read(path)
    declare_missing_operators()  # torch-fidelity imports torchvision
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise UserError("--inception: needs torch-fidelity; pip install 'dalle_scale[eval]'") from None
    # its constructor unpickles a file whatever is in it, or downloads one: hand it our own copy of what was read safely
    copy = io.BytesIO()
    torch.save(state, copy)
    copy.seek(0)
    names = [layer, "logits_unbiased"] if layer == LAYERS[0] else [layer]
    try:
        with torch.random.fork_rng(devices=[]):  # fresh weights sample random numbers
            model = FeatureExtractorInceptionV3("inception", names, copy)
    except RuntimeError as error:
        reason = " ".join(str(error).split()).partition(": ")[2]
        raise UserError(f"{path}: not the Inception of FID: {reason[:150]}") from None
    model.to(device).eval()

    @torch.no_grad()
    def extract(images: Tensor) -> tuple[Tensor, Tensor]:
        # cuDNN rounds to TF32 by default
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            features, *logits = (part.float().cpu() for part in model(images.to(device)))
        return features, logits[0] if logits else features.new_zeros(len(features), 0)

    resize = "to 299 x 299, bilinear as in TensorFlow 1: no antialias, corners not aligned; then (x - 128) / 128"
    classes = CLASSES if layer == LAYERS[0] else 0
    return Extractor("inception", str(path), digest(path), layer, int(layer), classes, resize, extract)


def open_clip(name: str, device: torch.device) -> Extractor:
    """Image vectors of unit length of a CLIP model on this machine.

    Args:
        name: a folder (export of the clip stage, Hugging Face, open_clip) or open_clip's MODEL:FILE.

    Raises:
        UserError: neither of these, or it cannot be read.
    """
    path = Path(name) if Path(name).is_dir() else Path(name.partition(":")[2])
    if not path.is_dir() and not path.is_file():
        raise UserError(f"--clip: {name} is neither a folder nor MODEL:FILE on this machine; nothing is downloaded")
    scorer = rerank.open_scorer(name, device)

    def extract(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            vectors = scorer.image_vectors(images)
        return vectors, vectors.new_zeros(len(vectors), 0)

    dimensions = extract(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[0].shape[1]
    resize = "to the model's own input size by its own rule (an export of the clip stage: bicubic with antialias)"
    return Extractor("clip", name, digest(path), "image vectors of unit length", dimensions, 0, resize, extract)


def _read(path: Path) -> dict[str, Any]:
    """Tensors of a file by name, read without running what is in it."""
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; it should be weights of FID's Inception, as torch-fidelity publishes them"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        raise UserError(f"{path}: neither .safetensors nor weights as torch saves them") from None
    if not isinstance(saved, dict) or not all(isinstance(value, Tensor) for value in saved.values()):
        raise UserError(f"{path}: holds something else than a state_dict, which is names and tensors")
    return saved
