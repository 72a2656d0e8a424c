"""Two levels of data parallelism: ZeRO among the ranks of a node, gradients averaged, and if wanted compressed
(powersgd.py), between nodes by us.

Ranks are numbered node by node. Those of the same place in every node hold the same slice of the same weights
("data-parallel replicas"); each step they average their gradients, which makes all nodes one large batch (arXiv
2102.12092, Sec. 2.5). DeepSpeed sees one node: its data-parallel group is the node's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dalle_scale import dist
from dalle_scale.engine.powersgd import PowerSGD, pays
from dalle_scale.engine.shared_memory import room

BUCKET_ELEMENTS = 16 * 1024 * 1024  # of gradients that travel together


class Nodes:
    """The groups, and DeepSpeed's view of them (the `mpu` of `deepspeed.initialize`). Collective to make."""

    def __init__(self, nodes: int, compression_rank: int = 0, seed: int = 0) -> None:
        """
        Args:
            nodes: number of them; divides the world size.
            compression_rank: r of PowerSGD; 0 = exact means.
            seed: of the run.
        """
        world_size = dist.world_size()
        assert world_size % nodes == 0, "checked by ds_config.check"
        self.nodes, self.ranks_each = nodes, world_size // nodes
        self.node, self.place = divmod(dist.rank(), self.ranks_each)
        ranks = torch.arange(world_size).view(nodes, self.ranks_each)
        self._inside = _groups(ranks)[self.node]
        self._between = _groups(ranks.T)[self.place]
        self._alone = _groups(ranks.reshape(-1, 1))[dist.rank()]
        self.sent_bytes = 0  # what this rank has given to collectives between nodes, since the start
        self.compressor = PowerSGD(compression_rank, seed + self.place) if compression_rank else None

    @torch.no_grad()
    def average(self, engine: Any, scale_of: Callable[[dict[str, Any]], float] = lambda group: 1.0) -> None:
        """Replace this rank's gradients by their mean over its data-parallel replicas, after the last backward of a
        step.

        Args:
            engine: DeepSpeed's.
            scale_of: param group -> what its gradients were multiplied by; that of errors is always 1.
        """
        matrices, scales, rest = [], [], []
        for gradient, group, rows in shards(engine):
            matrix = gradient.view(rows, -1) if rows else None
            if matrix is not None and self.compressor and pays(len(matrix), len(matrix.T), self.compressor.rank):
                matrices.append(matrix if len(matrix) <= len(matrix.T) else matrix.T)
                scales.append(scale_of(group))
            else:
                rest.append(gradient)
        if self.compressor:  # also where this rank has no matrix: all ranks ask together what is finite
            self.compressor.average(matrices, scales, self._mean, self._on_all_ranks)
        for bucket in _buckets(rest):
            self._mean(bucket)

    def sum_inside(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks of this node, in place."""
        torch.distributed.all_reduce(tensor, group=self._inside)
        return tensor

    def save(self, folder: Path) -> None:
        """Write what compression has left behind: one file for each place in a node. Collective.

        Replicas take the mean of their errors, which is all that counts for what they will send together, so that a run
        that continues is the run that did not stop, on any number of nodes.
        """
        if self.compressor and self.compressor.errors:
            for bucket in _buckets(self.compressor.errors):
                self._mean(bucket)
            if self.node == 0:
                errors = {str(index): error.contiguous() for index, error in enumerate(self.compressor.errors)}
                save_file(errors, folder / self._errors_file)

    def load(self, folder: Path) -> None:
        """Read it back; nothing where the checkpoint was written without compression."""
        path = folder / self._errors_file
        if self.compressor and path.exists():
            saved = load_file(path, device=str(dist.device()))
            # copies: kernels may choose by alignment, and the file's is not that of the run that did not stop
            self.compressor.errors = [saved[str(index)].clone() for index in range(len(saved))]

    @property
    def _errors_file(self) -> str:
        return f"compression_errors_{self.place:05d}.safetensors"

    def _mean(self, tensors: list[Tensor]) -> None:
        """Means over the data-parallel replicas, in place, in one collective for each type."""
        by_type: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            by_type[tensor.dtype].append(tensor)
        for alike in by_type.values():
            flat = torch.cat([tensor.flatten() for tensor in alike])
            flat /= self.nodes  # first: a sum of fp16 gradients might overflow
            torch.distributed.all_reduce(flat, group=self._between)
            self.sent_bytes += flat.numel() * flat.element_size()
            for tensor, mean in zip(alike, torch.split(flat, [tensor.numel() for tensor in alike]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    @staticmethod
    def _on_all_ranks(flag: Tensor) -> Tensor:
        return dist.all_reduce((~flag).int().to(dist.device()), "max") == 0

    # What DeepSpeed asks of an mpu

    def get_data_parallel_group(self) -> Any:
        """The node."""
        return self._inside

    def get_data_parallel_rank(self) -> int:
        """This rank's place in it."""
        return self.place

    def get_data_parallel_world_size(self) -> int:
        """Its size."""
        return self.ranks_each

    def get_model_parallel_group(self) -> Any:
        """This rank alone: no weights are shared out but by ZeRO."""
        return self._alone

    def get_model_parallel_rank(self) -> int:
        """0."""
        return 0

    def get_model_parallel_world_size(self) -> int:
        """1."""
        return 1

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


class GradientMeans:
    """Means of a module's gradients over all ranks at ZeRO 0, summed in fp32."""

    def __init__(self, module: nn.Module) -> None:
        self._buckets = list(_buckets(parameter for parameter in module.parameters() if parameter.requires_grad))
        self._sizes = [[parameter.numel() for parameter in bucket] for bucket in self._buckets]
        self._room = room(max(map(sum, self._sizes), default=0))

    @torch.no_grad()
    def average(self) -> None:
        """Replace the gradients by their means; zeros where no rank's loss has reached a parameter. Collective."""
        for bucket, sizes in zip(self._buckets, self._sizes, strict=True):
            for parameter in bucket:
                if parameter.grad is None:  # the other ranks may have one
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [cast(Tensor, parameter.grad) for parameter in bucket]
            torch._foreach_copy_(_views(self._room.mine(sum(sizes)), sizes, gradients), gradients)
            with self._room.mean(sum(sizes)) as mean:
                torch._foreach_copy_(gradients, _views(mean, sizes, gradients))


def _views(flat: Tensor, sizes: list[int], like: list[Tensor]) -> list[Tensor]:
    return [part.view_as(tensor) for part, tensor in zip(flat.split(sizes), like, strict=True)]


def shards(engine: Any) -> Iterator[tuple[Tensor, dict[str, Any], int]]:
    """The gradients that this rank's optimizer step will read, as DeepSpeed 0.19 keeps them at ZeRO 1 to 3, with their
    param group. What may be compressed comes with the number of rows of the matrix that it is, else 0.

    Gains, biases and embeddings stay whole (arXiv 2102.12092, App. E.2). At ZeRO 1 and 2 a rank holds whole tensors,
    but for those that the border between two ranks cuts; at ZeRO 3 a flat part of each, which is a block of its rows if
    these divide among the ranks.
    """
    optimizer, at_stage_3 = engine.optimizer, engine.zero_optimization_stage() == 3
    groups = optimizer.optimizer.param_groups
    for index in sorted(optimizer.averaged_gradients):
        found = optimizer.averaged_gradients[index] or ()
        if at_stage_3:
            group = groups[optimizer.sub_group_to_group_id[index]]
            rows = [_rows_of_part(parameter) for parameter in optimizer.fp16_groups[index]]
        else:
            group, rows = groups[index], [len(gradient) if gradient.ndim > 1 else 0 for gradient in found]
        for gradient, count in zip(found, rows, strict=True):
            yield gradient, group, count if group["role"] == "matrix" else 0


def _rows_of_part(parameter: Any) -> int:
    """Rows of a parameter that make up this rank's part of it at ZeRO 3; 0 where parts cut through rows."""
    numel, part = parameter.ds_numel, parameter.ds_tensor.ds_numel
    ranks, rows = -(-numel // part), int(parameter.ds_shape[0])
    return rows // ranks if rows % ranks == 0 and part * ranks == numel else 0


def _groups(rows: Tensor) -> list[Any]:
    """A process group for each row of ranks; all ranks make all of them."""
    return [torch.distributed.new_group(row) for row in rows.tolist()]


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The same tensors in lists of about BUCKET_ELEMENTS."""
    bucket: list[Tensor] = []
    elements = 0
    for tensor in tensors:
        bucket.append(tensor)
        elements += tensor.numel()
        if elements >= BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
    if bucket:
        yield bucket
