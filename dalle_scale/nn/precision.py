"""In which precision this machine multiplies fastest, measured on the layers of a net: `dtype: auto`.

A layer is timed forwards and backwards, as it is called on this device, on maps and rows of about the size that a
training step gives it. Rates are kept in $XDG_CACHE_HOME/dalle_scale/matrix_rates.json (~/.cache without it) under
everything that they depend on; a file that cannot be read or written only means that they are measured again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle_scale import dist
from dalle_scale.nn import residual_scaling
from dalle_scale.nn.causal_conv import CausalConv
from dalle_scale.nn.compiled import cache_folder
from dalle_scale.nn.linear import TransposedLinear

WIN = 1.5  # auto takes bf16 from so many times the rate of fp32 on
LAYERS = 4  # timed, those with the most weights; a net has few shapes that differ
SIDE = 16  # of the maps of convolutions
MOST_ROWS = {"cpu": 1024, "cuda": 65536}  # of a matrix product, or positions of maps: few would time a GPU's launches
MOST_FLOPS = {"cpu": 1e9, "cuda": 1e12}  # of a timed call
LEAST_SECONDS = 0.004  # of a timed call, unless it has MOST_ROWS or MOST_FLOPS
CALLS = 3  # whose best counts
TYPES = {"fp32": torch.float32, **residual_scaling.HALF_TYPES}
MATRICES, MAPS = nn.Linear | TransposedLinear, nn.Conv2d | nn.ConvTranspose2d | CausalConv
_FILE = "matrix_rates.json"
ASKED = ("fp32", "bf16", "auto")  # what --dtype takes


@dataclass(frozen=True)
class Choice:
    """A precision and why, as a part of a sentence."""

    dtype: str
    why: str


def choose(nets: Iterable[nn.Module], device: torch.device) -> Choice:
    """fp32, or bf16 where it wins by WIN. The nets may lie on "meta" and stay as they are."""
    rates = matrix_rates(nets, device)
    if "bf16" not in rates:
        return Choice("fp32", "these nets have no matrices to time")
    gain = rates["bf16"] / rates["fp32"]
    others = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.items() if name not in ("fp32", "bf16"))
    rates_text = (
        f"{rates['bf16'] / 1e9:.0f} GFLOP/s, fp32 {rates['fp32'] / 1e9:.0f} ({gain:.2f} x{others and '; '}{others})"
    )
    return Choice("bf16" if gain >= WIN else "fp32", rates_text if gain >= WIN else f"bf16 has {rates_text}")


def agreed(nets: Iterable[nn.Module], device: torch.device) -> Choice:
    """Choice of rank 0 on all ranks, with the reason on rank 0 alone. Collective, once the ranks have joined."""
    choice = choose(nets, device) if dist.is_main() else Choice("fp32", "")
    [found] = dist.sum_on_host([choice.dtype == "bf16"])
    return Choice("bf16" if found else "fp32", choice.why)


def cast(nets: dict[str, nn.Module], device: torch.device, asked: str) -> str:
    """Give the matrices of nets that are not trained the type that `--dtype` asks for, fp32, bf16, fp16 or auto; which
    it became. With auto collective, and the ranks join for it."""
    if asked == "auto":
        dist.join()
        asked = agreed(nets.values(), device).dtype
    for net in nets.values() if asked != "fp32" else ():
        residual_scaling.cast(net, asked)
    return asked


def matrix_rates(nets: Iterable[nn.Module], device: torch.device) -> dict[str, float]:
    """Floating-point operations a second in "fp32", "bf16" and on GPUs "fp16", over the layers that hold most of the
    weights; {} for nets without linear layers and convolutions. Takes less than half a second, or a file's reading."""
    layers = _layers(nets)
    if not layers:
        return {}
    names = [name for name in TYPES if name != "fp16" or device.type == "cuda"]
    flags = hashlib.sha256(" ".join(processor()[1]).encode()).hexdigest()[:12]
    where = processor()[0] if device.type == "cpu" else torch.cuda.get_device_name(device)
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    key = f"{where} {flags} torch {torch.__version__} {threads} threads {[_shape(layer) for layer, _ in layers]}"
    kept = _read()
    if not _is_rates(kept.get(key), names):
        found: dict[str, float] = {}
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
            plain = _probe(torch.float32, device)
            for name in names:
                slower = _probe(TYPES[name], device) / plain
                if slower > 2 and "fp32" in found:  # emulated: its layers would take seconds
                    found[name] = found["fp32"] / slower
                    continue
                seconds = sum(share / _rate(layer, TYPES[name], device) for layer, share in layers)
                found[name] = sum(share for _, share in layers) / seconds
        kept = {**_read(), key: found}
        _write(kept)
    return {name: float(kept[key][name]) for name in names}


def processor() -> tuple[str, list[str]]:
    """Name of the processor, and everything that it says it can; [] where the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in info.read_text(encoding="utf-8").splitlines()] if info.exists() else []
    known = {key.strip(): value.strip() for key, _, value in reversed(lines)}  # the first core's
    flags = known.get("flags", known.get("Features", ""))  # x86 and ARM
    return known.get("model name") or platform.processor() or platform.machine(), sorted(flags.split())


def _layers(nets: Iterable[nn.Module]) -> list[tuple[nn.Module, float]]:
    """Linear layers and convolutions of distinct shapes, each with the weights of all that have it."""
    weights, examples = Counter[str](), {}
    for module in (module for net in nets for module in net.modules()):
        if isinstance(module, MATRICES | MAPS):
            weights[_shape(module)] += sum(parameter.numel() for parameter in module.parameters())
            examples[_shape(module)] = module
    return [(examples[shape], float(count)) for shape, count in weights.most_common(LAYERS)]


def _shape(layer: nn.Module) -> str:
    sizes = [list(parameter.shape) for parameter in layer.parameters()]
    return f"{type(layer).__name__}{sizes}{getattr(layer, 'stride', '')}"


def _probe(dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of a small matrix product."""
    x = torch.randn(256, 256, device=device).to(dtype)
    return min(_seconds(lambda: x @ x, device) for _ in range(CALLS))


def _rate(layer: nn.Module, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of forward and backward, at as many rows as take LEAST_SECONDS."""
    with torch.device(device):
        layer = copy.deepcopy(layer).to_empty(device=device).to(dtype)
        for parameter in layer.parameters():
            nn.init.normal_(parameter.requires_grad_(True), std=0.02)
    weights = sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim > 1)
    rows, most = 16 if isinstance(layer, MATRICES) else SIDE**2, MOST_FLOPS[device.type]
    while True:
        seconds = _timed(layer, rows, dtype, device)
        if seconds < 10 * LEAST_SECONDS:
            seconds = min(seconds, *(_timed(layer, rows, dtype, device) for _ in range(CALLS - 1)))
        rate = 6 * rows * weights / seconds
        if seconds >= LEAST_SECONDS or 2 * rows > MOST_ROWS[device.type] or 12 * rows * weights > most:
            return rate
        rows *= 4 if seconds < LEAST_SECONDS / 4 else 2


def _timed(layer: nn.Module, rows: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of one forward and backward pass."""
    x = torch.randn(_input(layer, rows), device=device).to(dtype)
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_(True)
    layer(x)  # the first call of a shape prepares

    def step() -> None:
        out: Tensor = layer(x)
        torch.autograd.grad(out, [x, *layer.parameters()], out.detach(), allow_unused=True)

    return _seconds(step, device)


def _input(layer: nn.Module, rows: int) -> tuple[int, ...]:
    samples = rows // SIDE**2
    if isinstance(layer, CausalConv):
        return (samples, SIDE, SIDE, layer.above.shape[1])
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        side = SIDE * layer.stride[0] if isinstance(layer, nn.Conv2d) else SIDE
        return (samples, layer.in_channels, side, side)
    weight: Any = layer.weight
    return (rows, weight.shape[1])


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call."""
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def _read() -> dict[str, Any]:
    try:
        kept = json.loads((cache_folder() / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: nobody knows this user's home
        return {}
    return kept if isinstance(kept, dict) else {}


def _is_rates(kept: Any, names: list[str]) -> bool:
    return isinstance(kept, dict) and all(isinstance(kept.get(n), int | float) and kept[n] > 0 for n in names)


def _write(kept: dict[str, Any]) -> None:
    try:
        path = cache_folder() / _FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            json.dump(kept, file, indent=1)
        Path(file.name).replace(path)
    except (OSError, RuntimeError):
        return
