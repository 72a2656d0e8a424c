"""Cost of a run on a cluster, before anything is rented or allocated: memory, operations, network traffic, time.

Everything is counted from the config and nets on the device "meta"; nothing here has seen the cluster. `document` is
the whole plan, as JSON holds it.

Memory of a rank: what lasts is `engine.memory`. On top come the activations of one micro-batch, traced through
forward and backward; DeepSpeed's buckets; at ZeRO 3 the weights that are gathered at a time; and, instead of these
three, the copies of gradients that the optimizer step makes. Left out: the CUDA context, workspaces of kernels, the
evaluation's copy of the weights, a frozen tokenizer.

Bytes sent are those of ring collectives over n ranks, of which each rank sends to the next one: all-reduce 2 (n - 1) /
n of the tensor, reduce-scatter and all-gather (n - 1) / n of the whole. Left out: scalars, statistics of codebooks.
ZeRO's rings span all ranks, or with `engine.nodes` those of one node, and gradients go round a second ring.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field
from torch import nn

from dalle_scale.cluster.activation_memory import activations, open_stage
from dalle_scale.config import RunConfig
from dalle_scale.engine import ds_config, memory, optim, powersgd, precision
from dalle_scale.types import Nets, StrictModel, UserError

USABLE_SHARE = 0.92  # of a GPU's memory; the rest for the CUDA context, kernels' workspaces and fragmentation
RECOMPUTED = 4 / 3  # work with activation checkpointing: forward twice, and the backward pass is two forwards


class Cluster(StrictModel):
    """The nodes, all alike, and what is asked of them."""

    nodes: int = Field(gt=0)
    gpus: int = Field(gt=0)  # of each node
    memory_gib: float = Field(gt=0)  # of each GPU
    flops: float = Field(gt=0)  # matrix rate of each GPU in the run's precision, floating-point operations a second
    intra_gbps: float = Field(gt=0)  # that each GPU sends to its neighbour in the node, 1e9 bits a second
    inter_gbps: float = Field(gt=0)  # that each node sends, all its network cards together
    utilisation: float = Field(default=0.4, gt=0, le=1)  # share of the matrix rate that training reaches; an assumption

    @property
    def world_size(self) -> int:
        """Ranks, one a GPU."""
        return self.nodes * self.gpus


# ---- memory of a rank ----


def memory_bytes(config: RunConfig, nets: Nets, world_size: int, activation_bytes: int) -> dict[str, int]:
    """Bytes of one of `world_size` ranks by kind. `sum` counts the backward pass, `peak` the larger of
    that and the optimizer step."""
    sizes: dict[str, int] = defaultdict(int)
    copies = 0
    for name, net in nets.items():
        for kind, size in memory.estimate(net, config, name, world_size // config.engine.nodes).items():
            sizes[kind] += size
        kept, factors = _compression(config, net, name, world_size)
        sizes["compression"] += kept
        for kind, size in _passing(config, net, name, world_size).items():
            sizes[kind] += size
        copies = max(copies, factors, _step_copies(config, net, name, world_size))
    passing = sizes["buckets"] + sizes["gathered weights"] + activation_bytes
    lasting = sum(sizes.values()) - sizes["buckets"] - sizes["gathered weights"]
    total = lasting + passing
    return {**sizes, "activations": activation_bytes, "sum": total, "peak": max(total, lasting + copies)}


def _passing(config: RunConfig, net: nn.Module, name: str, world_size: int) -> dict[str, int]:
    """Buffers of DeepSpeed 0.19 in the backward pass: the bucket of gradients and the flat copy that it sends; at
    ZeRO 3 the weights whose next use is near."""
    element, zero = memory.element_bytes(net, config, name), _zero(config, name, world_size)
    if zero["stage"] == 0:
        return {"buckets": 0, "gathered weights": 0}
    largest = max(parameter.numel() for parameter in net.parameters())
    working, bucket = max(element.values()), zero["reduce_bucket_size"]
    buckets = working * max(bucket, largest) + (working * bucket if zero["contiguous_gradients"] else 0)
    gathered = 0.0
    if zero["stage"] == 3:
        cut, whole = _cut_and_whole(net, zero)
        near = zero["stage3_max_reuse_distance"] // 2 + zero["stage3_prefetch_bucket_size"] + largest
        numel = sum(parameter.numel() for parameter in cut)
        gathered = _size(whole, element) + _size(cut, element) * min(1.0, near / max(1, numel))
    return {"buckets": buckets, "gathered weights": round(gathered)}


def _step_copies(config: RunConfig, net: nn.Module, name: str, world_size: int) -> int:
    """Gradients of one param group of this rank, made flat and, but for adamw16, fp32 for its step; at ZeRO 0 of all
    groups at once."""
    element, zero = memory.element_bytes(net, config, name), _zero(config, name, world_size)
    short = config.engine.dtype != "fp32" and config.optim[name].kind != "adamw16"
    groups: list[tuple[int, int]] = [
        (sum(p.numel() for p in group["params"]), _size(group["params"], element))
        for group in _groups(config, net, name)
    ]
    if zero["stage"] == 0:
        return sum((4 * numel if short else 0) + (size if world_size > 1 else 0) for numel, size in groups)
    copies = []
    for numel, size in groups:
        owned = math.ceil(numel * config.engine.nodes / world_size)
        owned = min(owned, zero["sub_group_size"]) if zero["stage"] == 3 else owned
        copies.append(owned * (size // numel + (4 if short else 0)))
    return max(copies)


def _compression(config: RunConfig, net: nn.Module, name: str, world_size: int) -> tuple[int, int]:
    """Memory of PowerSGD, in fp32: the error and the Q of every matrix; and what it makes for a step: P before and
    after it is made orthonormal and the other factor in fp32, and the larger of the two twice as it travels."""
    rank, element = config.engine.compression_rank, memory.element_bytes(net, config, name)
    kept = made = 0.0
    for matrix, rows, columns, count in _compressed(config, net, name, world_size):
        short, long = sorted((rows, columns))
        kept += 4 * count * (short * long + rank * long)
        made += count * rank * (4 * (2 * short + long) + 2 * element[matrix] * long)
    return round(kept), round(made)


def _zero(config: RunConfig, name: str, world_size: int) -> dict[str, Any]:
    section: dict[str, Any] = ds_config.derive(config, name, world_size)["zero_optimization"]
    return section


def _size(parameters: Iterable[nn.Parameter], element: dict[nn.Parameter, int]) -> int:
    """Bytes."""
    return sum(parameter.numel() * element[parameter] for parameter in parameters)


def _cut_and_whole(net: nn.Module, zero: dict[str, Any]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that ZeRO 3 gathers for each use, and the small ones that stay whole on every rank."""
    least = zero["stage3_param_persistence_threshold"]
    parameters = list(net.parameters())
    return [p for p in parameters if p.numel() > least], [p for p in parameters if p.numel() <= least]


# ---- bytes on the wire ----


def collective_bytes(config: RunConfig, net: nn.Module, name: str, world_size: int) -> dict[str, float]:
    """Bytes of the whole tensors that one step of a net puts through each kind of collective.

    G gradients and W weights, in working precision, a micro-batches a step:

        ZeRO 0    all-reduce G, in fp32; all-gather what Muon makes of it
        ZeRO 1    all-reduce G, all-gather W
        ZeRO 2    a times all-reduce G, all-gather W
        ZeRO 3    a times all-gather W, again what of W is needed again only later, and reduce-scatter G

    DeepSpeed 0.19 all-reduces at ZeRO 1 and 2 where a reduce-scatter would do. At ZeRO 3 weights stay between forward
    and backward where at most `stage3_max_reuse_distance` elements are used between; nets have their layers in a row.
    """
    zero, element = _zero(config, name, world_size), memory.element_bytes(net, config, name)
    groups = {group["role"]: group["params"] for group in _groups(config, net, name)}
    trained = [p for group in _groups(config, net, name) for p in group["params"]]
    gradients, weights = _size(trained, element), _size(net.parameters(), element)
    repeated = config.accumulation(world_size)
    if zero["stage"] == 0:
        reduced = {"all_reduce": 4.0 * sum(p.numel() for p in trained)}
        if not (matrices := groups.get("muon", [])):
            return reduced
        dealt = optim.deal([matrix.shape for matrix in matrices], world_size)
        most = max(sum(matrices[index].numel() for index in indices) for indices in dealt)  # of one rank
        return {**reduced, "all_gather": 4.0 * most * world_size}
    if zero["stage"] < 3:
        return {"all_reduce": gradients * (repeated if zero["stage"] == 2 else 1), "all_gather": weights}
    cut, whole = _cut_and_whole(net, zero)
    numel = sum(parameter.numel() for parameter in cut)
    again = max(0, numel - zero["stage3_max_reuse_distance"] // 2) / max(1, numel)
    gathered = repeated * _size(cut, element) * (1 + again) + _size(whole, element)
    return {"all_gather": gathered, "reduce_scatter": repeated * gradients}


def _groups(config: RunConfig, net: nn.Module, name: str) -> list[dict[str, Any]]:
    return optim.param_groups(net, config.optim[name])


def sent_bytes(collectives: dict[str, float], ranks: int) -> float:
    """Bytes that each rank sends: `collective_bytes` by ring."""
    share = (ranks - 1) / ranks
    return sum((2 if kind == "all_reduce" else 1) * share * size for kind, size in collectives.items())


def between_nodes_bytes(config: RunConfig, net: nn.Module, name: str, world_size: int) -> float:
    """Bytes of the tensors that a rank puts through all-reduce with its replicas in other nodes in one step: its
    slice of the gradients, matrices as factors where `engine.compression_rank` makes that smaller. The mean of
    the ranks of a node: at ZeRO 1 and 2 these hold different matrices."""
    if config.engine.nodes == 1:
        return 0.0
    rank, element = config.engine.compression_rank, memory.element_bytes(net, config, name)
    compressed = _compressed(config, net, name, world_size)
    saved = sum(
        element[matrix] * (rows * columns - rank * (rows + columns)) * count
        for matrix, rows, columns, count in compressed
    )
    trained = [p for group in _groups(config, net, name) for p in group["params"]]
    return _size(trained, element) * config.engine.nodes / world_size - saved


def _compressed(
    config: RunConfig, net: nn.Module, name: str, world_size: int
) -> list[tuple[nn.Parameter, int, int, float]]:
    """Matrices that PowerSGD compresses on a rank, each with its rows and columns there and how many of it: blocks of
    the rows of each at ZeRO 3, whole ones shared out among the ranks before; see engine/nodes.py."""
    ranks, rank, found = world_size // config.engine.nodes, config.engine.compression_rank, []
    matrices = [p for group in _groups(config, net, name) if group["role"] == "matrix" for p in group["params"]]
    for matrix in matrices if rank else ():
        rows, columns = matrix.shape[0], matrix.numel() // matrix.shape[0]
        if config.engine.zero == 3:
            if rows % ranks == 0 and powersgd.pays(rows // ranks, columns, rank):
                found.append((matrix, rows // ranks, columns, 1.0))
        elif powersgd.pays(rows, columns, rank):
            found.append((matrix, rows, columns, 1 / ranks))
    return found


# ---- the plan ----


def document(config: RunConfig, cluster: Cluster) -> dict[str, Any]:
    """The plan at every ZeRO stage, what does not fit as configured, and what fixes it.

    Raises:
        UserError: a config that these ranks or the engine cannot run, or a stage that needs its tokenizer in the step.
    """
    was_open, config = config.engine.dtype == "auto", precision.assumed(config)
    ds_config.check(config, cluster.world_size, None)
    stage = open_stage(config)
    with torch.device("meta"):
        nets = stage.nets()
    ds_config.check_nets(config, nets)
    weigh = _Scales(nets, cluster)
    flops = stage.flops_per_sample() * config.global_batch_size
    other = _changed(config, activation_checkpointing=not config.engine.activation_checkpointing)
    here, there = weigh.activations(config), weigh.activations(other)
    with_it, without = (here, there) if config.engine.activation_checkpointing else (there, here)
    rows = [_row(_changed(config, zero=zero), weigh, flops) for zero in range(4)]
    fits = rows[config.engine.zero]["fits"]
    return {
        "config": config.model_dump(mode="json"),
        "assumes_bf16": was_open,
        "cluster": {**cluster.model_dump(), "ranks": cluster.world_size, "usable_share": USABLE_SHARE},
        "parameters": {name: _parameters(net) for name, net in nets.items()},
        "micro_batch_size": config.micro_batch_size(cluster.world_size),
        "accumulation": config.accumulation(cluster.world_size),
        "flops": {"step": flops, "rank": flops / cluster.world_size},
        "activation_bytes": {"with_checkpointing": with_it, "without_checkpointing": without},
        "zero": rows,
        "fits": fits,
        "fixes": [] if fits else fixes(config, weigh),
    }


class _Scales:
    """Memory of configs that differ in `engine` only. Traces activations once for all that share them."""

    def __init__(self, nets: Nets, cluster: Cluster) -> None:
        self.nets, self.cluster = nets, cluster
        self._traced: dict[tuple[Any, ...], dict[str, int]] = {}

    def activations(self, config: RunConfig) -> dict[str, int]:
        micro = config.micro_batch_size(self.cluster.world_size)
        key = (micro, config.engine.dtype, config.engine.activation_checkpointing)
        if key not in self._traced:
            self._traced[key] = activations(config, self.nets, micro)
        return self._traced[key]

    def memory(self, config: RunConfig) -> dict[str, int]:
        return memory_bytes(config, self.nets, self.cluster.world_size, self.activations(config)["peak"])

    def fits(self, sizes: dict[str, int]) -> bool:
        return sizes["peak"] <= USABLE_SHARE * self.cluster.memory_gib * 2**30


def _row(config: RunConfig, weigh: _Scales, flops: float) -> dict[str, Any]:
    """One ZeRO stage: memory, bytes, time."""
    cluster, sizes = weigh.cluster, weigh.memory(config)
    collectives, between, ranks = defaultdict[str, float](float), 0.0, cluster.world_size // config.engine.nodes
    for name, net in weigh.nets.items():
        for kind, size in collective_bytes(config, net, name, cluster.world_size).items():
            collectives[kind] += size
        between += between_nodes_bytes(config, net, name, cluster.world_size)
    sent, wire = _links(
        sent_bytes(collectives, ranks), sent_bytes({"all_reduce": between}, config.engine.nodes), ranks, cluster
    )
    work = flops * (RECOMPUTED if config.engine.activation_checkpointing else 1)
    compute = work / (cluster.world_size * cluster.flops * cluster.utilisation)
    seconds = {"compute": compute, "communication": wire, "overlapped": max(compute, wire), "in_turn": compute + wire}
    return {
        "zero": config.engine.zero,
        "runs": _runs(config, cluster.world_size),
        "memory_bytes": sizes,
        "fits": weigh.fits(sizes),
        "collective_bytes": {**collectives, "between_nodes": between},
        "sent_bytes": sent,
        "step_seconds": seconds,
        "days": {key: seconds[key] * config.steps / 86_400 for key in ("overlapped", "in_turn")},
    }


def _links(by_zero: float, between: float, ranks: int, cluster: Cluster) -> tuple[dict[str, float], float]:
    """Bytes that a rank sends, mean over a node, by where they go; and the seconds of the slowest link.

    A ring of ZeRO's `ranks` that spans several nodes leaves each of them once. The rings between replicas leave a
    node from every rank of it, if there are several nodes."""
    over = by_zero / cluster.gpus if ranks > cluster.gpus else 0.0
    out = over + (between if cluster.nodes > 1 else 0.0)
    inside = by_zero + between - out
    wire = [8 * by_zero / (cluster.intra_gbps * 1e9) if cluster.gpus > 1 else 0.0]
    wire.append(8 * over * cluster.gpus / (cluster.inter_gbps * 1e9))
    second = 8 * (out - over) * cluster.gpus / (cluster.inter_gbps * 1e9)
    if cluster.nodes == 1:
        second = 8 * between / (cluster.intra_gbps * 1e9)
    sent = {"rank": by_zero + between, "intra_machine": inside, "inter_machine": out}
    return sent, max(wire) + second


def fixes(config: RunConfig, weigh: _Scales) -> list[str]:
    """The fewest changes of `engine` with which the run fits, as overrides; the first found of equally many. Empty
    where none does."""
    engine, ranks = config.engine, weigh.cluster.world_size
    micro, share = config.micro_batch_size(ranks), config.global_batch_size // ranks
    choices: dict[str, list[Any]] = {
        "zero": [zero for zero in (1, 2, 3) if zero > engine.zero],
        "compression_rank": [0] if engine.compression_rank else [],
        "nodes": [1] if engine.nodes > 1 else [],
        "activation_checkpointing": [] if engine.activation_checkpointing else [True],
        "micro_batch_size": [size for size in range(micro - 1, 0, -1) if share % size == 0],
        "dtype": ["bf16"] if engine.dtype == "fp32" else [],
    }
    ways = itertools.product(*([None, *values] for values in choices.values()))
    for way in sorted(ways, key=lambda way: sum(value is not None for value in way)):
        changes = {key: value for key, value in zip(choices, way, strict=True) if value is not None}
        changed = _changed(config, **changes)
        if _runs(changed, ranks) and weigh.fits(weigh.memory(changed)):
            return [f"engine.{key}={str(value).lower()}" for key, value in changes.items()]
    return []


def _changed(config: RunConfig, **engine: Any) -> RunConfig:
    return config.model_copy(update={"engine": config.engine.model_copy(update=engine)})


def _runs(config: RunConfig, world_size: int) -> bool:
    """Whether the engine takes it."""
    try:
        ds_config.check(config, world_size, None)
    except UserError:
        return False
    return True


def _parameters(net: nn.Module) -> dict[str, int]:
    """Counts: all, in matrices, in embeddings and unembeddings."""
    embeddings = sum(p.numel() for p in net.parameters() if getattr(p, "is_embedding", False))
    matrices = sum(p.numel() for p in net.parameters() if p.ndim >= 2) - sum(
        p.numel() for p in net.parameters() if p.ndim >= 2 and getattr(p, "is_embedding", False)
    )
    return {"total": sum(p.numel() for p in net.parameters()), "matrices": matrices, "embeddings": embeddings}
