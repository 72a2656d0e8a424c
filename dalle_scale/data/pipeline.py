"""From shards to batches: exactly once an epoch, the same batches at any world size and worker count, resumable.

Which sample stands at which place is a pure function (`order.Plan`); rank and worker only choose which rows of a global
batch they compute. A sample that cannot be read keeps its slot, empty, and becomes a row of the ledger; too many of
them stop the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import PIL
import simplejpeg

from dalle_scale import dist, log
from dalle_scale.config import DataConfig, DataSource, SourceConfig
from dalle_scale.data import codes, text
from dalle_scale.data.cache import FetchError, ShardCache
from dalle_scale.data.ledger import Ledger
from dalle_scale.data.manifest import Manifest
from dalle_scale.data.order import MIXTURE_SLOTS, Plan, Source, quotas
from dalle_scale.data.pool import Pool
from dalle_scale.data.reader import ahead
from dalle_scale.data.rows import RowReader, Rows
from dalle_scale.types import Batch, BatchSpec, UserError

_FUSE_SAMPLES = 100  # fewer say nothing about the share of bad ones
_FETCHES = 4  # shards fetched at a time ahead of their use


def open_stream(
    config: DataConfig,
    source: DataSource,
    inputs: BatchSpec,
    *,
    seed: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    train: bool,
    ledger: Path | None,
) -> Stream:
    """Open a data set, or a mixture of several, for a stage that needs `needs`.

    Args:
        source: folder of the data set; for a mixture the folders with their weights.
        global_batch_size: the global batch; a multiple of micro_batch_size * world_size.
        train: False reads in one order, without augmentation and BPE dropout, the same in every epoch and run.
        ledger: file that a line is appended to for every sample that cannot be read.

    Raises:
        UserError: a data set is not there or incomplete, or does not hold what the stage needs.
    """
    parts = (SourceConfig(path=source),) if isinstance(source, str) else source
    manifests = [Manifest.open(part.path) for part in parts]
    tokenizer = _open_text(config, inputs, train) if inputs.text_length else None
    for manifest in manifests:
        _check_members(manifest, inputs)
    weights = tuple(part.weight for part in parts)
    _check_mixture(parts, manifests, weights)
    if not train:
        inputs = dataclasses.replace(inputs, augment="none", bpe_dropout=0.0)
    plan = Plan(
        tuple(Source(manifest.digest, manifest.starts, config.window_shards) for manifest in manifests),
        weights,
        seed,
        global_batch_size,
        micro_batch_size,
        rank,
        world_size,
        train,
    )
    cache = _open_cache(config, manifests)
    folders = tuple(manifest.folder for manifest in manifests)
    rows = RowReader(plan, folders, inputs, config.text_tokenizer, cache, config.threads)
    rows.open(manifests, tokenizer)
    return Stream(rows, manifests, config, Ledger(ledger), cache)


class Stream:
    """An endless sequence of global batches, of which this rank delivers its part. Made by `open_stream`."""

    def __init__(
        self, rows: RowReader, manifests: list[Manifest], config: DataConfig, ledger: Ledger, cache: ShardCache | None
    ) -> None:
        self._rows = rows
        self._plan = rows.plan
        self._manifests = manifests
        self._name = ", ".join(str(manifest.folder) for manifest in manifests)
        self._config = config
        self._ledger = ledger
        self._cache = cache
        self._samples = self._bad_samples = self._truncated_captions = 0
        self._last_reason = ""
        self._told = False

    @property
    def manifest_digest(self) -> str:
        """sha256 of what is read."""
        return self._plan.digest

    @property
    def num_samples(self) -> int:
        """Samples of the data set, or of all of a mixture together."""
        return self._plan.num_samples

    @property
    def batches_per_epoch(self) -> int:
        """Global batches of one epoch; empty slots fill up the last. A mixture has no epochs in common: batches that
        hold as many samples as all its data sets."""
        return self._plan.batches_per_epoch

    def batches(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of the global batches `start` .. `stop` - 1, on the CPU.

        Raises:
            UserError: more samples than config.max_bad_share cannot be read; a remote shard cannot be fetched.
        """
        source = self._from_workers(start, stop) if self._config.workers else self._from_thread(start, stop)
        try:
            with _Prefetch(self._plan, self._manifests, self._cache) as prefetch:
                prefetch.at(start)
                for rows in source:
                    prefetch.at(rows.number + 1)
                    self._account(rows)
                    yield self._micro_batches(rows.batch)
                    if (rows.number + 1) % self.batches_per_epoch == 0:
                        self._tell()
        finally:
            source.close()
            self._tell()

    def state(self, next_batch: int) -> dict[str, Any]:
        """All it takes to continue at global batch `next_batch`, at any world size and worker count."""
        state = {**self._identity(), "epoch": self._plan.epoch(next_batch), "next_batch": next_batch}
        return {**state, "decoders": _DECODERS}

    def check(self, state: dict[str, Any]) -> None:
        """Raise UserError if `state` was saved for other data, another seed or another batch size."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise UserError(
                    f"{self._name}: {name} is {value}, the checkpoint was written with {state.get(name)}; "
                    "continue with the same data, seed and batch, or start a new run"
                )
        if (before := state.get("decoders", _DECODERS)) != _DECODERS:
            log.say(f"images were decoded by {before} so far, now by {_DECODERS}: pixels may differ in the last bit")

    def _identity(self) -> dict[str, Any]:
        """Values that determine the sequence of batches."""
        plan = self._plan
        return {
            "manifest_digest": plan.digest,
            "seed": plan.seed,
            "global_batch_size": plan.global_batch_size,
            "window_shards": self._config.window_shards,
        }

    def _from_thread(self, start: int, stop: int) -> Generator[Rows, None, None]:
        """Read in this process, one batch ahead."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") as pool:
            yield from ahead(pool, self._rows.read, range(start, stop))

    def _from_workers(self, start: int, stop: int) -> Generator[Rows, None, None]:
        """Read in `config.workers` processes."""
        if start < stop:
            with Pool(self._rows, self._config.workers, preload=(__name__,)) as pool:
                yield from pool.batches(start, stop)

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        size = self._plan.micro_batch_size
        starts = range(0, len(batch["id"]), size)
        return [{key: tensor[at : at + size] for key, tensor in batch.items()} for at in starts]

    def _account(self, rows: Rows) -> None:
        """Count, write the ledger, stop the run if too much is bad."""
        self._samples += int((rows.batch["id"] >= 0).sum()) + len(rows.bad)
        self._bad_samples += len(rows.bad)
        self._truncated_captions += rows.truncated_captions
        self._last_reason = rows.bad[-1].reason if rows.bad else self._last_reason
        self._ledger.add([{**dataclasses.asdict(bad), "step": rows.number} for bad in rows.bad])
        limit = self._config.max_bad_share
        if self._samples >= _FUSE_SAMPLES and self._bad_samples > limit * self._samples:
            raise UserError(
                f"{self._name}: {self._bad_samples} of {self._samples} samples cannot be read, more than "
                f"data.max_bad_share = {limit}; the last one: {self._last_reason}; fix the data or raise the limit"
            )

    def _tell(self) -> None:
        """Say once what did not go in as it is."""
        if self._told:
            return
        share = f"of {self._samples:,} samples read by this process"
        if self._truncated_captions:
            log.say(
                f"{self._name}: {self._truncated_captions:,} {share} had their captions truncated to the text length"
            )
        if self._bad_samples:
            log.say(f"{self._name}: {self._bad_samples:,} {share} were left out, see {self._ledger.path}")
        self._told = bool(self._truncated_captions or self._bad_samples)


class _Prefetch:
    """Fetches the remote shards of this window and the next while batches are read; one process a machine does."""

    def __init__(self, plan: Plan, manifests: list[Manifest], cache: ShardCache | None) -> None:
        self._plan = plan
        self._manifests = manifests
        self._cache = cache if plan.train and dist.local_rank() == 0 else None
        self._pool = ThreadPoolExecutor(max_workers=_FETCHES, thread_name_prefix="fetch") if self._cache else None
        self._asked: set[tuple[int, int, int]] = set()  # source, epoch, window

    def __enter__(self) -> _Prefetch:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def at(self, number: int) -> None:
        """Global batch `number` is needed next."""
        if self._pool is None:
            return
        for source, epoch, window in self._plan.windows_near(number):
            if (source, epoch, window) not in self._asked:
                self._asked.add((source, epoch, window))
                for shard in self._plan.sources[source].shards_of_window(self._plan.seed, epoch, window):
                    self._pool.submit(self._fetch, source, shard)

    def _fetch(self, source: int, number: int) -> None:
        shard = self._manifests[source].shard(number)
        if shard.is_remote and self._cache is not None:
            with suppress(FetchError):  # whoever needs the shard says it
                self._cache.fetch(shard.url, shard.size_bytes, shard.sha256)


def _open_text(config: DataConfig, inputs: BatchSpec, train: bool) -> text.TextTokenizer:
    if config.text_tokenizer is None:
        raise UserError("data.text_tokenizer: this stage reads captions; name a sentencepiece model or a folder")
    tokenizer = text.open_text(config.text_tokenizer, inputs.text_vocab)
    if train and inputs.bpe_dropout and not tokenizer.can_drop:
        raise UserError(
            f"{config.text_tokenizer}: BPE dropout {inputs.bpe_dropout} needs a sentencepiece BPE model; set it to 0 "
            "or train one with data_tools/train_tokenizer.py"
        )
    return tokenizer


def _open_cache(config: DataConfig, manifests: list[Manifest]) -> ShardCache | None:
    """The cache, if there are remote shards; it must hold two windows of each data set."""
    remote = [manifest for manifest in manifests if manifest.has_remote_shards]
    if not remote:
        return None
    if config.cache is None:
        raise UserError(f"{remote[0].folder}: its shards are remote; name a folder for them: data.cache=...")
    cap_bytes = int(config.cache_gib * 2**30)
    needed_bytes = sum(manifest.largest_shards_bytes(2 * config.window_shards) for manifest in remote)
    if cap_bytes < needed_bytes:
        raise UserError(
            f"data.cache_gib: {config.cache_gib} is less than two windows of shards take, {needed_bytes / 2**30:.1f}; "
            "raise it or lower data.window_shards"
        )
    return ShardCache(Path(config.cache), cap_bytes)


def _check_mixture(parts: tuple[SourceConfig, ...], manifests: list[Manifest], weights: tuple[float, ...]) -> None:
    """Raise UserError for a mixture of nothing, an empty data set, twice the same one, or a weight that is no share."""
    if not parts:
        raise UserError("data.train: an empty list; name at least one data set")
    for part, manifest, quota in zip(parts, manifests, quotas(weights), strict=True):
        if not manifest.num_samples:
            raise UserError(f"{part.path}: this data set holds no samples")
        if not quota:
            raise UserError(f"{part.path}: weight {part.weight} is less than one sample in {MIXTURE_SLOTS}; raise it")
    if len({manifest.digest for manifest in manifests}) < len(manifests):
        raise UserError("data.train: the same data set twice; give it one entry with the sum of the weights")


def _check_members(manifest: Manifest, inputs: BatchSpec) -> None:
    """Raise UserError if the data set cannot give what the stage needs."""
    holds = f"it holds: {', '.join(manifest.members)}"
    if inputs.num_classes:
        raise UserError(f"{manifest.folder}: this stage needs class labels, the data set has none ({holds})")
    if inputs.image_size and not manifest.holds_images:
        raise UserError(f"{manifest.folder}: this stage needs images, the data set has none ({holds})")
    if inputs.text_length and "txt" not in manifest.members:
        raise UserError(f"{manifest.folder}: this stage needs captions (txt), the data set has none ({holds})")
    if inputs.num_codes:
        if codes.MEMBER not in manifest.members:
            raise UserError(
                f"{manifest.folder}: this stage needs image codes, the data set has none ({holds}); make them with "
                "launch/encode.py"
            )
        vocab, grids = manifest.info.get("vocab", 0), manifest.info.get("grids")
        if vocab > inputs.code_vocab:
            raise UserError(
                f"{manifest.folder}: its codes come from a vocabulary of {vocab}, the model has room for "
                f"{inputs.code_vocab}; set the model's image vocabulary to {vocab}"
            )
        if grids is not None and codes.count(grids) != inputs.num_codes:
            raise UserError(
                f"{manifest.folder}: its images are {codes.describe(grids)}, the model takes {inputs.num_codes}; "
                f"set the model's grid to {', '.join(map(str, grids))}"
            )


_DECODERS = f"simplejpeg {simplejpeg.__version__}, Pillow {PIL.__version__}"
