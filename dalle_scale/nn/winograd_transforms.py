"""Transforms of nn/winograd_tiles.py: maps taken apart into the 36 places of their windows or tiles, and put together.

Each is one pass over a block of the map, compiled from winograd_transforms.c, with what goes before or after it: ReLU,
bias, sum, mask. Without a compiler none of this is there, and nn/conv.py takes torch's convolution. Maps are contiguous
[B, H, W, C]; places are numbered column by column.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dalle_scale.nn import compiled

TILE, WINDOW = 4, 6
_SOURCE = "winograd_transforms.c"
_KEPT_VALUES = 2**20  # of a workspace
_local = threading.local()


class Block(NamedTuple):
    """Samples and rows of tiles that are worked on at a time."""

    samples: slice
    rows: slice

    @property
    def count(self) -> int:  # type: ignore[override]
        """Number of samples."""
        return int(self.samples.stop - self.samples.start)

    def tiles(self, maps: Tensor) -> int:
        """Number of tiles."""
        return self.count * int(self.rows.stop - self.rows.start) * (maps.shape[2] // TILE)


def workspace(name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory of this thread that is the same at each call with one name: unset, and lost at the next call. Large ones
    are new, and not kept."""
    kept: dict[Any, Tensor] = _local.__dict__
    values = math.prod(shape)
    if values > _KEPT_VALUES:
        return like.new_empty(shape)
    memory = kept.get((name, like.dtype))
    if memory is None or memory.numel() < values:
        with torch.inference_mode(False):  # its tensors cannot be written outside it
            memory = kept[name, like.dtype] = torch.empty(values, dtype=like.dtype)
    return memory[:values].view(shape)


def relu_of(values: Tensor, name: str) -> Tensor:
    """Its relu, in the workspace `name`."""
    return torch.clamp_min(values, 0, out=workspace(name, values.shape, values))


def take_windows(maps: Tensor, block: Block, width: int, relu: bool, name: str) -> Tensor:
    """B^T of the windows of a block of [B, H, W, C], or of its relu, with zeros up to `width` channels.

    Returns:
        [36, tiles, width], in the workspace `name`.
    """
    line = maps.shape[2] * maps.shape[3]
    return _take("take_windows", maps, block, width, relu, name, (WINDOW * (line + 2 * maps.shape[3]), line))


def take_tiles(maps: Tensor, block: Block, width: int, relu: bool, name: str) -> Tensor:
    """A of the tiles, as `take_windows`."""
    return _take("take_tiles", maps, block, width, relu, name, (WINDOW * TILE * maps.shape[3], 0))


def take_filters(weight: Tensor, width: int, flipped: bool) -> Tensor:
    """G of filters [O, C, 3, 3], with zeros up to `width` for C. Flipped: of filters turned by half a circle.

    Returns:
        [36, O, width], new.
    """
    rows, columns, *_ = weight.shape
    if weight.stride()[2:] != (3, 1):
        weight = weight.contiguous()
    threads = torch.get_num_threads()
    places = weight.new_empty(WINDOW**2, rows, width)
    scratch = workspace("scratch", (threads * 27 * columns,), weight)
    sizes = rows, columns, width, *weight.stride()[:2]
    _call("take_filters", weight, places, scratch, *sizes, flipped, threads)
    return places


def put_filters(places: Tensor, columns: int, flipped: bool) -> Tensor:
    """The gradient of filters, [O, columns, 3, 3], given that of `take_filters`, [36, O, at least columns]."""
    rows, width, threads = *places.shape[1:], torch.get_num_threads()
    weight = places.new_empty(rows, columns, 3, 3)
    scratch = workspace("scratch", (threads * 27 * columns,), places)
    _call("put_filters", places, weight, scratch, rows, columns, width, flipped, threads)
    return weight


def put_tiles(
    products: Tensor,
    out: Tensor,
    block: Block,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    where_positive: Tensor | None = None,
) -> None:
    """Writes A^T of products [36, tiles, width], which may be changed, into a block of `out` [B, H, W, O].

    Args:
        bias: [O] or [B, O], added.
        add: as `out`, added.
        where_positive: as `out`; where it is not positive, 0 is written.
    """
    shape = _block(out, block, products.shape[2])
    scratch = workspace("scratch", (shape.threads * WINDOW * TILE * out.shape[3],), out)
    _call("put_tiles", products, out, scratch, shape, *_ends(bias, add, where_positive))


def put_windows(
    products: Tensor,
    out: Tensor,
    block: Block,
    below: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    where_positive: Tensor | None = None,
) -> None:
    """Adds B of products [36, tiles, width] up in a block of `out` [B, H, W, O]; blocks come in order.

    Args:
        below: [samples, W, O]: what the block before adds to the row below it; then what this block adds there.
        bias, add, where_positive: as in `put_tiles`.
    """
    shape, line = _block(out, block, products.shape[2]), out.shape[2] * out.shape[3]
    rows = block.count * (block.rows.stop - block.rows.start)
    scratch = workspace("scratch", ((rows * WINDOW + 1) * line,), out)
    _call("put_windows", products, out, scratch, shape, below, *_ends(bias, add, where_positive))


def put_rows(
    products: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    where_positive: Tensor | None = None,
) -> None:
    """Writes products [rows, at least O] into `out` [rows, O]; the others as in `put_tiles`, with one bias."""
    sizes = *out.shape, products.shape[1], torch.get_num_threads()
    _call("put_rows", products, out, *sizes, bias, add, where_positive)


def available() -> bool:
    """Whether the C file is compiled here."""
    return compiled.library(_SOURCE) is not None


class _Block(ctypes.Structure):
    """As in the C file."""

    _names = ("first", "end", "top", "bottom", "height", "columns", "channels", "width", "threads")
    _fields_ = [(name, ctypes.c_ssize_t) for name in _names]
    threads: int


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    """A function of the C file for maps of some type."""
    library = compiled.library(_SOURCE)
    assert library is not None, "asked for without `available`"
    function = library[f"{name}_{'float' if dtype == torch.float32 else 'double'}"]
    pointer, block, count = ctypes.c_void_p, ctypes.POINTER(_Block), ctypes.c_ssize_t
    last = [pointer, count, pointer, pointer]
    arguments: dict[str, list[Any]] = {
        "take_windows": [pointer, pointer, pointer, block, ctypes.c_int],
        "take_tiles": [pointer, pointer, pointer, block, ctypes.c_int],
        "take_filters": [pointer, pointer, pointer, *[count] * 5, ctypes.c_int, count],
        "put_filters": [pointer, pointer, pointer, *[count] * 3, ctypes.c_int, count],
        "put_tiles": [pointer, pointer, pointer, block, *last],
        "put_windows": [pointer, pointer, pointer, block, pointer, *last],
        "put_rows": [pointer, pointer, count, count, count, count, pointer, pointer, pointer],
    }
    function.argtypes, function.restype = arguments[name], None
    return function


def _call(name: str, maps: Tensor, *arguments: Tensor | _Block | int | None) -> None:
    """Call a function of the C file with pointers in place of tensors."""
    given = (part.data_ptr() if isinstance(part, Tensor) else part for part in (maps, *arguments))
    _function(name, maps.dtype)(*given)


def _block(maps: Tensor, block: Block, width: int) -> _Block:
    samples, rows = block
    height, columns = maps.shape[1], maps.shape[2] // TILE
    edges = samples.start, samples.stop, rows.start, rows.stop
    return _Block(*edges, height, columns, maps.shape[3], width, torch.get_num_threads())


def _take(
    name: str, maps: Tensor, block: Block, width: int, relu: bool, room: str, scratch_values: tuple[int, int]
) -> Tensor:
    """The result, in the workspace `room`, of a C function that needs so many values for each thread, and some more."""
    shape = _block(maps, block, width)
    places = workspace(room, (WINDOW**2, block.tiles(maps), width), maps)
    of_thread, more = scratch_values
    scratch = workspace("scratch", (shape.threads * of_thread + more,), maps)
    _call(name, maps, places, scratch, shape, relu)
    return places


def _ends(bias: Tensor | None, *others: Tensor | None) -> tuple[Tensor | int | None, ...]:
    """The last arguments of functions that put maps together: bias, its stride from sample to sample, and others."""
    assert all(given is None or given.is_contiguous() for given in (bias, *others))
    return (bias, bias.shape[1] if bias is not None and bias.ndim == 2 else 0, *others)
