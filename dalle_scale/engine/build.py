"""The process group, and an engine for each net. Beside it only `fp32 master weights` and `mixed` import DeepSpeed."""

from __future__ import annotations

import gc
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # else it warns at import

import deepspeed

from dalle_scale import dist
from dalle_scale.config import RunConfig
from dalle_scale.engine import ds_config, masters, mixed, optim, shared_memory
from dalle_scale.engine.nodes import Nodes
from dalle_scale.engine.scaling import Scaling
from dalle_scale.engine.trained_net import TrainedNet
from dalle_scale.nn import residual_scaling
from dalle_scale.nn.kept_memory import keep_memory
from dalle_scale.types import Nets


def start() -> None:
    """Join the process group that the launcher's environment describes, quietly; without a launcher, a group of one."""
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    if dist.device().type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        processes_here = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes_here))
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # what DeepSpeed calls, on every rank
    # What DeepSpeed could compile: nothing that training uses. Asking would try compilers and show what they miss, and
    # an all-reduce for inference on CPUs takes half a minute
    deepspeed.ops.__compatible_ops__ = {}
    if dist.device().type == "cuda":
        torch.cuda.set_device(dist.device())
    else:
        keep_memory()
    deepspeed.init_distributed(verbose=False)
    if dist.device().type == "cpu" and dist.world_size() > 1:
        dist.use_shared_memory(shared_memory.share(dist.rank(), dist.world_size()))


def share(nets: Nets) -> None:
    """Move the nets to this rank's device and give them rank 0's parameters and buffers. DeepSpeed would leave the
    buffers out."""
    for net in nets.values():
        net.to(dist.device())
        for tensor in [*net.parameters(), *net.buffers()]:
            dist.broadcast(tensor.data)


class TrainedNets(dict[str, TrainedNet]):
    """All nets in training, by name."""

    @property
    def modules(self) -> Nets:
        """The bare modules."""
        return {name: trained_net.module for name, trained_net in self.items()}

    def prefix(self, name: str) -> str:
        """Prefix of the log keys of one of several nets."""
        return f"{name}/" if len(self) > 1 else ""

    def numbers(self) -> dict[str, float]:
        """Numbers of the nets for the log."""
        return {
            self.prefix(name) + key: value
            for name, trained_net in self.items()
            for key, value in trained_net.numbers().items()
        }

    def losses_finite(self) -> bool:
        """Whether all losses on this rank were finite so far. Waits for the device."""
        return all(trained_net.losses_finite() for trained_net in self.values())

    def healthy(self) -> bool:
        """Whether losses on this rank and the weights that it steps are finite. Waits for the device."""
        return all(trained_net.healthy() for trained_net in self.values())

    @contextmanager
    def updating(self, name: str) -> Iterator[Nets]:
        """The nets as the loss of net `name` may use them: its own engine; of the others the bare modules, frozen.
        Calling another engine, or leaving its parameters trainable, breaks DeepSpeed's bookkeeping."""
        others = [p for other in self.values() if other.name != name for p in other.module.parameters()]
        trained = [parameter for parameter in others if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield {**self.modules, name: self[name].engine}
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    @contextmanager
    def evaluating(self) -> Iterator[Nets]:
        """All nets with their averaged weights, whole and in eval mode, without gradients. Collective."""
        with ExitStack() as stack, torch.no_grad():
            yield {name: stack.enter_context(trained_net.evaluating()) for name, trained_net in self.items()}


def build(config: RunConfig, nets: Nets) -> TrainedNets:
    """Engines for `nets`, whose weights and buffers must be equal on all ranks (`share`)."""
    trained_nets = TrainedNets()
    for name, net in nets.items():
        if config.engine.activation_checkpointing:
            _recompute_activations(net)
        evaluation_copy = TrainedNet.evaluation_copy_of(net, config, name)
        nodes = None  # of each net its own: errors of compression are those of its gradients
        if config.engine.nodes > 1 or config.engine.compression_rank:
            nodes = Nodes(config.engine.nodes, config.engine.compression_rank, config.seed)
        place = nodes.place if nodes else dist.rank()  # replicas must round alike
        without_masters = config.optim[name].kind == "adamw16"
        if without_masters:
            residual_scaling.cast(net, config.engine.dtype)
        optimizer = optim.build(net, config.optim[name], seed=(config.seed << 20) + place)
        derived = ds_config.derive(config, name, dist.world_size())
        with mixed.a_buffer_a_group() if without_masters else nullcontext():
            engine = _engine(net, optimizer, derived, nodes)
        scaling = None
        if without_masters:
            mixed.finalize(engine)
            scales = [scale for scale, _ in residual_scaling.branches_of(net)]
            scaling = Scaling(scales, config.engine.dtype == "fp16", config.optim[name].clip_norm)
        masters.clear_padding(engine)
        trained_nets[name] = TrainedNet(name, engine, config, evaluation_copy, nodes, scaling)
        for buffer_name, buffer in net.named_buffers():
            assert buffer.dtype not in (torch.float16, torch.bfloat16), f"buffer {buffer_name} is {buffer.dtype}"
    gc.freeze()  # modules and engines stay to the end: spare every collection from looking at them, the last one too
    return trained_nets


def _recompute_activations(net: nn.Module) -> None:
    """Switch on recomputation in every module that offers it."""
    for module in net.modules():
        if hasattr(module, "activation_checkpointing"):
            setattr(module, "activation_checkpointing", True)  # noqa: B010 (not an attribute of every module)


def _engine(net: nn.Module, optimizer: torch.optim.Optimizer, derived: dict[str, Any], nodes: Nodes | None) -> Any:
    """DeepSpeed's engine around one net."""
    for name, parameter in net.named_parameters():
        assert parameter.ndim > 0, f"{name} has no dimensions, and DeepSpeed 0.19 cannot share it: give it shape [1]"
    # At ZeRO 0 in bf16 the constructor takes a step to allocate states: it must change nothing and not be counted
    optim.set_lr(optimizer, 0.0)
    engine, _, _, _ = deepspeed.initialize(model=net, optimizer=optimizer, config=derived, mpu=nodes)
    optimizer.state.clear()
    if derived["zero_optimization"]["stage"] == 0:
        engine.enable_backward_allreduce = False  # nodes.GradientMeans averages, in fp32
    return engine
