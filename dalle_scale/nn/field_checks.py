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


def check_text_vocab(value: int, info: ValidationInfo) -> int:
    """Size of the caption vocabulary, declared after `text_length`: a model takes captions, or it does not.

    Raises:
        ValueError: one of the two is 0 and the other is not.
    """
    if (value > 0) != (info.data.get("text_length", value) > 0):
        raise ValueError("set text_length and text_vocab together, or neither")
    return value
