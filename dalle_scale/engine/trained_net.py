"""One net in training: its engine, its schedule and the average of its weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle_scale import dist
from dalle_scale.config import RunConfig
from dalle_scale.engine import masters, optim, state
from dalle_scale.engine.ema import Ema
from dalle_scale.engine.nodes import GradientMeans, Nodes, shards
from dalle_scale.engine.scaling import Scaling
from dalle_scale.engine.schedule import Schedule
from dalle_scale.types import UserError

SCALES = "gradient_scales.json"
MAX_SKIPS = 50  # fp16 steps in a row that overflow before the run stops


class TrainedNet:
    """A net in its DeepSpeed engine, made by `build`.

    `evaluation_copy` is the net without weights. It serves for evaluation if the net has an average, or if ZeRO 3
    shards its weights.
    """

    def __init__(
        self,
        name: str,
        engine: Any,
        config: RunConfig,
        evaluation_copy: nn.Module | None,
        nodes: Nodes | None = None,
        scaling: Scaling | None = None,
    ) -> None:
        optim_config = config.optim[name]
        self.name = name
        self.engine = engine
        self.module: nn.Module = engine.module
        self.schedule = Schedule(optim_config.schedule, config.steps)
        self.ema = Ema(engine, optim_config.ema_decay) if optim_config.ema_decay > 0 else None
        self._evaluation_copy = evaluation_copy
        self._nodes, self._scaling = nodes, scaling
        averages = config.engine.zero == 0 and dist.world_size() > 1
        self._means = GradientMeans(self.module) if averages else None
        self._skips_allowed = MAX_SKIPS if config.engine.dtype == "fp16" else 0
        self._skipped = 0  # steps in a row
        self._totals: list[Tensor] = []  # losses of this step's micro-batches
        self._finite = torch.ones((), dtype=torch.bool, device=dist.device())

    @staticmethod
    def evaluation_copy_of(net: nn.Module, config: RunConfig, name: str) -> nn.Module | None:
        """The `evaluation copy` of a net that is not yet in an engine, if it will need one."""
        if config.engine.zero < 3 and config.optim[name].ema_decay == 0:
            return None
        memo: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in net.buffers()}
        memo |= {id(parameter): nn.Parameter(parameter.detach().to("meta")) for parameter in net.parameters()}
        return copy.deepcopy(net, memo)  # everything but the tensors

    def numbers(self) -> dict[str, float]:
        """For the log: learning rate of the first param group; fp16: scales, and steps skipped so far;
        several machines: what this rank has averaged between them since the start."""
        numbers = {"lr": float(self.engine.optimizer.param_groups[0]["lr"])}
        if self._nodes is not None:
            numbers["between_nodes_mib"] = self._nodes.sent_bytes / 2**20
        if self._scaling is not None:
            numbers |= self._scaling.numbers()
        elif self._skips_allowed:
            numbers |= {"loss_scale": self.engine.optimizer.loss_scale, "skipped_steps": self.engine.skipped_steps}
        return numbers

    def backward(self, total: Tensor) -> None:
        """Back-propagate the loss of one micro-batch; gradients are averaged over micro-batches and ranks."""
        self._totals.append(total.detach())
        self.engine.backward(total)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # only counts

    def step(self, step: int) -> None:
        """Finish step `step` (counted from 0) after its last micro-batch: optimizer step and average.

        Raises:
            UserError: gradients are not finite (fp16: many times in a row).
        """
        optim.set_lr(self.engine.optimizer, self.schedule.factor(step))
        taken = self._finish_gradients()
        self.engine.step()
        taken &= self.engine.was_step_applied()
        mean = torch.stack(self._totals).mean()
        self._totals.clear()
        self._finite &= torch.isfinite(mean)
        self.schedule.observe(mean)
        self._skipped = 0 if taken else self._skipped + 1
        if self._skipped > self._skips_allowed:
            raise UserError(
                f"update {step + 1}: the gradients of '{self.name}' are not finite; lower optim.{self.name}.lr or "
                f"set optim.{self.name}.clip_norm, and resume from the last checkpoint"
            )
        if self.ema is not None:
            self.ema.update()

    def _finish_gradients(self) -> bool:
        """Average over the ranks at ZeRO 0 and between machines, clip, find the divisors; whether the optimizer will
        take this step. Collective. Without adamw16 DeepSpeed does the rest, within a machine."""
        scaling, nodes = self._scaling, self._nodes
        if self._means is not None:
            self._means.average()
        if scaling is None:
            if nodes is not None:
                nodes.average(self.engine)
            return True
        finite = scaling.finite((gradient, group) for gradient, group, _ in shards(self.engine))
        if nodes is not None:
            nodes.average(self.engine, scaling.of)
        gradients = ((gradient, group) for gradient, group, _ in shards(self.engine))
        sum_over_shards = dist.all_reduce if nodes is None else nodes.sum_inside
        optimizer = self.engine.optimizer.optimizer
        taken = scaling.apply(optimizer.param_groups, gradients, finite, sum_over_shards)
        optimizer.skip = not taken
        return taken

    def losses_finite(self) -> bool:
        """Whether all losses on this rank were finite so far. Waits for the device."""
        return bool(self._finite)

    def healthy(self) -> bool:
        """Whether the losses on this rank and the weights that it steps are finite. Waits for the device."""
        return self.losses_finite() and all(bool(t.isfinite().all()) for t in masters.owned(self.engine))

    def full_state(self) -> dict[str, Tensor]:
        """The averaged weights (the weights if there is no average) and buffers: fp32 `state_dict` on the CPU of
        rank 0, empty elsewhere. Collective."""
        with self._average_in_place():
            return masters.full_state(self.engine)

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The net with whole, averaged weights in eval mode; any of its methods may be called. Collective.

        Where there is a evaluation copy, it takes the memory of the working weights, whole, until the block ends.
        """
        module = self.module if self._evaluation_copy is None else self._filled_evaluation_copy()
        modes = [(child, child.training) for child in module.modules()]
        module.eval()
        try:
            yield module
        finally:
            for child, mode in modes:
                child.training = mode
            if self._evaluation_copy is not None:
                self._evaluation_copy.to("meta")

    def save(self, folder: Path) -> None:
        """Write this rank's part of engine and average below `folder`. Collective."""
        state.save(self.engine, folder / self.name, self.ema.average if self.ema else ())
        if self._nodes is not None:
            self._nodes.save(folder / self.name)
        if self._scaling is not None and dist.is_main():
            (folder / self.name / SCALES).write_text(json.dumps(self._scaling.state()), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote on any number of ranks at any ZeRO stage, for the same net and optimizer.
        Collective."""
        state.load(self.engine, folder / self.name, self.ema.average if self.ema else ())
        if self._nodes is not None:
            self._nodes.load(folder / self.name)
        if self._scaling is not None:
            self._scaling.load(json.loads((folder / self.name / SCALES).read_text(encoding="utf-8")))

    @torch.no_grad()
    def _filled_evaluation_copy(self) -> nn.Module:
        """The evaluation copy on this rank's device, with the working precision's averaged weights and the net's
        buffers."""
        assert self._evaluation_copy is not None
        with self._average_in_place():
            weights = masters.full_state(self.engine, everywhere=True)
        evaluation_copy = self._evaluation_copy.to_empty(device=dist.device())
        for name, parameter in evaluation_copy.named_parameters():
            parameter.data = weights[name].to(self.module.get_parameter(name).dtype)
        for name, buffer in evaluation_copy.named_buffers():
            buffer.copy_(self.module.get_buffer(name))
        return evaluation_copy

    def _average_in_place(self) -> Any:
        return nullcontext() if self.ema is None else self.ema.half_precision_parameters()
