"""Import open_clip and transformers' CLIP also where torchvision's compiled operators do not fit the installed torch.

A torchvision built for CUDA beside a CPU-only torch cannot load its `_C` library; its Python part then registers
meta functions for operators that nobody has declared, and `import torchvision` dies with "operator torchvision::nms
does not exist". Nothing here calls these operators: a declaration without an implementation is enough. Whoever calls
one gets torch's NotImplementedError.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import PathFinder
from typing import Any

import torch

# The operators that torchvision/_meta_registrations.py registers whether or not the compiled library is there.
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: torch.library.Library | None = None  # declarations live as long as this object


def declare_missing_operators() -> list[str]:
    """Make `import torchvision` work; to be called before it. Returns the operators that had to be declared: none
    where torchvision fits torch, has been imported already or is not installed."""
    global _library
    if "torchvision" in sys.modules or (spec := importlib.util.find_spec("torchvision")) is None:
        return []
    _load_compiled(list(spec.submodule_search_locations or []))
    missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    for name in missing:
        _library = _library or torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        _library.define(_SCHEMAS[name])  # type: ignore[no-untyped-call]
    return missing


def import_open_clip() -> Any:
    """The module open_clip. Takes seconds (torchvision, timm and huggingface_hub come with it): call it late."""
    declare_missing_operators()
    return importlib.import_module("open_clip")


def import_transformers() -> Any:
    """The module transformers, able to open image models, which import torchvision on first use."""
    declare_missing_operators()
    return importlib.import_module("transformers")


def _load_compiled(folders: list[str]) -> None:
    """Load torchvision's compiled operators as its own import would, if they fit."""
    library = PathFinder.find_spec("_C", folders)
    if library is not None and library.origin is not None:
        try:
            torch.ops.load_library(library.origin)  # type: ignore[no-untyped-call]
        except OSError:
            return
