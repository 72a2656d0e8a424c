"""Activation memory of one micro-batch on a rank, traced through forward and backward on the device "meta": nothing is
computed and no memory used, and yet every tensor is met at its size."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dalle_scale import config as configs
from dalle_scale import stages
from dalle_scale.config import RunConfig
from dalle_scale.types import Batch, BatchSpec, Nets, Stage, UserError

_plain_attention = F.scaled_dot_product_attention


def activations(config: RunConfig, nets: Nets, micro_batch_size: int) -> dict[str, int]:
    """Bytes of one micro-batch on one rank: `saved`, what the graph holds between forward and backward, and `peak`,
    the most that is there at any time of the two, temporary tensors and the gradient being computed included.

    `nets` are the stage's, on "meta", and stay as they are. Of several nets in training the largest turn counts, at
    the last step. Buffers and weights are not counted.

    Raises:
        UserError: the stage needs its image tokenizer in the step.
    """
    stage = open_stage(config)
    working = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.engine.dtype]
    step = config.steps - 1
    found = []
    with torch.device("meta"), _fused():
        nets, batch = copy.deepcopy(nets), _batch(_inputs(stage), micro_batch_size)
        for net in nets.values():
            _prepare(net, working, config.engine.activation_checkpointing)
        trained = {name: [p for p in net.parameters() if p.requires_grad] for name, net in nets.items()}
        tensors = [*batch.values(), *(t for net in nets.values() for t in [*net.parameters(), *net.buffers()])]
        own = {tensor.untyped_storage()._cdata for tensor in tensors}
        for net_name in stage.nets_to_update(step):
            for name, parameters in trained.items():
                for parameter in parameters:
                    parameter.requires_grad_(name == net_name)
            live = _Live(own)
            with live:
                with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda tensor: tensor):
                    total = stage.loss(net_name, nets, batch, step).total
                saved = live.forget_saved()
                total.backward()
            found.append({"saved": saved, "peak": live.peak_bytes})
    return {name: max(sizes[name] for sizes in found) for name in ("saved", "peak")}


def open_stage(config: RunConfig) -> Stage:
    """The stage without the image tokenizer below it."""
    kind = stages.resolve(config.stage)
    return kind(configs.parse(kind.Config, config.model, where="model"))


def _inputs(stage: Stage) -> BatchSpec:
    try:
        return stage.inputs
    except UserError as error:
        raise UserError(f"{error}; a plan opens no tokenizer: plan without, and add its cost") from None


def _prepare(net: nn.Module, working: torch.dtype, recompute: bool) -> None:
    """As the engine has a net: weights in working precision, buffers as they are, gradients taken away as they come
    (the static estimate has them)."""
    for parameter in net.parameters():
        parameter.data = parameter.data.to(working)
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    for module in net.modules():
        if hasattr(module, "activation_checkpointing"):
            setattr(module, "activation_checkpointing", recompute)  # noqa: B010 (not an attribute of every module)


def _batch(inputs: BatchSpec, samples: int) -> Batch:
    """A batch without content."""
    batch = {name: torch.empty(samples, dtype=torch.int64) for name in ("id", "seed")}
    batch["weight"] = torch.empty(samples)
    if inputs.image_size:
        shape = (samples, 3, inputs.image_size, inputs.image_size)
        batch["image"] = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    if inputs.text_length:
        batch["text"] = torch.empty(samples, inputs.text_length, dtype=torch.int64)
    if inputs.num_codes:
        batch["codes"] = torch.empty(samples, inputs.num_codes, dtype=torch.int64)
    return batch


@contextmanager
def _fused() -> Iterator[None]:
    """Attention as one fused kernel. Not a mode of torch, which would not reach what the backward pass recomputes."""
    F.scaled_dot_product_attention = _fused_attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = _plain_attention


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False
) -> Any:
    """Attention on "meta" as CPUs and GPUs do it, in one kernel that keeps no scores; PyTorch would take it apart."""
    if query.ndim != 4:  # PyTorch's own rule
        return _plain_attention(query, key, value, attn_mask, dropout_p, is_causal)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask)[0]


class _Live(TorchDispatchMode):
    """Distinct memory besides that in `own`: bytes alive of what is made inside the block or saved there by autograd,
    the most so far, and what autograd saves."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._own = own
        self._alive: dict[int, tuple[Any, int]] = {}
        self._saved: dict[int, Tensor] = {}
        self._bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        return out

    def pack(self, tensor: Tensor) -> Tensor:
        """Hook of saved tensors. What was made before, and is kept for every step, is met here for the first time."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._saved.setdefault(storage._cdata, tensor.detach())
            self._meet(storage)
        return tensor

    def forget_saved(self) -> int:
        """Bytes saved; lets go of them."""
        size = sum(tensor.untyped_storage().nbytes() for tensor in self._saved.values())
        self._saved.clear()
        return size

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._own and key not in self._alive:
            self._alive[key] = (weakref.ref(storage, lambda _: self._free(key)), storage.nbytes())
            self._bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self._bytes)

    def _free(self, key: int) -> None:
        self._bytes -= self._alive.pop(key)[1]
