"""Memory of torch's large CPU tensors that is kept between steps: see kept_memory.cpp.

A training step allocates what the step before has freed. With malloc the kernel clears those pages anew each time, and
blocks of other sizes break up what is kept.
"""

from __future__ import annotations

from dalle_scale.nn import compiled

_SOURCE = "kept_memory.cpp"


def keep_memory() -> bool:
    """Keep what large CPU tensors have taken, from now to the end of the process; whether that can be done here."""
    library = compiled.library(_SOURCE)
    return library is not None and bool(library.keep_memory())
