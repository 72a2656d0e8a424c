"""State of an engine to resume from, in safetensors and JSON, to be read on any number of ranks and at any ZeRO stage.

    rank_00000.safetensors   "<kind>/<parameter>": the numbers of it that rank 0 holds, flat; a file for each rank
    untrained.safetensors    buffers and frozen parameters
    layout.json              of each parameter how it was partitioned (masters.Partition); loss scaler, counters

Kinds are "weights" (the fp32 master weights), "average", and the names of the optimizer's states. Of each parameter a
rank reads only the numbers that it will hold, out of the few files that have them; nothing is gathered. Nothing is
converted: what 16-bit states hold is not what their type says (adam16.py). The settings of param groups are not in
here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dalle_scale import dist
from dalle_scale.engine import masters
from dalle_scale.engine.masters import Partition, Shard
from dalle_scale.types import UserError

LAYOUT, UNTRAINED, RANK = "layout.json", "untrained.safetensors", "rank_{:05d}.safetensors"
COUNTERS = ("global_steps", "skipped_steps")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of fp16; the rest of it is configuration


def save(engine: Any, folder: Path, average: Sequence[Tensor] = ()) -> None:
    """Write this rank's part; of several nodes only the first writes. Collective; whole when all ranks are back.

    Args:
        engine: DeepSpeed's.
        folder: of this engine alone.
        average: of the weights; as `masters.owned`, or none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = masters.place(engine)
    writes = place == dist.rank()  # not so on later nodes and, at ZeRO 0, on all ranks but the first
    parameters: dict[str, Any] = {}
    parts: dict[str, Tensor] = {}
    for index, (key, pieces) in enumerate(zip(masters.keys(engine), masters.pieces(engine), strict=True)):
        tensors, numbers = _contents(key, masters.states(engine).get(key, {}))
        tensors |= {"average": average[index]} if average else {}
        values = {kind: tensor.numel() // key.numel() for kind, tensor in tensors.items()}  # that make up a number
        for piece in pieces:
            parameters[piece.name] = {**piece.partition._asdict(), "values": values, "numbers": numbers}
            start, stop = piece.partition.local_range(place)
            for kind, tensor in tensors.items() if writes and stop > start else ():
                part = slice(piece.at * values[kind], (piece.at + stop - start) * values[kind])
                parts[f"{kind}/{piece.name}"] = tensor.detach().reshape(-1)[part].cpu()
    if writes:
        save_file(parts, folder / RANK.format(place))
    with masters.untrained(engine) as rest:
        if writes and place == 0:
            save_file({name: tensor.cpu().contiguous() for name, tensor in rest.items()}, folder / UNTRAINED)
    if writes and place == 0:
        scaler = _scaler(engine)
        document = {
            "parameters": parameters,
            "scaler": {name: getattr(scaler, name) for name in SCALER if hasattr(scaler, name)},
            "counters": {name: getattr(engine, name) for name in COUNTERS},
        }
        (folder / LAYOUT).write_text(json.dumps(document, indent=1), encoding="utf-8")


def _contents(key: Tensor, state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Of one tensor that the optimizer steps: what has numbers for each of its numbers, and single numbers: floats
    where PyTorch counts steps in a tensor without dimensions."""
    tensors = {"weights": key.data}
    numbers = {}
    for name, value in state.items():
        if not torch.is_tensor(value):
            numbers[name] = value
        elif value.ndim == 0:
            numbers[name] = float(value)
        else:
            tensors[name] = value
    return tensors, numbers


@torch.no_grad()
def load(engine: Any, folder: Path, average: Sequence[Tensor] = ()) -> None:
    """Read back what `save` wrote into a new engine of the same net and optimizer. Collective.

    Raises:
        UserError: saved for other parameters, or with states that this ZeRO stage cannot hold.
    """
    document = json.loads((folder / LAYOUT).read_text(encoding="utf-8"))
    all_pieces, place = masters.pieces(engine), masters.place(engine)
    with ExitStack() as stack:
        saved = _Saved(folder, document["parameters"], stack)
        saved.check(all_pieces)
        for index, (key, pieces) in enumerate(zip(masters.keys(engine), all_pieces, strict=True)):
            values, numbers = saved.contents(pieces)
            tensors = {kind: saved.read(kind, pieces, place, key.numel() * values[kind]) for kind in values}
            _copy(tensors.pop("weights"), key.data)
            assert ("average" in tensors) == bool(average), "checked by resume.check"
            if average:
                _copy(tensors.pop("average"), average[index])
            state = _state(key, tensors, numbers, whole=engine.zero_optimization_stage() == 0)
            if state:
                masters.states(engine)[key] = state
    masters.publish(engine)
    rest = load_file(folder / UNTRAINED)
    with masters.untrained(engine) as live:
        if others := sorted(live.keys() ^ rest.keys()):
            raise UserError(
                f"{folder}: saved with other buffers or frozen parameters ({', '.join(others)}); "
                "take the version that saved it, or start another run=..."
            )
        for name, tensor in live.items():
            _copy(rest[name], tensor)
    for target, found in ((_scaler(engine), document["scaler"]), (engine, document["counters"])):
        for name, value in found.items():
            setattr(target, name, value)


def _state(key: Tensor, tensors: dict[str, Tensor], numbers: dict[str, Any], whole: bool) -> dict[str, Any]:
    """The reverse of `_contents`. whole: the tensor is a parameter, whose shape its states have."""
    state: dict[str, Any] = {name: tensor.to(key.device) for name, tensor in tensors.items()}
    if whole:
        state = {name: tensor.view(key.shape) for name, tensor in state.items()}
    for name, value in numbers.items():
        state[name] = torch.tensor(value, device=key.device) if isinstance(value, float) else value
    return state


class _Saved:
    """The files of one checkpoint; those of ranks are opened when first needed."""

    def __init__(self, folder: Path, parameters: dict[str, Any], stack: ExitStack) -> None:
        self.folder, self.parameters, self.stack = folder, parameters, stack
        self._open: dict[int, Any] = {}

    def check(self, wanted: list[list[Shard]]) -> None:
        """Refuse other parameters."""
        shapes = {piece.name: list(piece.partition.shape) for pieces in wanted for piece in pieces}
        for name in sorted(shapes.keys() | self.parameters.keys()):
            before, now = self.parameters.get(name, {}).get("shape"), shapes.get(name)
            if before != now:
                raise UserError(
                    f"{self.folder}: parameter {name} was saved with shape {before or '(not there)'}, this net has "
                    f"{now or '(not there)'}; take the version that saved it, or start another run=..."
                )

    def contents(self, pieces: list[Shard]) -> tuple[dict[str, int], dict[str, Any]]:
        """Saved values of all parameters of one tensor: kind -> values that make up a number, and the single numbers.

        Raises:
            UserError: not the same of all of them.
        """
        first, *others = [(piece.name, self.parameters[piece.name]) for piece in pieces]
        for name, other in others:
            if any(other[part] != first[1][part] for part in ("values", "numbers")):
                raise UserError(
                    f"{self.folder}: {first[0]} and {name} have not taken the same number of steps, and ZeRO 1 to 3 "
                    "count them together; continue with engine.zero=0"
                )
        return first[1]["values"], first[1]["numbers"]

    def read(self, kind: str, pieces: list[Shard], place: int, length: int) -> Tensor:
        """One kind of what this rank holds of the parameters of one tensor, flat; zeros where no parameter is."""
        out: Tensor | None = None
        held = [piece for piece in pieces if len(range(*piece.partition.local_range(place)))]
        for piece in held or pieces[:1]:  # where there is none, the type all the same
            start, stop = piece.partition.local_range(place) if held else (0, 0)
            parameter = self.parameters[piece.name]
            values, cut = parameter["values"][kind], Partition(parameter["shape"], parameter["base"], parameter["size"])
            for holder in range(cut.holder(start), cut.holder(max(start, stop - 1)) + 1):
                first, last = cut.local_range(holder)
                low, high = max(start, first), min(stop, last)
                stored = self._file(holder).get_slice(f"{kind}/{piece.name}")
                part = stored[(low - first) * values : (high - first) * values]
                out = torch.zeros(length, dtype=part.dtype) if out is None else out
                at = (piece.at + low - start) * values
                _copy(part, out[at : at + len(part)])
        assert out is not None
        return out

    def _file(self, rank: int) -> Any:
        if rank not in self._open:
            path = self.folder / RANK.format(rank)
            self._open[rank] = self.stack.enter_context(safe_open(path, framework="pt"))
        return self._open[rank]


def _copy(values: Tensor, target: Tensor) -> None:
    """The same bits."""
    assert values.dtype == target.dtype, f"{values.dtype} was saved, {target.dtype} is needed"
    target.copy_(values.view(target.shape))


def _scaler(engine: Any) -> Any:
    """Loss scaler of fp16."""
    return engine.optimizer.loss_scaler if engine.fp16_enabled() else None
