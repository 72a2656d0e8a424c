"""Convolutions that keep the size, in the way that is the fastest on a CPU; elsewhere the library's.

On CPUs torch's own 1x1 convolution takes twice as long as the matrix product of the same rows, and its 3x3 convolution
longer than nn/winograd_tiles.py, so those are the ways here for large channels-last maps in fp32. ReLU before and sum
after are part of the convolution: what a backward pass needs is the input alone. Where that came out of a 1x1
convolution it is not kept but computed again, which takes a hundredth of the time. Everything else, 16 bits above all,
and everything where there is no C compiler, is left to torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from dalle_scale.nn import winograd_tiles, winograd_transforms
from dalle_scale.nn.winograd import plain_conv
from dalle_scale.nn.winograd_transforms import put_rows, relu_of, workspace

_FEWEST_PRODUCTS = 2**24  # positions x channels x outputs; below, calls from Python take more time than they save
_ROW_VALUES = 2**18  # of a map at a time in 1x1 convolutions: they should stay in the cache


class Conv(nn.Conv2d):
    """`convolve` as a layer, with a kernel of 1x1, 3x3 or any odd size"""

    def __init__(self, n_in: int, n_out: int, kernel: int) -> None:
        super().__init__(n_in, n_out, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, relu: bool = False, residual: Tensor | None = None, gain: float = 1.0) -> Tensor:
        """[B, n_in, H, W] -> [B, n_out, H, W]."""
        assert self.bias is not None
        return convolve(x, self.weight, self.bias, relu, residual, gain)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor, relu: bool = False, residual: Tensor | None = None, gain: float = 1.0
) -> Tensor:
    """residual + gain * (convolution of x, or of its relu, that keeps the size). Differentiable once.

    Args:
        x: [B, C, H, W].
        weight: [O, C, k, k], k odd.
        bias: [O], or [B, O]: one for each sample.
        relu: convolve relu(x).
        residual: [B, O, H, W].

    Returns:
        [B, O, H, W].
    """
    if _has_own_way(x, weight, bias, residual):
        given = (x, weight, bias, relu, residual, gain)
        out: Tensor = _Convolution.apply(*given, _origin(x))  # type: ignore[no-untyped-call]
        if weight.shape[2] == 1 and out.requires_grad and not any(t.is_inference() for t in _tensors(given)):
            origins = (_origin(x), None if residual is None else _origin(residual))
            _ORIGINS[out] = _Origin(given, origins, _versions(out, *given))
        return out
    out = plain_conv(F.relu(x) if relu else x, weight, bias)
    if residual is not None:
        return torch.add(residual, out, alpha=gain)
    return out if gain == 1 else gain * out


def _has_own_way(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> bool:
    """Whether torch's is not the fastest, or there is no compiler. Ours is compiled and looks at no types and sizes."""
    if not winograd_transforms.available():
        return False
    tensors = _tensors((x, weight, bias, residual))
    if not all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.dtype == x.dtype for t in tensors):
        return False
    outputs, channels, kernel, _ = weight.shape
    fitting = [(outputs,)] if kernel == 1 else [(outputs,), (len(x), outputs)]
    if channels != x.shape[1] or bias.shape not in fitting or x.dtype not in (torch.float32, torch.float64):
        return False
    if residual is not None and residual.shape != (len(x), outputs, *x.shape[2:]):
        return False
    if torch.is_autocast_enabled("cpu") or x.numel() * outputs < _FEWEST_PRODUCTS:
        return False
    if kernel == 1:
        return x.is_contiguous(memory_format=torch.channels_last)
    return kernel == 3 and winograd_tiles.fits(x, weight)


class _Origin(NamedTuple):
    """Origin of a map: the arguments of `convolve`, how its input and residual were made, if by one too, and the
    versions of all these tensors."""

    given: tuple[Any, ...]
    origins: tuple[_Origin | None, _Origin | None]
    versions: tuple[int, ...] = ()

    def holds(self, maps: Tensor) -> bool:
        """Whether neither these maps nor what they were made of have changed since."""
        makers = zip((self.given[0], self.given[4]), self.origins, strict=True)
        return self.versions == _versions(maps, *self.given) and all(
            origin is None or origin.holds(made) for made, origin in makers
        )

    def kept(self) -> tuple[Tensor | None, ...]:
        """The inputs to recompute it."""
        (x, weight, bias, _, residual, _), (of_x, of_residual) = self.given, self.origins
        parts = [(maps,) if origin is None else origin.kept() for maps, origin in ((x, of_x), (residual, of_residual))]
        return (weight, bias, *parts[0], *parts[1])

    def again(self, kept: Iterator[Tensor | None]) -> Tensor:
        """The map, made of what `kept` was."""
        weight, bias = next(kept), next(kept)
        x, residual = (next(kept) if origin is None else origin.again(kept) for origin in self.origins)
        _, _, _, relu, _, gain = self.given
        assert x is not None and weight is not None and bias is not None
        return _convolved(x, weight, bias, relu, residual, gain)

    def without_tensors(self) -> _Origin:
        """For use after the tensors that `kept` has named."""
        _, _, _, relu, _, gain = self.given
        of_x, of_residual = (None if origin is None else origin.without_tensors() for origin in self.origins)
        return _Origin((None, None, None, relu, None, gain), (of_x, of_residual))


_ORIGINS: MutableMapping[Tensor, _Origin] = WeakTensorKeyDictionary()  # of maps that came out of a 1x1 convolution


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if torch.is_tensor(value)]


def _versions(*values: Any) -> tuple[int, ...]:
    """In-place versions of the tensors among these."""
    return tuple(tensor._version for tensor in _tensors(values))


def _origin(x: Tensor) -> _Origin | None:
    """Origin of a map, if it can be recomputed."""
    origin = _ORIGINS.get(x)
    return origin if origin is not None and origin.holds(x) else None


def _convolved(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, residual: Tensor | None, gain: float) -> Tensor:
    """`convolve` in its own way."""
    if gain != 1:
        weight, bias = gain * weight, gain * bias
    way = winograd_tiles.forward if weight.shape[2] == 3 else _rows_forward
    shape = (len(x), len(weight), *x.shape[2:])
    out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)  # and not a view of its rows
    add = None if residual is None else _rows(residual)
    way(_rows(x), weight, bias.contiguous(), relu, add, out.permute(0, 2, 3, 1))
    return out


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        relu: bool,
        residual: Tensor | None,
        gain: float,
        origin: _Origin | None,
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(weight, *((x,) if origin is None else origin.kept()))
        ctx.origin = None if origin is None else origin.without_tensors()
        ctx.relu, ctx.gain, ctx.bias_dimensions = relu, gain, bias.ndim
        return _convolved(x, weight, bias, relu, residual, gain)

    @staticmethod
    @once_differentiable
    # its caller may be in autocast, of which torch's own knows nothing backwards
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        weight, *kept = ctx.saved_tensors
        x = kept[0] if ctx.origin is None else ctx.origin.again(iter(kept))
        of_x, of_weight, of_bias, _, of_residual, *_ = ctx.needs_input_grad
        grad = _rows(grads[0])
        way = winograd_tiles.backward if weight.shape[2] == 3 else _rows_backward
        scaled = weight if ctx.gain == 1 else ctx.gain * weight
        slopes, steps = way(_rows(x), scaled, grad, ctx.relu, of_x, of_weight)
        rises = grad.flatten(1, 2).sum(1) if of_bias else None
        if rises is not None and ctx.bias_dimensions == 1:
            rises = rises.sum(0)
        if ctx.gain != 1:
            steps, rises = (None if found is None else found.mul_(ctx.gain) for found in (steps, rises))
        of_maps = None if slopes is None else _planes(slopes)
        return of_maps, steps, rises, None, grads[0] if of_residual else None, None, None


def _rows(maps: Tensor) -> Tensor:
    """[B, C, H, W] -> contiguous [B, H, W, C]."""
    return maps.permute(0, 2, 3, 1).contiguous()


def _planes(rows: Tensor) -> Tensor:
    return rows.permute(0, 3, 1, 2)


def _rows_forward(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, residual: Tensor | None, out: Tensor) -> None:
    """A 1x1 convolution as `winograd_tiles.forward`; bias: [O]."""
    count = len(weight)
    matrix = F.pad(weight.flatten(1).t(), (0, winograd_tiles.padded(count) - count))
    for part, into, add in _parts(x, out, out if residual is None else residual):
        values = relu_of(part, "first") if relu else part
        put_rows(_multiplied(values, matrix), into, bias, None if residual is None else add)


def _rows_backward(
    x: Tensor, weight: Tensor, grad: Tensor, relu: bool, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a 1x1 convolution as `winograd_tiles.backward`."""
    outputs, channels = weight.shape[:2]
    matrix = F.pad(weight.flatten(1), (0, winograd_tiles.padded(channels) - channels))
    slopes = torch.empty_like(x) if of_x else None
    total = x.new_zeros(min(outputs, channels), max(outputs, channels)) if of_weight else None
    for part, slope, into in _parts(x, grad, x if slopes is None else slopes):
        if total is not None:
            values = relu_of(part, "second") if relu else part
            total.addmm_(*((slope.t(), values) if outputs < channels else (values.t(), slope)))
        if slopes is not None:
            put_rows(_multiplied(slope, matrix), into, where_positive=part if relu else None)
    if total is None:
        return slopes, None
    return slopes, (total if outputs < channels else total.t()).reshape(weight.shape)


def _multiplied(rows: Tensor, matrix: Tensor) -> Tensor:
    return torch.mm(rows, matrix, out=workspace("second", (len(rows), matrix.shape[1]), rows))


def _parts(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Contiguous maps of equal sizes as matrices of one row a position, some rows at a time."""
    matrices = [maps.view(-1, maps.shape[3]) for maps in (x, *others)]
    count = max(1, _ROW_VALUES // max(matrix.shape[1] for matrix in matrices))
    return zip(*(matrix.split(count) for matrix in matrices), strict=True)
