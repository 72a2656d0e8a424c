"""Checks of config fields that several stages have; used as `field_validator("name")(check)`."""

from __future__ import annotations

from pydantic import ValidationInfo


def check_downsampling(value: int, info: ValidationInfo) -> int:
    """Pixels per code along a side, declared after `image_size`: whole codes, by halving.

    Raises:
        ValueError: not a power of two, or the image is no multiple of it.
    """
    size = info.data.get("image_size", value)
    if value & (value - 1) or size % value:
        raise ValueError(f"must be a power of two that divides image_size {size}")
    return value
