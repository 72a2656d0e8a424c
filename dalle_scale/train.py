"""The training loop, for any stage: what happens at which step. Knows neither stages nor data sets by name."""

from __future__ import annotations

import math
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle_scale import dist
from dalle_scale.checkpoint import export, resume
from dalle_scale.config import RunConfig
from dalle_scale.engine.batches import Means, Stream, balance, to_device
from dalle_scale.engine.build import TrainedNets
from dalle_scale.engine.signals import StopSignals
from dalle_scale.log import Log, progress, say
from dalle_scale.types import Batch, Stage, UserError


@dataclass
class Trainer:
    """One run, from step `done` to the last."""

    config: RunConfig
    stage: Stage
    trained_nets: TrainedNets
    train: Stream
    valid: Stream | None
    parts: dict[str, Path]  # what the export holds besides the weights
    done: int  # steps
    means: Means = field(default_factory=Means)  # since the last line of the log
    extra: dict[str, Tensor] = field(default_factory=dict)  # the latest of what `after_step` returned
    signals: StopSignals = field(default_factory=StopSignals)

    def __post_init__(self) -> None:
        self.folder = Path(self.config.run)
        self.saved = self.logged = self.done

    def run(self) -> None:
        """Train to the last step, or until SIGTERM or SIGUSR1: then save and return.

        Raises:
            UserError: a loss, gradient or weight is not finite; the last checkpoint is from before.
        """
        with closing(Log(self.folder, self.config.steps, self.config.log.wandb)) as journal, self.signals:
            self._run(journal)
        if self.done < self.config.steps:
            say(f"{self.folder}: stopped and saved after {self.done} steps; the same command continues")

    def _run(self, journal: Log) -> None:
        cadence, last = self.config.log, self.config.steps
        journal.advance(self.done)
        started = time.perf_counter()
        for micro_batches in self.train.batches(self.done, last):
            if self._stop_here(micro_batches):
                break
            self._update(micro_batches)
            journal.advance(self.done)
            if self._due(cadence.every):
                journal.metrics(self.done, self._numbers(time.perf_counter() - started))
                started = time.perf_counter()
            paused = time.perf_counter()
            if self._due(cadence.preview_every):
                journal.images(self.done, self._preview())
            if self._due(cadence.valid_every) and self.valid is not None:
                journal.metrics(self.done, self._validate(self.valid))
            if self._due(cadence.save_every) or self.done == last:
                self._save()
            started += time.perf_counter() - paused
        if self.saved < self.done:
            self._save()

    def _update(self, micro_batches: list[Batch]) -> None:
        """One step of every net whose turn it is."""
        dist.seed_everything(self.config.seed, self.done)
        for net_name in self.stage.nets_to_update(self.done):
            trained_net = self.trained_nets[net_name]
            with self.trained_nets.updating(net_name) as nets:
                for batch in micro_batches:
                    losses = self.stage.loss(net_name, nets, to_device(batch), self.done)
                    trained_net.backward(losses.total)
                    self.means.add(losses, prefix=self.trained_nets.prefix(net_name))
                trained_net.step(self.done)
        self.extra |= self.stage.after_step(self.trained_nets.modules, self.done)
        self.done += 1

    def _validate(self, stream: Stream) -> dict[str, float]:
        """Terms of the loss over the first `log.valid_samples` held-out samples, the same at any world size."""
        size, means = self.config.global_batch_size, Means()
        num_batches = -(-min(self.config.log.valid_samples, stream.num_samples) // size)
        with self.trained_nets.evaluating() as nets:
            for micro_batches in progress(stream.batches(0, num_batches), "validate", "batches", num_batches):
                [samples] = balance(micro_batches, size)
                dist.seed_everything(self.config.seed, self.done)
                for net_name in self.stage.nets_to_update(self.done):
                    for batch in micro_batches:
                        losses = self.stage.loss(net_name, nets, to_device(batch), self.done)
                        means.add(losses, samples, self.trained_nets.prefix(net_name))
        return {f"valid/{name}": value for name, value in means.close().items()}

    def _preview(self) -> dict[str, Tensor]:
        """Images from the first held-out micro-batch, or the first of training where nothing is held out."""
        [micro_batches] = (self.valid or self.train).batches(0, 1)
        with self.trained_nets.evaluating() as nets:
            return self.stage.preview(nets, to_device(micro_batches[0]))

    def _save(self) -> None:
        """Export and checkpoint, in this order: whoever finds the checkpoint finds an export as new."""
        if any(dist.sum_on_host([not self.trained_nets.healthy()])):
            self._refuse(self.means.close())
        states = {name: trained_net.full_state() for name, trained_net in self.trained_nets.items()}
        if dist.is_main():
            model, folder = self.stage.config, self.folder / "export"
            export.save(folder, self.config.stage, model, states, self.parts, self._trained())
        stream, keep = self.train.state(self.done), self.config.log.keep
        resume.save(self.folder, self.done, self.config, self.trained_nets, stream, keep)
        self.saved = self.done

    def _trained(self) -> dict[str, Any]:
        """Record of an export about its weights."""
        decays = {name: self.config.optim[name].ema_decay for name in self.trained_nets}
        weights = {name: f"ema {decay}" if decay else "raw" for name, decay in decays.items()}
        return {"step": self.done, "steps": self.config.steps, "weights": weights}

    def _stop_here(self, micro_batches: list[Batch]) -> bool:
        """The step boundary: ranks agree on the batch's weights, on signals, and on whether the losses were finite
        (on GPUs at the next line of the log, because looking at a loss waits for it)."""
        broken = dist.device().type == "cpu" and not self.trained_nets.losses_finite()
        _, signals, any_broken = balance(micro_batches, self.config.global_batch_size, self.signals.received, broken)
        if any_broken:
            self._refuse(self.means.close())
        return signals > 0

    def _refuse(self, means: dict[str, float]) -> None:
        """Stop a run that has diverged, on all ranks."""
        names = ", ".join(name for name, value in means.items() if not math.isfinite(value)) or "weights"
        raise UserError(
            f"update {self.done}: not finite: {names}; saved are {self.saved} steps: lower the learning rate or set "
            "clip_norm, and resume from there"
        )

    def _numbers(self, seconds: float) -> dict[str, float]:
        """One line of the log: everything since the last one."""
        means = self.means.close()
        if not all(math.isfinite(means[name]) for name in means if name.endswith("loss")):
            self._refuse(means)
        extra = {name: float(value) for name, value in self.extra.items()}
        values = {f"train/{name}": value for name, value in {**means, **extra}.items()} | self.trained_nets.numbers()
        values["samples_per_second"] = (self.done - self.logged) * self.config.global_batch_size / seconds
        self.extra, self.logged = {}, self.done
        return values

    def _due(self, every: int) -> bool:
        return every > 0 and (self.done % every == 0 or self.done == self.config.steps)
