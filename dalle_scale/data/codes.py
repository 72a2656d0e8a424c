"""Image codes: the member "codes" of a sample (uint16 little endian, level after level, each in raster order)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from dalle_scale.data.decode import BadSample

MEMBER = "codes"
MAX_VOCAB = 1 << 16


def count(grids: Iterable[int]) -> int:
    """Codes of an image that has a square of them at each level."""
    return sum(grid**2 for grid in grids)


def describe(grids: Iterable[int]) -> str:
    """The same for people: "8 x 8 + 16 x 16 codes"."""
    return " + ".join(f"{grid} x {grid}" for grid in grids) + " codes"


def pack(codes: npt.NDArray[np.int64]) -> bytes:
    """Codes [N], each in 0 .. 65535, as the bytes of the member."""
    assert codes.min() >= 0 and codes.max() < MAX_VOCAB, "codes must fit into 16 bits"
    return codes.astype("<u2").tobytes()


def unpack(data: bytes, num_codes: int, vocab: int) -> npt.NDArray[np.uint16]:
    """The codes [num_codes] of a member.

    Raises:
        BadSample: another number of codes, or a code that is not below `vocab`.
    """
    if len(data) != 2 * num_codes:
        raise BadSample(f"{len(data) // 2} codes instead of {num_codes}")
    codes = np.frombuffer(data, "<u2")
    if (highest := int(codes.max())) >= vocab:
        raise BadSample(f"code {highest} is not below {vocab}")
    return codes
