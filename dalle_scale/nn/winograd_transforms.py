"""Transforms of nn/winograd_tiles.py: maps taken apart into the 36 places of their windows or tiles, and put together.

Each is one pass over a block of the map, compiled from winograd_transforms.c, with what goes before or after it: ReLU,
bias, sum, mask. Without a compiler torch does the same in several passes. Maps are contiguous [B, H, W, C]; places are
numbered column by column.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_scale.nn import compiled
from dalle_scale.nn.winograd import _A, _B, _G

TILE, WINDOW = 4, 6
_SUM = 7  # the place of the 36 that adds alike to all 16 results of a tile
_SOURCE = "winograd_transforms.c"
_KEPT_VALUES = 2**20  # of a workspace
_local = threading.local()


class Block(NamedTuple):
    """Samples and rows of tiles that are worked on at a time."""

    samples: slice
    rows: slice

    @property
    def count(self) -> int:
        """Number of samples."""
        return int(self.samples.stop - self.samples.start)

    def tiles(self, maps: Tensor) -> int:
        """Number of tiles."""
        return self.count * (self.rows.stop - self.rows.start) * (maps.shape[2] // TILE)

    def tiles_of(self, maps: Tensor) -> Tensor:
        """[B, H, W, C] -> [samples, rows, 4, W / 4, 4, C]."""
        return maps[self.samples].unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE))[:, self.rows]


def workspace(name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory of this thread that is the same at each call with one name: unset, and lost at the next call. Large ones
    are new, and not kept."""
    kept: dict[tuple[str, torch.dtype], Tensor] = _local.__dict__
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
        [36, tiles, width], in the workspace `name` where compiled.
    """
    function, line = _function("take_windows", maps.dtype), maps.shape[2] * maps.shape[3]
    if function is None:
        return _take_windows(maps, block, width, relu)
    return _take(function, maps, block, width, relu, name, WINDOW * (line + 2 * maps.shape[3]), line)


def take_tiles(maps: Tensor, block: Block, width: int, relu: bool, name: str) -> Tensor:
    """A of the tiles, as `take_windows`."""
    function = _function("take_tiles", maps.dtype)
    if function is None:
        return _take_tiles(maps, block, width, relu)
    return _take(function, maps, block, width, relu, name, WINDOW * TILE * maps.shape[3], 0)


def take_filters(weight: Tensor, width: int, flipped: bool) -> Tensor:
    """G of filters [O, C, 3, 3], with zeros up to `width` for C. Flipped: of filters turned by half a circle.

    Returns:
        [36, O, width], new.
    """
    rows, columns, *_ = weight.shape
    function = _function("take_filters", weight.dtype)
    if function is None or weight.stride()[2:] != (3, 1):
        return _take_filters(weight, width, flipped)
    threads = torch.get_num_threads()
    places = weight.new_empty(WINDOW**2, rows, width)
    scratch = workspace("scratch", (threads * 27 * columns,), weight)
    sizes = rows, columns, width, *weight.stride()[:2]
    function(_pointer(weight), _pointer(places), _pointer(scratch), *sizes, flipped, threads)
    return places


def put_filters(places: Tensor, columns: int, flipped: bool) -> Tensor:
    """The gradient of filters, [O, columns, 3, 3], given that of `take_filters`, [36, O, at least columns]."""
    rows, width, threads = *places.shape[1:], torch.get_num_threads()
    function = _function("put_filters", places.dtype)
    if function is None:
        found = (_filter_matrix(flipped, places).t() @ places.flatten(1)).view(9, rows, width)
        return found[..., :columns].permute(1, 2, 0).reshape(rows, columns, 3, 3)
    weight = places.new_empty(rows, columns, 3, 3)
    scratch = workspace("scratch", (threads * 27 * columns,), places)
    function(_pointer(places), _pointer(weight), _pointer(scratch), rows, columns, width, flipped, threads)
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
    function = _function("put_tiles", out.dtype)
    if function is None:
        return _put_tiles(products, out, block, bias, add, where_positive)
    shape = _block(out, block, products.shape[2])
    scratch = workspace("scratch", (shape.threads * WINDOW * TILE * out.shape[3],), out)
    function(_pointer(products), _pointer(out), _pointer(scratch), shape, *_ends(bias, add, where_positive))


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
    function = _function("put_windows", out.dtype)
    if function is None:
        return _put_windows(products, out, block, below, bias, add, where_positive)
    shape, line = _block(out, block, products.shape[2]), out.shape[2] * out.shape[3]
    rows = block.count * (block.rows.stop - block.rows.start)
    scratch = workspace("scratch", ((rows * WINDOW + 1) * line,), out)
    ends = _ends(bias, add, where_positive)
    function(_pointer(products), _pointer(out), _pointer(scratch), shape, _pointer(below), *ends)


def put_rows(
    products: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    where_positive: Tensor | None = None,
) -> None:
    """Writes products [rows, at least O] into `out` [rows, O]; the others as in `put_tiles`, with one bias."""
    function = _function("put_rows", out.dtype)
    if function is not None:
        sizes = *out.shape, products.shape[1], torch.get_num_threads()
        return function(_pointer(products), _pointer(out), *sizes, *map(_pointer, (bias, add, where_positive)))
    products = products[:, : out.shape[1]]
    if bias is not None:
        products = torch.add(products, bias, out=out)
    if add is not None:
        products = torch.add(products, add, out=out)
    if where_positive is not None:
        keep_where_positive(products, where_positive, out)
    elif products is not out:
        out.copy_(products)


# --- compiled ---------------------------------------------------------------------------------------------------------


class _Block(ctypes.Structure):
    """As in the C file."""

    _names = ("first", "end", "top", "bottom", "height", "columns", "channels", "width", "threads")
    _fields_ = [(name, ctypes.c_ssize_t) for name in _names]
    threads: int


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """A function of the C file for maps of some type, if there is one."""
    library = compiled.library(_SOURCE)
    if library is None:
        return None
    function = library[f"{name}_{'float' if dtype == torch.float32 else 'double'}"]
    pointer, block = ctypes.c_void_p, ctypes.POINTER(_Block)
    count = ctypes.c_ssize_t
    last = [pointer, count, pointer, pointer]
    function.argtypes = {
        "take_windows": [pointer, pointer, pointer, block, ctypes.c_int],
        "take_tiles": [pointer, pointer, pointer, block, ctypes.c_int],
        "take_filters": [pointer, pointer, pointer, *[count] * 5, ctypes.c_int, count],
        "put_filters": [pointer, pointer, pointer, *[count] * 3, ctypes.c_int, count],
        "put_tiles": [pointer, pointer, pointer, block, *last],
        "put_windows": [pointer, pointer, pointer, block, pointer, *last],
        "put_rows": [pointer, pointer, count, count, count, count, pointer, pointer, pointer],
    }[name]
    function.restype = None
    return function


def _block(maps: Tensor, block: Block, width: int) -> _Block:
    samples, rows = block
    height, columns = maps.shape[1], maps.shape[2] // TILE
    edges = samples.start, samples.stop, rows.start, rows.stop
    return _Block(*edges, height, columns, maps.shape[3], width, torch.get_num_threads())


def _take(
    function: Callable[..., None],
    maps: Tensor,
    block: Block,
    width: int,
    relu: bool,
    name: str,
    scratch_values: int,
    more: int,
) -> Tensor:
    """The result of a C function that needs so many values for each thread, and some more."""
    shape = _block(maps, block, width)
    places = workspace(name, (WINDOW**2, block.tiles(maps), width), maps)
    scratch = workspace("scratch", (shape.threads * scratch_values + more,), maps)
    function(_pointer(maps), _pointer(places), _pointer(scratch), shape, relu)
    return places


def _pointer(maps: Tensor | None) -> int | None:
    return None if maps is None else maps.data_ptr()


def _ends(bias: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    """The last arguments of functions that put maps together: bias, how far that of the next sample is, and others."""
    assert all(given is None or given.is_contiguous() for given in (bias, *others))
    step = bias.shape[1] if bias is not None and bias.ndim == 2 else 0
    return (_pointer(bias), step, *map(_pointer, others))


# --- in torch ---------------------------------------------------------------------------------------------------------


def _take_windows(maps: Tensor, block: Block, width: int, relu: bool) -> Tensor:
    channels = maps.shape[3]
    first, end = block.rows.start * TILE, block.rows.stop * TILE
    at_top, at_end = int(first == 0), int(end == maps.shape[1])
    part = maps[block.samples, first - 1 + at_top : end + 1 - at_end]
    framed = maps.new_empty(block.count, end - first + 2, maps.shape[2] + 2, width)
    for border in (framed[:, :at_top], framed[:, end - first + 2 - at_end :], framed[:, :, :1], framed[:, :, -1:]):
        border.zero_()
    framed[..., channels:].zero_()
    _copy(part, framed[:, at_top : end - first + 2 - at_end, 1:-1, :channels], relu)
    matrix = _matrix(_B, maps)
    rows = framed.unfold(1, WINDOW, TILE).permute(4, 0, 1, 2, 3)
    columns = (matrix @ rows.reshape(WINDOW, -1)).view(rows.shape)
    windows = columns.unfold(3, WINDOW, TILE).permute(5, 0, 1, 2, 3, 4)
    return (matrix @ windows.reshape(WINDOW, -1)).view(WINDOW**2, -1, width)


def _take_filters(weight: Tensor, width: int, flipped: bool) -> Tensor:
    if width != weight.shape[1]:
        weight = F.pad(weight, (0, 0, 0, 0, 0, width - weight.shape[1]))
    matrix = _filter_matrix(flipped, weight)
    return (matrix @ weight.reshape(-1, 9).t()).view(WINDOW**2, *weight.shape[:2])


def _filter_matrix(flipped: bool, like: Tensor) -> Tensor:
    """[36, 9]: G both ways; values of filters are numbered row by row."""
    matrix = _matrix(_G, like)
    matrix = matrix.flip(1) if flipped else matrix
    both = torch.kron(matrix, matrix).view(-1, 3, 3)
    return both.transpose(1, 2).reshape(-1, 9)


def _take_tiles(maps: Tensor, block: Block, width: int, relu: bool) -> Tensor:
    part = block.tiles_of(maps).permute(4, 2, 0, 1, 3, 5)
    tiles = maps.new_empty(*part.shape[:5], width)
    tiles[..., part.shape[5] :].zero_()
    _copy(part, tiles[..., : part.shape[5]], relu)
    return _both_ways(_matrix(_A, maps).t().contiguous(), tiles).view(WINDOW**2, -1, width)


def _copy(values: Tensor, into: Tensor, relu: bool) -> None:
    if relu:
        torch.clamp_min(values, 0, out=into)
    else:
        into.copy_(values)


def _put_tiles(
    products: Tensor,
    out: Tensor,
    block: Block,
    bias: Tensor | None,
    add: Tensor | None,
    where_positive: Tensor | None,
) -> None:
    if bias is not None:
        sums = products[_SUM, :, : out.shape[3]].view(block.count, -1, out.shape[3])
        sums.add_(bias if bias.ndim == 1 else bias[block.samples, None])
    into = block.tiles_of(out)
    tiles = _both_ways(_matrix(_A, out), products).view(TILE, TILE, *into.shape[:2], into.shape[3], -1)
    tiles = tiles[..., : out.shape[3]].permute(2, 3, 1, 4, 0, 5)
    if add is not None:
        torch.add(tiles, block.tiles_of(add), out=into)
    if where_positive is not None:
        keep_where_positive(tiles if add is None else into, block.tiles_of(where_positive), into)
    elif add is None:
        into.copy_(tiles)


def _put_windows(
    products: Tensor,
    out: Tensor,
    block: Block,
    below: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    where_positive: Tensor | None,
) -> None:
    [*_, width], channels = products.shape, out.shape[3]
    tile_rows, columns = block.rows.stop - block.rows.start, out.shape[2] // TILE
    matrix = _matrix(_B, out).t().contiguous()
    windows = (matrix @ products.view(WINDOW, -1)).view(WINDOW, WINDOW, block.count, tile_rows, columns, width)
    windows = windows.permute(2, 3, 1, 4, 0, 5)  # a window begins one value before its tile and ends one after it
    tiles = windows[..., 1:5, :].contiguous()
    tiles[..., :-1, 3, :] += windows[..., 1:, 0, :]
    tiles[..., 1:, 0, :] += windows[..., :-1, 5, :]
    tiles = tiles.view(-1, WINDOW, columns * TILE * width)
    rows = torch.bmm(matrix.expand(len(tiles), WINDOW, WINDOW), tiles)
    rows = rows.view(block.count, tile_rows, WINDOW, -1, width)[..., :channels]
    all_rows = out[block.samples].unflatten(1, (-1, TILE))
    into = all_rows[:, block.rows]
    into.copy_(rows[:, :, 1:5])
    into[:, :-1, 3] += rows[:, 1:, 0]
    into[:, 1:, 0] += rows[:, :-1, 5]
    if bias is not None:
        into.add_(bias if bias.ndim == 1 else bias[block.samples, None, None, None])
    if add is not None:
        into.add_(add[block.samples].unflatten(1, (-1, TILE))[:, block.rows])
    if block.rows.start:
        all_rows[:, block.rows.start - 1, 3] += rows[:, 0, 0]
        into[:, 0, 0] += below
    if where_positive is not None:  # and again in the row before, whose mask is that of a sum now complete
        first = max(0, block.rows.start * TILE - 1)
        changed = slice(first, block.rows.stop * TILE)
        part = out[block.samples, changed]
        keep_where_positive(part, where_positive[block.samples, changed], part)
    below.copy_(rows[:, -1, 5])


def keep_where_positive(values: Tensor, where: Tensor, into: Tensor) -> None:
    """Writes `values`, and 0 where `where` is not positive, into a tensor that may be one of them: relu's gradient."""
    torch.ops.aten.threshold_backward.grad_input(values, where, 0, grad_input=into)


def _both_ways(matrix: Tensor, tiles: Tensor) -> Tensor:
    """`matrix` [m, k] along the columns and the rows of tiles [k * k * N values] -> [m, m, N]."""
    size, places = matrix.shape
    half = (matrix @ tiles.view(places, -1)).view(size, places, -1)
    return torch.bmm(matrix.expand(size, size, places), half)


def _matrix(rows: tuple[tuple[float, ...], ...], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=like.dtype)
