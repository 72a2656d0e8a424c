"""From shards to batches: exactly once an epoch, the same batches at any world size and worker count, resumable.

Which sample stands at which place is a pure function (`order.Plan`); rank and worker only choose which rows of a global
batch they compute. A sample that cannot be read keeps its slot, empty, and becomes a row of the ledger; too many of
them stop the run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dalle_scale import log
from dalle_scale.config import DataConfig
from dalle_scale.data import codes, text, transforms
from dalle_scale.data.decode import decode
from dalle_scale.data.manifest import Manifest
from dalle_scale.data.order import Plan
from dalle_scale.data.reader import BadSample, Reader, ahead
from dalle_scale.types import Batch, Needs, UserError

_FUSE_SAMPLES = 100  # fewer say nothing about the share of bad ones
_Item = TypeVar("_Item")


def open_stream(
    config: DataConfig,
    source: str,
    needs: Needs,
    *,
    seed: int,
    batch_samples: int,
    micro_batch_samples: int,
    rank: int,
    world_size: int,
    train: bool,
    ledger: Path | None,
) -> Stream:
    """Open the data set in the folder `source` for a stage that needs `needs`.

    Args:
        batch_samples: the global batch; a multiple of micro_batch_samples * world_size.
        train: False reads in storage order, without augmentation and BPE dropout, the same in every epoch.
        ledger: file that a line is appended to for every sample that cannot be read.

    Raises:
        UserError: the data set is not there or incomplete, or does not hold what the stage needs.
    """
    manifest = Manifest.open(source)
    tokenizer = _open_text(config, needs, train) if needs.text_length else None
    _check_members(manifest, needs)
    if not train:
        needs = Needs(**{**vars(needs), "augment": "none", "bpe_dropout": 0.0})
    plan = Plan(
        manifest.digest, manifest.num_samples, seed, batch_samples, micro_batch_samples, rank, world_size, train
    )
    rows = RowReader(plan, manifest.folder, needs, config.text_tokenizer)
    rows.open(manifest, tokenizer)
    return Stream(rows, manifest, config, ledger)


class Stream:
    """An endless sequence of global batches, of which this rank delivers its part. Made by `open_stream`."""

    def __init__(self, rows: RowReader, manifest: Manifest, config: DataConfig, ledger: Path | None) -> None:
        self._rows = rows
        self._plan = rows.plan
        self._manifest = manifest
        self._config = config
        self._ledger = ledger
        self._samples = self._bad_samples = self._cut_captions = 0
        self._last_reason = ""
        self._told = False

    @property
    def manifest_digest(self) -> str:
        """sha256 of what the data set holds."""
        return self._manifest.digest

    @property
    def num_samples(self) -> int:
        """Samples of the data set."""
        return self._plan.num_samples

    @property
    def batches_per_epoch(self) -> int:
        """Global batches of one epoch; empty slots fill up the last."""
        return self._plan.batches_per_epoch

    def batches(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of the global batches `start` .. `stop - 1`, on the CPU.

        Raises:
            UserError: more samples than config.max_bad_share cannot be read.
        """
        source = self._from_workers(start, stop) if self._config.workers else self._from_thread(start, stop)
        try:
            for rows in source:
                self._account(rows)
                yield self._micro_batches(rows.batch)
                if (rows.number + 1) % self.batches_per_epoch == 0:
                    self._tell()
        finally:
            self._tell()

    def state(self, next_batch: int) -> dict[str, Any]:
        """All it takes to go on at global batch `next_batch`, at any world size and worker count."""
        return {**self._identity(), "epoch": self._plan.epoch(next_batch), "next_batch": next_batch}

    def check(self, state: dict[str, Any]) -> None:
        """Raise UserError if `state` was saved for other data, another seed or another batch size."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise UserError(
                    f"{self._manifest.folder}: {name} is {value}, the checkpoint was written with {state.get(name)}; "
                    "go on with the same data, seed and batch, or start a new run"
                )

    def _identity(self) -> dict[str, Any]:
        """What fixes the sequence of batches."""
        plan = self._plan
        return {"manifest_digest": plan.digest, "seed": plan.seed, "batch_samples": plan.batch_samples}

    def _from_thread(self, start: int, stop: int) -> Iterator[Rows]:
        """Read in this process, one batch ahead."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") as pool:
            yield from ahead(pool, self._rows.__getitem__, range(start, stop))

    def _from_workers(self, start: int, stop: int) -> Iterator[Rows]:
        """Read in `config.workers` processes."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])  # workers fork from there, torch already imported
        loader: DataLoader[Rows] = DataLoader(
            self._rows,
            sampler=range(start, stop),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self._config.workers,
            multiprocessing_context=context,
        )
        try:
            yield from loader
        except UserError as error:  # torch puts the worker's traceback around it
            raise UserError(str(error).strip().rpartition("UserError: ")[2]) from None

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        size = self._plan.micro_batch_samples
        starts = range(0, len(batch["id"]), size)
        return [{key: tensor[at : at + size] for key, tensor in batch.items()} for at in starts]

    def _account(self, rows: Rows) -> None:
        """Count, write the ledger, stop the run if too much is bad."""
        self._samples += int((rows.batch["id"] >= 0).sum()) + len(rows.bad)
        self._bad_samples += len(rows.bad)
        self._cut_captions += rows.cut_captions
        self._last_reason = rows.bad[-1][1] if rows.bad else self._last_reason
        self._write_ledger(rows)
        limit = self._config.max_bad_share
        if self._samples >= _FUSE_SAMPLES and self._bad_samples > limit * self._samples:
            raise UserError(
                f"{self._manifest.folder}: {self._bad_samples} of {self._samples} samples cannot be read, more than "
                f"data.max_bad_share = {limit}; the last one: {self._last_reason}; mend the data or raise the limit"
            )

    def _write_ledger(self, rows: Rows) -> None:
        """One line a bad sample, each in a single write, so that ranks may share the file."""
        if self._ledger is None or not rows.bad:
            return
        self._ledger.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for sample, reason in rows.bad:
            row = {
                "shard": self._manifest.shard_url(sample),
                "key": self._manifest.key(sample),
                "reason": reason,
                "epoch": self._plan.epoch(rows.number),
                "step": rows.number,
            }
            os.write(descriptor, (json.dumps(row) + "\n").encode())
        os.close(descriptor)

    def _tell(self) -> None:
        """Say once what did not go in as it is."""
        if self._told:
            return
        share = f"of {self._samples:,} samples read by this process"
        if self._cut_captions:
            log.say(
                f"{self._manifest.folder}: {self._cut_captions:,} {share} had their captions cut to the text length"
            )
        if self._bad_samples:
            log.say(f"{self._manifest.folder}: {self._bad_samples:,} {share} were left out, see {self._ledger}")
        self._told = bool(self._cut_captions or self._bad_samples)


@dataclass
class Rows:
    """This rank's part of one global batch, as a worker hands it over."""

    number: int
    batch: Batch
    bad: list[tuple[int, str]]  # sample, reason
    cut_captions: int


class RowReader(Dataset[Rows]):
    """Global batch number -> `Rows`. In a worker it opens its files at the first read."""

    def __init__(self, plan: Plan, folder: Path, needs: Needs, text_tokenizer: str | None) -> None:
        self.plan = plan
        self._folder = folder
        self._needs = needs
        self._text_path = text_tokenizer
        self._reader: Reader | None = None
        self._text: text.TextTokenizer | None = None
        self._lock = threading.Lock()

    def open(self, manifest: Manifest, tokenizer: text.TextTokenizer | None) -> None:
        """Use what is open already."""
        self._reader = Reader(manifest)
        self._text = tokenizer

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers get plain values, no open files and no index."""
        return RowReader, (self.plan, self._folder, self._needs, self._text_path)

    def __getitem__(self, number: int) -> Rows:
        with self._lock:  # two iterators of one stream may be alive
            if self._reader is None:
                self._open()
            return self._rows(number)

    def _open(self) -> None:
        manifest = Manifest.open(self._folder)
        if manifest.digest != self.plan.digest:
            raise UserError(f"{self._folder}: the data set was changed while it is in use; start again")
        reads_text = self._text_path is not None and self._needs.text_length
        self.open(manifest, text.open_text(str(self._text_path), self._needs.text_vocab) if reads_text else None)

    def _rows(self, number: int) -> Rows:
        ids = self.plan.ids(number)
        seeds = self.plan.seeds(number, ids)
        reasons: dict[int, str] = {}  # row -> why it cannot be used
        cut_before = self._text.truncated_samples if self._text else 0
        loaders = {"image": self._images, "text": self._captions, "codes": self._codes}
        batch = {key: loaders[key](ids, seeds, reasons) for key in self._needs.keys}
        bad = [(int(ids[row]), reason) for row, reason in sorted(reasons.items())]
        ids[list(reasons)] = -1
        empty = torch.from_numpy(ids < 0)
        for tensor in batch.values():
            tensor[empty] = 0
        batch |= {"id": torch.from_numpy(ids), "seed": torch.from_numpy(seeds), "weight": (~empty).float()}
        return Rows(number, batch, bad, self._text.truncated_samples - cut_before if self._text else 0)

    def _images(self, ids: npt.NDArray[np.int64], seeds: npt.NDArray[np.int64], reasons: dict[int, str]) -> Tensor:
        """uint8 [B, 3, S, S], channels last in memory."""
        size, augment = self._needs.image_size, self._needs.augment
        pixels = np.zeros((len(ids), size, size, 3), np.uint8)

        def load(row: int, sample: int, reader: Reader) -> None:
            picture = decode(reader.read_image(sample))
            pixels[row] = transforms.transform(picture, size, augment, int(seeds[row]))

        self._load_rows(ids, reasons, load)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def _captions(self, ids: npt.NDArray[np.int64], seeds: npt.NDArray[np.int64], reasons: dict[int, str]) -> Tensor:
        """int64 [B, T]."""
        captions = [""] * len(ids)

        def load(row: int, sample: int, reader: Reader) -> None:
            try:
                captions[row] = reader.read(sample, "txt").decode()
            except UnicodeDecodeError:
                raise BadSample("the caption is not UTF-8") from None

        self._load_rows(ids, reasons, load)
        assert self._text is not None
        return self._text.encode(captions, self._needs.text_length, self._needs.bpe_dropout, seeds.tolist())

    def _codes(self, ids: npt.NDArray[np.int64], seeds: npt.NDArray[np.int64], reasons: dict[int, str]) -> Tensor:
        """int64 [B, N]."""
        num_codes, vocab = self._needs.num_codes, self._needs.code_vocab
        out = np.zeros((len(ids), num_codes), np.int64)

        def load(row: int, sample: int, reader: Reader) -> None:
            out[row] = codes.unpack(reader.read(sample, codes.MEMBER), num_codes, vocab)

        self._load_rows(ids, reasons, load)
        return torch.from_numpy(out)

    def _load_rows(
        self, ids: npt.NDArray[np.int64], reasons: dict[int, str], load: Callable[[int, int, Reader], None]
    ) -> None:
        """Call `load` for every row that holds a sample; what cannot be used gets its reason."""
        assert self._reader is not None
        for row, sample in enumerate(ids.tolist()):
            if sample >= 0 and row not in reasons:
                try:
                    load(row, sample, self._reader)
                except BadSample as error:
                    reasons[row] = str(error)


def _open_text(config: DataConfig, needs: Needs, train: bool) -> text.TextTokenizer:
    if config.text_tokenizer is None:
        raise UserError("data.text_tokenizer: this stage reads captions; name a sentencepiece model or a folder")
    tokenizer = text.open_text(config.text_tokenizer, needs.text_vocab)
    if train and needs.bpe_dropout and not tokenizer.can_drop:
        raise UserError(
            f"{config.text_tokenizer}: BPE dropout {needs.bpe_dropout} needs a sentencepiece BPE model; set it to 0 or "
            "train one with data_tools/train_tokenizer.py"
        )
    return tokenizer


def _check_members(manifest: Manifest, needs: Needs) -> None:
    """Raise UserError if the data set cannot give what the stage needs."""
    holds = f"it holds: {', '.join(manifest.members)}"
    if needs.image_size and not manifest.holds_images:
        raise UserError(f"{manifest.folder}: this stage needs images, the data set has none ({holds})")
    if needs.text_length and "txt" not in manifest.members:
        raise UserError(f"{manifest.folder}: this stage needs captions (txt), the data set has none ({holds})")
    if needs.num_codes:
        if codes.MEMBER not in manifest.members:
            raise UserError(
                f"{manifest.folder}: this stage needs image codes, the data set has none ({holds}); make them with "
                "launch/encode.py"
            )
        vocab, grid = manifest.info.get("vocab", 0), manifest.info.get("grid")
        if vocab > needs.code_vocab:
            raise UserError(
                f"{manifest.folder}: its codes come from a vocabulary of {vocab}, the model has room for "
                f"{needs.code_vocab}; set the model's image vocabulary to {vocab}"
            )
        if grid is not None and grid**2 != needs.num_codes:
            raise UserError(
                f"{manifest.folder}: its pictures are {grid} x {grid} codes, the model takes {needs.num_codes}; "
                f"set the model's grid to {grid}"
            )


def _unchanged(rows: _Item) -> _Item:
    """Collate function: a worker's result is a batch already."""
    return rows
