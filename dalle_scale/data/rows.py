"""One rank's part of a global batch: bytes read, decoded, cropped and tokenized into preallocated arrays."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dalle_scale.data import codes, text, transforms
from dalle_scale.data.cache import ShardCache
from dalle_scale.data.decode import BadSample
from dalle_scale.data.manifest import Manifest
from dalle_scale.data.order import Plan, Slots
from dalle_scale.data.pool import RetryMode
from dalle_scale.data.reader import Reader, Span
from dalle_scale.types import Batch, BatchSpec, UserError

_BUFFERS = 4


def _references(arrays: list[npt.NDArray[np.uint8]]) -> list[int]:
    """Number of references to each array."""
    return [sys.getrefcount(array) for array in arrays]


[_FREE] = _references([np.empty(0, np.uint8)])  # to one that only its list holds; Python versions count differently


@dataclass(frozen=True)
class Bad:
    """A sample that cannot be used."""

    shard: str
    key: str
    reason: str
    epoch: int


@dataclass
class Rows:
    """This rank's part of one global batch."""

    number: int
    batch: Batch
    bad: list[Bad]
    truncated_captions: int

    def __getstate__(self) -> dict[str, Any]:
        """For the way between processes: numpy arrays, whose bytes pickle leaves to whoever carries them."""
        arrays = {key: _channels_last(key, tensor).numpy() for key, tensor in self.batch.items()}
        return {**vars(self), "batch": arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = {key: torch.from_numpy(array) for key, array in state["batch"].items()}
        vars(self).update(state)
        self.batch = {key: value.permute(0, 3, 1, 2) if key == "image" else value for key, value in tensors.items()}


def _channels_last(key: str, tensor: Tensor) -> Tensor:
    """Images [B, 3, S, S] as they lie in memory: [B, S, S, 3]."""
    return tensor.permute(0, 2, 3, 1) if key == "image" else tensor


class RowReader:
    """Global batch number -> `Rows`. In another process it opens its files at the first read."""

    def __init__(
        self,
        plan: Plan,
        folders: tuple[Path, ...],
        inputs: BatchSpec,
        text_tokenizer: str | None,
        cache: ShardCache | None,
        threads: int = 1,
    ) -> None:
        """threads: that decode images in a process."""
        self.plan = plan
        self._folders = folders
        self.inputs = inputs
        self._text_path = text_tokenizer
        self._cache = cache
        self.threads = threads
        self.buffers = _Buffers()
        self.readers: list[Reader] = []
        self.text: text.TextTokenizer | None = None
        self.offsets = np.cumsum([0, *(source.num_samples for source in plan.sources)])
        self._lock = threading.Lock()

    def open(self, manifests: list[Manifest], tokenizer: text.TextTokenizer | None) -> None:
        """Use what is open already."""
        self.readers = [Reader(manifest, self._cache) for manifest in manifests]
        self.text = tokenizer

    def __reduce__(self) -> tuple[Any, ...]:
        """Other processes get plain values, no open files and no index."""
        return RowReader, (self.plan, self._folders, self.inputs, self._text_path, self._cache, self.threads)

    def read(self, number: int, retry_mode: RetryMode | None = None) -> Rows:
        """As in `pool.BatchReader`."""
        with self._lock:  # two iterators of one stream may be alive
            if not self.readers:
                self._open()
            return _Assembly(self, number, retry_mode).rows()

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        """Threads that decode."""
        return ThreadPoolExecutor(self.threads, thread_name_prefix="decode")

    def _open(self) -> None:
        manifests = [Manifest.open(folder) for folder in self._folders]
        for manifest, source in zip(manifests, self.plan.sources, strict=True):
            if manifest.digest != source.digest:
                raise UserError(f"{manifest.folder}: the data set was changed while it is in use; start again")
        reads_text = self._text_path is not None and self.inputs.text_length
        self.open(manifests, text.open_text(str(self._text_path), self.inputs.text_vocab) if reads_text else None)


class _Buffers:
    """Arrays for pixels, used again when nobody else holds them: the first touch of fresh memory takes a tenth of the
    time of decoding into it."""

    def __init__(self) -> None:
        self._arrays: list[npt.NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """An array with any content."""
        for array, references in zip(self._arrays, _references(self._arrays), strict=True):
            if array.shape == shape and references == _FREE:
                return array
        array = np.empty(shape, np.uint8)
        if len(self._arrays) < _BUFFERS:
            self._arrays.append(array)
        return array


class _Assembly:
    """The making of one batch."""

    def __init__(self, owner: RowReader, number: int, retry_mode: RetryMode | None) -> None:
        self._owner = owner
        self._number = number
        self._inputs = owner.inputs
        self._retry_mode = retry_mode
        self._slots: Slots = owner.plan.slots(number)
        self._seeds = owner.plan.seeds(self._slots)
        self._reasons: dict[int, str] = dict(retry_mode.skip) if retry_mode else {}  # row -> why it cannot be used

    def rows(self) -> Rows:
        text_tokenizer = self._owner.text
        cut_before = text_tokenizer.truncated_samples if text_tokenizer else 0
        loaders = {"image": self._images, "text": self._captions, "codes": self._codes}
        batch: Batch = {key: loaders[key]() for key in self._inputs.keys}
        slots = self._slots
        bad = [self._bad(row, reason) for row, reason in sorted(self._reasons.items())]
        ids = np.where(slots.sample >= 0, self._owner.offsets[slots.source] + slots.sample, -1)
        ids[list(self._reasons)] = -1
        empty = torch.from_numpy(ids < 0)
        if bool(empty.any()):
            for tensor in batch.values():
                tensor[empty] = 0
        batch |= {"id": torch.from_numpy(ids), "seed": torch.from_numpy(self._seeds), "weight": (~empty).float()}
        cut = text_tokenizer.truncated_samples - cut_before if text_tokenizer else 0
        return Rows(self._number, batch, bad, cut)

    def _bad(self, row: int, reason: str) -> Bad:
        manifest = self._owner.readers[self._slots.source[row]].manifest
        sample = int(self._slots.sample[row])
        return Bad(manifest.shard_url(sample), manifest.key(sample), reason, int(self._slots.epoch[row]))

    def _images(self) -> Tensor:
        """uint8 [B, 3, S, S], channels last in memory."""
        size, augment = self._inputs.image_size, self._inputs.augment
        pixels = self._owner.buffers.take((len(self._seeds), size, size, 3))  # empty slots are cleared in `rows`
        spans: dict[int, Span] = {}
        self._load_rows(lambda row, sample, reader: spans.update({row: reader.image_span(sample)}))

        def load(rows: list[int]) -> None:
            for row in rows:
                if self._retry_mode:
                    self._retry_mode.at_row(row)
                try:
                    transforms.load(spans[row].read(), augment, int(self._seeds[row]), out=pixels[row])
                except BadSample as error:
                    self._reasons[row] = str(error)

        rows, threads = list(spans), 1 if self._retry_mode else self._owner.threads
        if threads == 1:
            load(rows)
        else:
            list(self._owner.pool.map(load, [rows[first::threads] for first in range(threads)]))
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def _captions(self) -> Tensor:
        """int64 [B, T]."""
        captions = [""] * len(self._seeds)

        def load(row: int, sample: int, reader: Reader) -> None:
            try:
                captions[row] = reader.read(sample, "txt").decode()
            except UnicodeDecodeError:
                raise BadSample("the caption is not UTF-8") from None

        self._load_rows(load)
        assert self._owner.text is not None
        inputs = self._inputs
        return self._owner.text.encode(captions, inputs.text_length, inputs.bpe_dropout, self._seeds.tolist())

    def _codes(self) -> Tensor:
        """int64 [B, N]."""
        num_codes, vocab = self._inputs.num_codes, self._inputs.code_vocab
        out = np.zeros((len(self._seeds), num_codes), np.int64)

        def load(row: int, sample: int, reader: Reader) -> None:
            out[row] = codes.unpack(reader.read(sample, codes.MEMBER), num_codes, vocab)

        self._load_rows(load)
        return torch.from_numpy(out)

    def _load_rows(self, load: Callable[[int, int, Reader], None]) -> None:
        """Call `load` for every row that holds a sample; what cannot be used gets its reason."""
        readers = self._owner.readers
        slots: npt.NDArray[np.int64] = np.stack([self._slots.source, self._slots.sample], axis=1)
        for row, (source, sample) in enumerate(slots.tolist()):
            if sample >= 0 and row not in self._reasons:
                try:
                    load(row, sample, readers[source])
                except BadSample as error:
                    self._reasons[row] = str(error)
