"""FLOPs of a forward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode


def flops(forward: Callable[[], object]) -> float:
    """Floating-point operations of the convolutions and matrix products that `forward` calls. Nothing is computed and
    no memory used: whatever it makes, nets and inputs, lies on the device "meta"."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        forward()
    return float(counter.get_total_flops())
