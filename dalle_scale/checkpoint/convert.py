"""Exports of 0.1 in the names of today: config keys and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from torch import Tensor

from dalle_scale.config import RENAMED

FORMAT = "dalle_scale export 1"
TRAINED = {"step", "steps", "weights"}  # keys of an export's `trained`
TENSORS: dict[str, str] = {}  # a part of a tensor's name in 0.1 -> the same today


def header(old: Mapping[str, Any], config: type[BaseModel]) -> dict[str, Any]:
    """The content of an export's config.yaml with today's keys. config: the stage's Config."""
    schema = config.model_json_schema()
    sections = [schema, *schema.get("$defs", {}).values()]
    known = {name for section in sections for name in section.get("properties", {})}
    trained = _renamed(old.get("trained", {}), TRAINED)
    return {**old, "model": _renamed(old["model"], known), "trained": trained}


def _renamed(tree: Any, known: set[str]) -> Any:
    """A plain tree, its keys renamed where today's name is known and the old one is not."""
    if not isinstance(tree, dict):
        return tree
    names = {key: RENAMED.get(key, key) for key in tree}
    return {
        names[key] if key not in known and names[key] in known else key: _renamed(value, known)
        for key, value in tree.items()
    }


def tensors(old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a net by today's names."""
    found = {}
    for name, tensor in old.items():
        for before, now in TENSORS.items():
            name = name.replace(before, now)
        found[name] = tensor
    return found
