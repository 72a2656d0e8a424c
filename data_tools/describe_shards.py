"""Describe a data set: one page of plots and the same numbers as JSON.

    python data_tools/describe_shards.py --data runs/images/shards/train [--text-tokenizer text.model]

Writes <out>/stats.html, which needs nothing from outside, and <out>/stats.json; <out> is the data set's folder unless
named. Every sample is read and its checksums verified; of images only the headers are looked at. Frequent words and
languages are found in about --limit captions, chosen by a hash of the key. Languages of short captions are guesses.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from math import exp
from typing import Any

import numpy as np

from dalle_scale import io, log
from dalle_scale.arguments import Parser
from dalle_scale.curation import statistics_page
from dalle_scale.curation.statistics import LARGEST, PER_OCTAVE, Distribution, Options, Summary, blocks_of, summarise
from dalle_scale.data.manifest import Manifest
from dalle_scale.report.page import write_page
from dalle_scale.types import UserError

Bin = tuple[float, float, float]  # from, below, how many
BARS = 50
TOP_WORDS = 24


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, count, write."""
    parser = Parser(__doc__)
    parser.add_data()
    parser.add_out("folder of stats.html and stats.json (default: the data set's)", required=False)
    parser.add_limit("captions to find words and languages in", 100_000)
    parser.add_workers()
    parser.add_argument("--text-tokenizer", help="also count caption lengths in its tokens")
    args = parser.parse_args(arguments)
    out = (args.out or args.data) / "stats.html"
    manifest = Manifest.open(args.data)
    if manifest.has_remote_shards:
        raise UserError(f"{args.data}: has remote shards; fetch the data set into a folder and describe that")
    options = Options(args.data, args.limit / manifest.num_samples, args.text_tokenizer)
    blocks = blocks_of(manifest)
    summary = Summary()
    for block in log.progress(summarise(options, blocks, args.workers), "describe", "blocks", total=len(blocks)):
        summary.merge(block)
    numbers = document(manifest, summary)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_page(out, statistics_page.page(numbers))
    io.write_json(out.with_suffix(".json"), numbers)
    log.say(f"{out}: {summary.ok:,} of {manifest.num_samples:,} samples can be read")


def document(manifest: Manifest, summary: Summary) -> dict[str, Any]:
    """Everything the page shows, as JSON can hold it."""
    shards = manifest.shards
    result: dict[str, Any] = {
        "data_set": manifest.folder.name,
        "digest": manifest.digest,
        "info": manifest.info,
        "samples": manifest.num_samples,
        "readable": summary.ok,
        "unreadable": dict(summary.unreadable.most_common()),
        "unreadable_examples": summary.examples,
        "shards": len(shards),
        "bytes": sum(shard.size_bytes for shard in shards),
        "samples_per_shard": {
            "min": min(shard.samples for shard in shards),
            "max": max(shard.samples for shard in shards),
        },
        "members": {
            name: {"samples": summary.member_counts[name], "bytes": summary.member_bytes[name]}
            for name in manifest.members
        },
    }
    if summary.formats:
        names = ("width", "height", "aspect_ratio", "megapixels", "bytes_per_pixel")
        result["images"] = {
            "formats": dict(ranked(summary.formats)),
            **{name: distribution(getattr(summary, name)) for name in names},
        }
    if summary.characters.counts or summary.empty_captions:
        distinct, seen = len(summary.repeats.seen), sum(summary.repeats.seen.values())
        lengths = [name for name in ("characters", "words", "tokens") if getattr(summary, name).counts]
        result["captions"] = {
            "empty": summary.empty_captions,
            "repeated_share": round(1 - distinct / seen, 6) if seen else 0.0,
            "repeated_is_estimate": summary.repeats.halvings > 0,
            **{name: distribution(getattr(summary, name)) for name in lengths},
            "words_from_samples": summary.word_samples,
            "frequent_words": dict(ranked(summary.frequent_words)[:TOP_WORDS]),
            "languages": dict(ranked(summary.languages)),
        }
    if summary.code_samples:
        result["codes"] = code_numbers(summary, manifest.info)
    return result


def ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    """Most frequent first, equal ones by name."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def distribution(values: Distribution) -> dict[str, Any]:
    """Mean, quantiles and at most some `BARS` bins."""
    shares = {"p01": 0.01, "p25": 0.25, "median": 0.5, "p75": 0.75, "p99": 0.99}
    return {
        "count": values.number,
        "mean": round(values.total / values.number, 6),
        "min": round(values.lowest, 6),
        **{name: round(values.quantile(share), 6) for name, share in shares.items()},
        "max": round(values.highest, 6),
        **({"counted_up_to": LARGEST} if values.highest > LARGEST and not values.is_ratio else {}),
        "bins": ratio_bins(values) if values.is_ratio else length_bins(values),
    }


def ratio_bins(values: Distribution) -> list[Bin]:
    """Equal steps on a logarithmic axis."""
    lowest, highest = min(values.counts), max(values.counts)
    step = 1
    while (highest - lowest) // step >= BARS:
        step *= 2
    counts: Counter[int] = Counter()
    for key, count in values.counts.items():
        counts[key // step] += count
    edges = [2 ** (place * step / PER_OCTAVE) for place in range(lowest // step, highest // step + 2)]
    found = (counts[place] for place in range(lowest // step, highest // step + 1))
    return [(round(a, 9), round(b, 9), n) for (a, b), n in zip(pairwise(edges), found, strict=True)]


def length_bins(values: Distribution) -> list[Bin]:
    """Equal steps up to where 99.5% of the values lie; the last bin also holds all that is longer."""
    lowest, highest = min(values.counts), int(values.quantile(0.995))
    step = next(s for p in range(9) for s in (10**p, 2 * 10**p, 5 * 10**p) if highest - lowest < s * BARS)
    counts: Counter[int] = Counter()
    for key, count in values.counts.items():
        counts[min(key, highest) // step] += count
    first, last = lowest // step, highest // step
    bins: list[Bin] = [(place * step, (place + 1) * step, counts[place]) for place in range(first, last + 1)]
    bins[-1] = (bins[-1][0], max(bins[-1][1], int(values.highest) + 1), bins[-1][2])
    return bins


def code_numbers(summary: Summary, info: dict[str, Any]) -> dict[str, Any]:
    """Evenness of code usage."""
    counts = summary.code_counts
    used = int((counts > 0).sum())
    shares = counts[counts > 0] / counts.sum()
    by_rank = np.sort(counts)[::-1][:used]
    edges = sorted({*(round(10 ** (place / 12)) for place in range(61) if 10 ** (place / 12) <= used), used + 1})
    means = [float(by_rank[a - 1 : b - 1].mean()) for a, b in pairwise(edges)]
    return {
        "samples": summary.code_samples,
        "vocab": info.get("vocab"),
        "used": used,
        "perplexity": round(exp(float(-(shares * np.log(shares)).sum())), 4),
        "counts": counts[: int(np.flatnonzero(counts).max()) + 1].tolist(),
        "mean_uses_by_rank": [(a, b, round(n, 3)) for (a, b), n in zip(pairwise(edges), means, strict=True)],
    }


if __name__ == "__main__":
    log.guarded(main)
