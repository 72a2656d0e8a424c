"""Statistics of a data set: images, captions, codes and unreadable samples. Used by
data_tools/describe_shards.py.

The data set is read in blocks of samples; each block becomes a `Summary`, and summaries are added in the order of the
blocks, so that the result is the same for any number of processes. Memory does not grow with the data set: lengths are
counted up to a limit, ratios in bins of an eighth of an octave, repeated captions by a sample of all distinct ones.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from math import floor, log2
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import py3langid
from PIL import Image

from dalle_scale.data import codes
from dalle_scale.data.decode import MAX_PIXELS, BadSample, extension, size_of
from dalle_scale.data.manifest import Manifest
from dalle_scale.data.processes import forkserver, set_up
from dalle_scale.data.reader import Reader
from dalle_scale.data.text import TextTokenizer, open_text

BLOCK_SAMPLES = 1000
EXAMPLES = 20  # unreadable samples that are named
LARGEST = 50_000  # whole numbers above this are counted as this; the maximum is exact
PER_OCTAVE = 8  # bins of a ratio between x and 2x
DISTINCT_CAPTIONS = 100_000  # that are remembered to tell which captions come again
_NUMBER = re.compile(r"(?<![\w-])\d+")  # not that of "UTF-8"
_WORD = re.compile(r"\w+(?:['’]\w+)*")


@dataclass(frozen=True)
class Options:
    """Options of reading a data set."""

    folder: Path
    words_share: float = 1.0  # of the samples, chosen by hash of the key: words and languages are found in these
    text_tokenizer: str | None = None


@dataclass
class Distribution:
    """Histogram of a quantity: whole numbers one by one, or positive ratios in logarithmic bins."""

    is_ratio: bool = False
    counts: Counter[int] = field(default_factory=Counter)
    total: float = 0.0
    lowest: float = float("inf")
    highest: float = float("-inf")

    def add(self, value: float) -> None:
        """Count one value; a ratio is above 0, a whole number not below."""
        self.counts[floor(log2(value) * PER_OCTAVE) if self.is_ratio else min(int(value), LARGEST)] += 1
        self.total += value
        self.lowest, self.highest = min(self.lowest, value), max(self.highest, value)

    def merge(self, other: Distribution) -> None:
        """Add what another one has counted."""
        self.counts.update(other.counts)
        self.total += other.total
        self.lowest, self.highest = min(self.lowest, other.lowest), max(self.highest, other.highest)

    @property
    def number(self) -> int:
        """Values counted."""
        return self.counts.total()

    def quantile(self, share: float) -> float:
        """The value below or at which `share` of all lie; of a ratio the middle of its bin."""
        wanted, seen = share * self.number, 0
        for key, count in sorted(self.counts.items()):
            seen += count
            if seen >= wanted:
                value = 2 ** ((key + 0.5) / PER_OCTAVE) if self.is_ratio else float(key)
                return min(max(value, self.lowest), self.highest)
        raise AssertionError("a distribution of nothing has no quantiles")


@dataclass
class Repeats:
    """Repetition of captions, estimated from those whose hash is below a threshold: the threshold halves whenever more
    than `DISTINCT_CAPTIONS` are remembered, so the ones that are left are the same in whatever order they came."""

    halvings: int = 0
    seen: dict[int, int] = field(default_factory=dict)  # hash -> times

    def add(self, caption: str) -> None:
        """Count one caption."""
        self._count(_hash(caption), 1)

    def merge(self, other: Repeats) -> None:
        """Add what another one has counted."""
        if other.halvings > self.halvings:
            self._halve(other.halvings)
        for key, times in other.seen.items():
            self._count(key, times)

    def _count(self, key: int, times: int) -> None:
        if key >> (64 - self.halvings) == 0:
            self.seen[key] = self.seen.get(key, 0) + times
            if len(self.seen) > DISTINCT_CAPTIONS:
                self._halve(self.halvings + 1)

    def _halve(self, halvings: int) -> None:
        self.halvings = halvings
        self.seen = {key: times for key, times in self.seen.items() if key >> (64 - halvings) == 0}


@dataclass
class Summary:
    """Counts. `ok` + all of `unreadable` = samples read."""

    ok: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)  # by reason; a sample has one
    examples: list[dict[str, str]] = field(default_factory=list)  # the first `EXAMPLES`: shard, key, reason
    member_counts: Counter[str] = field(default_factory=Counter)
    member_bytes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    width: Distribution = field(default_factory=Distribution)  # pixels, upright, as `height`
    height: Distribution = field(default_factory=Distribution)
    aspect_ratio: Distribution = field(default_factory=lambda: Distribution(is_ratio=True))  # width / height
    megapixels: Distribution = field(default_factory=lambda: Distribution(is_ratio=True))
    bytes_per_pixel: Distribution = field(default_factory=lambda: Distribution(is_ratio=True))  # of the file
    empty_captions: int = 0
    characters: Distribution = field(default_factory=Distribution)
    words: Distribution = field(default_factory=Distribution)  # between spaces
    tokens: Distribution = field(default_factory=Distribution)
    repeats: Repeats = field(default_factory=Repeats)
    word_samples: int = 0  # captions that the next two are found in
    frequent_words: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    code_samples: int = 0
    code_counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(codes.MAX_VOCAB, np.int64))

    def merge(self, other: Summary) -> None:
        """Add what the summary of the samples after these has counted."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(value, Distribution | Repeats):
                mine.merge(value)
            elif isinstance(value, Counter):
                mine.update(value)
            else:
                setattr(self, name, mine + value)
        self.examples = self.examples[:EXAMPLES]


def summarise(options: Options, blocks: Iterable[range], workers: int) -> Iterator[Summary]:
    """A summary of each block, in order.

    Raises:
        UserError: an index cannot be read, or there is no such text tokenizer.
    """
    if workers < 2:
        _open.cache_clear()  # the data set may have been written anew since
        yield from (_summarise_block(options, block) for block in blocks)
        return
    with ProcessPoolExecutor(workers, forkserver(__name__), set_up) as pool:
        pending: deque[Any] = deque()
        for block in blocks:
            pending.append(pool.submit(_summarise_block, options, block))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def blocks_of(manifest: Manifest) -> list[range]:
    """All samples in blocks, none across two shards."""
    shards = [manifest.samples(number) for number in range(manifest.num_shards)]
    return [shard[at : at + BLOCK_SAMPLES] for shard in shards for at in range(0, len(shard), BLOCK_SAMPLES)]


def image_header(data: bytes) -> tuple[str, int, int]:
    """Format, width and height (pixels, upright) of an encoded image; nothing of it is decoded.

    Raises:
        BadSample: as `decode`, as far as the header tells.
    """
    kind = extension(data)
    if not kind:
        raise BadSample("unknown image format")
    width, height = size_of(data)
    if min(width, height) < 1:
        raise BadSample("image without pixels")
    if width * height > MAX_PIXELS:
        raise BadSample(f"too many pixels: {width} x {height}")
    return kind, width, height


@lru_cache(maxsize=1)
def _open(options: Options) -> tuple[Reader, TextTokenizer | None]:
    """Opened once a process."""
    tokenizer = None if options.text_tokenizer is None else open_text(options.text_tokenizer)
    Image.MAX_IMAGE_PIXELS = None  # nothing is decoded here; what is too large becomes a reason, not a warning
    return Reader(Manifest.open(options.folder)), tokenizer


def _summarise_block(options: Options, block: range) -> Summary:
    reader, tokenizer = _open(options)
    manifest, summary = reader.manifest, Summary()
    parts = {
        "image": manifest.holds_images,
        "caption": "txt" in manifest.members,
        "codes": codes.MEMBER in manifest.members,
    }
    for sample in block:
        for name in manifest.members:
            if (entry := manifest.entry(sample, name)) is not None:
                summary.member_counts[name] += 1
                summary.member_bytes[name] += entry.length
        reasons = []
        for part in (part for part, is_there in parts.items() if is_there):
            try:
                if part == "image":
                    _add_image(summary, reader.read_image(sample))
                elif part == "caption":
                    chosen = _hash(manifest.key(sample)) < options.words_share * 2**64
                    _add_caption(summary, reader.read(sample, "txt"), tokenizer, chosen)
                else:
                    _add_codes(summary, reader.read(sample, codes.MEMBER), manifest.info)
            except BadSample as error:
                reasons.append(str(error))
        if not reasons:
            summary.ok += 1
            continue
        summary.unreadable[_NUMBER.sub("#", reasons[0].partition(":")[0])] += 1
        if len(summary.examples) < EXAMPLES:
            place = {"shard": manifest.shard(manifest.locate(sample)[0]).url, "key": manifest.key(sample)}
            summary.examples.append({**place, "reason": reasons[0]})
    return summary


def _add_image(summary: Summary, data: bytes) -> None:
    kind, width, height = image_header(data)
    summary.formats[kind] += 1
    summary.width.add(width)
    summary.height.add(height)
    summary.aspect_ratio.add(width / height)
    summary.megapixels.add(width * height / 1e6)
    summary.bytes_per_pixel.add(len(data) / (width * height))


def _add_caption(summary: Summary, data: bytes, tokenizer: TextTokenizer | None, chosen: bool) -> None:
    try:
        caption = data.decode()
    except UnicodeDecodeError:
        raise BadSample("the caption is not UTF-8") from None
    if not caption.strip():
        summary.empty_captions += 1
        return
    summary.characters.add(len(caption))
    summary.words.add(len(caption.split()))
    summary.repeats.add(caption)
    if tokenizer is not None:
        summary.tokens.add(len(tokenizer.pieces(caption)))
    if chosen:
        summary.word_samples += 1
        summary.frequent_words.update(_WORD.findall(caption.lower()))
        summary.languages[str(py3langid.classify(caption)[0])] += 1


def _add_codes(summary: Summary, data: bytes, info: dict[str, Any]) -> None:
    if len(data) % 2 or not data:
        raise BadSample(f"codes of {len(data)} bytes")
    vocab, grids = info.get("vocab", codes.MAX_VOCAB), info.get("grids")
    values = codes.unpack(data, len(data) // 2 if grids is None else codes.count(grids), vocab)
    summary.code_samples += 1
    summary.code_counts += np.bincount(values, minlength=codes.MAX_VOCAB)


def _hash(text: str) -> int:
    """64 bits that depend on the text only."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
