"""A run's configuration: defaults < YAML file < `key.sub=value` on the command line.

Everything is checked in the first second: an unknown key is named with its nearest neighbour, a wrong type or an
indivisible batch says what to change. The `model:` section belongs to the stage and is checked by its own `Config`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError

from dalle_scale import installed
from dalle_scale.types import StrictModel, UserError

Model = TypeVar("Model", bound=BaseModel)

_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


class SourceConfig(StrictModel):
    """One data set of a mixture."""

    path: str  # folder with a manifest
    weight: float = Field(default=1.0, gt=0)  # its share of the samples is this by the sum of all weights


DataSource = str | tuple[SourceConfig, ...]


class DataConfig(StrictModel):
    """Data sets and how they are read."""

    # folder with a manifest, written by data_tools/build_shards.py or launch/encode.py; or a list of {path, weight}
    train: DataSource
    valid: str | None = None  # the same, held out
    text_tokenizer: str | None = None  # sentencepiece .model file, or a folder / name of a Hugging Face tokenizer
    workers: int = Field(default=0, ge=0)  # processes that read and decode; 0 = in this process
    threads: int = Field(default=1, ge=1)  # that decode images in each of them
    window_shards: int = Field(default=16, gt=0)  # samples are shuffled among so many shards at a time
    cache: str | None = None  # folder that remote shards are fetched to; the processes of a machine share it
    cache_gib: float = Field(default=100.0, gt=0)  # its largest size
    max_bad_share: float = Field(default=0.01, ge=0, le=1)  # stop when more samples than this cannot be read


class ScheduleConfig(StrictModel):
    """Learning rate as a factor of its peak, a function of the step number (plateau: and of the losses so far)."""

    kind: Literal["constant", "cosine", "plateau"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)  # linear from 0
    decay_steps: int | None = Field(default=None, gt=0)  # cosine: ends at `final_factor`; None = at the last step
    final_factor: float = Field(default=0.0, ge=0, le=1)
    # plateau (arXiv 2102.12092, Sec. 2.3 does not give the criterion): halve when the mean training loss of a window
    # is not lower than the best window's by `plateau_margin`, at most `plateau_halvings` times
    plateau_window_steps: int = Field(default=10_000, gt=0)
    plateau_margin: float = Field(default=0.001, ge=0)
    plateau_halvings: int = Field(default=5, ge=0)


class OptimConfig(StrictModel):
    """Optimizer of one net. Gains, biases and embeddings are never decayed."""

    # muon: orthogonalised momentum for block matrices, AdamW for the rest. adamw16: no fp32 copy of 16-bit weights
    kind: Literal["adamw", "muon", "adamw16"] = "adamw"
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    muon_lr: float = Field(default=0.02, gt=0)
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    # adamw16: moments as in the DALL-E paper (1-6-9, 0-6-10), in bf16 or in fp32; how small steps reach the weights
    states: Literal["paper", "bf16", "fp32"] = "paper"
    rounding: Literal["stochastic", "compensated", "nearest"] = "stochastic"
    variance_clip: float = Field(default=5.0, gt=0)  # largest second moment
    clip_norm: float = Field(default=0.0, ge=0)  # global gradient norm; 0 = off
    ema_decay: float = Field(default=0.0, ge=0, lt=1)  # average of the weights that is sampled and exported; 0 = off
    schedule: ScheduleConfig = ScheduleConfig()


class EngineConfig(StrictModel):
    """Parallelism and precision."""

    zero: Literal[0, 1, 2, 3] = 0  # DeepSpeed ZeRO stage
    # auto: bf16 where the matrices of these nets multiply 1.5 times as fast in it as in fp32, else fp32
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    micro_batch_size: int | None = Field(default=None, gt=0)  # per rank and backward; None = batch / world size
    activation_checkpointing: bool = False  # recompute activations in the backward pass
    # ZeRO spans the ranks of one of so many machines of equal size; gradients are averaged between machines on top
    nodes: int = Field(default=1, ge=1)
    compression_rank: int = Field(default=0, ge=0)  # of PowerSGD between machines; 0 = exact means


class LogConfig(StrictModel):
    """Cadences, in steps; 0 = never."""

    every: int = Field(default=10, ge=1)
    preview_every: int = Field(default=0, ge=0)
    valid_every: int = Field(default=0, ge=0)
    valid_samples: int = Field(default=512, gt=0)
    save_every: int = Field(default=0, ge=0)  # the last step is always saved
    keep: int = Field(default=2, gt=0)  # checkpoints kept
    wandb: str | None = None  # project name; needs the extra [wandb]


class RunConfig(StrictModel):
    """One training run."""

    stage: str
    run: str  # folder of everything the run writes
    seed: int = 0
    steps: int = Field(gt=0)  # optimizer steps in all
    global_batch_size: int = Field(gt=0)  # global batch
    model: dict[str, Any] = Field(default_factory=dict)  # the stage's own Config
    tokenizer: str | None = None  # export of the image tokenizer below this stage
    data: DataConfig
    optim: dict[str, OptimConfig]  # one entry a net, as the stage names them
    engine: EngineConfig = EngineConfig()
    log: LogConfig = LogConfig()

    def micro_batch_size(self, world_size: int) -> int:
        """Samples of one rank in one backward pass.

        Raises:
            UserError: the batch does not divide by world size and micro-batch.
        """
        if self.global_batch_size % world_size:
            raise UserError(
                f"global_batch_size: {self.global_batch_size} does not divide by the world size {world_size}; "
                f"take a multiple of {world_size} or another number of processes"
            )
        micro = self.engine.micro_batch_size or self.global_batch_size // world_size
        if self.global_batch_size % (micro * world_size):
            raise UserError(
                f"engine.micro_batch_size: global_batch_size {self.global_batch_size} does not divide by micro-batch "
                f"{micro} x world size {world_size}; take a divisor of {self.global_batch_size // world_size}"
            )
        return micro

    def accumulation(self, world_size: int) -> int:
        """Backward passes per step."""
        return self.global_batch_size // (self.micro_batch_size(world_size) * world_size)


def load(name: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration; `overrides` are `key.sub=value`.

    Args:
        name: a file, or a shipped config as it lies in configs/ ("tiny/vae").

    Raises:
        UserError: the file is missing or not YAML, or a key or value is wrong.
    """
    path = installed.config(str(name)) or Path(name)
    if not path.is_file():
        raise UserError(f"{path}: no such config file")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text, byte {error.start}; save it as UTF-8") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected `key: value` lines, got {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return parse(RunConfig, tree, where=str(path))


def parse(model: type[Model], tree: dict[str, Any], where: str) -> Model:
    """Build `model` from a plain tree as YAML or JSON gives it; the first problem becomes one line.

    Raises:
        UserError: unknown key (with the nearest name), missing key, wrong type or range.
    """
    try:
        return model.model_validate(_numbers_from_strings(tree))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            raise UserError(f"{where}: unknown key '{key}'; {_nearest(model, problem['loc'])}") from None
        if problem["type"] == "missing":
            raise UserError(f"{where}: key '{key}' is missing") from None
        about = f"{key} = {problem['input']!r}: " if key else ""
        raise UserError(f"{where}: {about}{problem['msg'].removeprefix('Value error, ')}") from None


def parse_options(model: type[Model], given: Sequence[str], where: str = "options") -> Model:
    """Build `model` from `key=value` words of a command line; each value is read as YAML.

    Raises:
        UserError: as `parse`, or a word without "=".
    """
    tree: dict[str, Any] = {}
    for word in given:
        _apply(tree, word)
    return parse(model, tree, where)


def list_options(model: type[BaseModel]) -> str:
    """A line for each field of a model: name, type, default, range and description."""
    lines = []
    for name, info in model.model_fields.items():
        kind = info.annotation.__name__ if isinstance(info.annotation, type) else str(info.annotation)
        bounds = [dataclasses.asdict(item) for item in info.metadata]
        limits = [f"{_SIGNS[key]} {limit}" for bound in bounds for key, limit in bound.items() if key in _SIGNS]
        facts = [kind.replace("typing.", ""), *limits, f"default {info.default}", info.description or ""]
        lines.append(f"{name}: {', '.join(filter(None, facts))}")
    return "\n".join(lines) or "no options"


def dump(config: BaseModel, path: str | Path, note: str = "") -> None:
    """Write the resolved configuration as YAML that `load` reads back, below a note as a comment."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    Path(path).write_text(f"# {note}\n{text}" if note else text, encoding="utf-8")


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key of the tree from `a.b=value`; the value is read as YAML."""
    key, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"'{override}': an override is written key=value, e.g. optim.model.lr=3e-4")
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"'{override}': '{parent}' is a value, not a section")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"'{override}': the value is not valid YAML") from None


def _numbers_from_strings(value: Any) -> Any:
    """PyYAML reads `3e-4` (no dot) as a string: turn such strings, and lists where tuples go, into what was meant."""
    if isinstance(value, dict):
        return {key: _numbers_from_strings(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_numbers_from_strings(item) for item in value)
    if isinstance(value, str) and value[:1] in "0123456789.+-" and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


RENAMED = {  # last part of a key of 0.1 -> its name since 0.2
    "update": "step",
    "updates": "steps",
    "batch_samples": "global_batch_size",
    "micro_batch_samples": "micro_batch_size",
    "machines": "nodes",
    "sample_steps": "sampling_steps",
    "preview_steps": "preview_sampling_steps",
    "bound_steps": "bound_timesteps",
    **{
        f"{name}_updates": f"{name}_steps"
        for name in ("warmup", "decay", "plateau_window", "beta", "beta_warmup", "tau", "discriminator_warmup")
    },
}


def _nearest(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """A hint naming the closest known key of the section that `location` points into."""
    fields = model.model_fields
    for part in location[:-1]:
        annotation = fields[str(part)].annotation if str(part) in fields else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        inner = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if inner is not None:
            fields = inner.model_fields
    if (renamed := RENAMED.get(str(location[-1]))) in fields:
        return f"it is called '{renamed}' since 0.2"
    near = difflib.get_close_matches(str(location[-1]), list(fields), n=1, cutoff=0.4)
    return f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(fields)}"
