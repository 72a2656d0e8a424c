"""Download the images of a list of urls with captions and make shards of them, as training reads them.

    python data_tools/download.py LIST... --out runs/web [--size 256] [--valid-share 0.02] [--preset dalle]

A LIST is a CSV, TSV, JSONL or parquet table with a column `url` (or `URL`) and one for the caption, as img2dataset
takes them; scores in the columns pwatermark, punsafe and NSFW can be filtered by.

Every row ends in a shard or, with its reason, as a line of <out>/ledger.jsonl; the tables in <out>/rows name the row's
number in the list, where its other columns are; those named by --keep-column are stored beside image and caption.
Filters on captions and scores come first, so what they leave out is
not downloaded. A run that was stopped continues with the same command, at any number of workers; rows that failed in
what is done are not asked for again. For these, when all is done:

    python data_tools/download.py LIST... --out runs/web_again --retry-failed runs/web

makes a data set of the rows that failed in runs/web for a reason that may have passed (timeouts, 5xx, names that were
not found, ...) and are there now. It goes beside the first; their keys differ.

Nothing is asked for inside: only http and https, and only addresses of the public internet (--allow-private lifts
that). What is marked noai, noimageai, noindex or noimageindex by X-Robots-Tag is left out.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

import dalle_scale.log  # noqa: F401 names the extra if pyarrow is missing  # isort: skip
import pyarrow as pa
import pyarrow.parquet as pq
from build_shards import add_filters, add_output, checked, make_recipe

from dalle_scale import log
from dalle_scale.arguments import Parser
from dalle_scale.curation.build import build
from dalle_scale.curation.download.client import FetchOptions
from dalle_scale.curation.download.downloader import Downloads, rows_per_table
from dalle_scale.curation.items import CAPTION_COLUMNS, Options
from dalle_scale.curation.tables import TABLES, Records
from dalle_scale.types import UserError

URL_COLUMNS = ("url", "URL")
# the others (timeouts, retries, connections) may change while a list is being worked through
_POLICY = ("max_bytes", "redirects", "user_agent", "allow_private", "heed_robots_tag")


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and download."""
    args = parse(arguments)
    warnings.filterwarnings("ignore", module="PIL")  # what Pillow only warns of it decodes; the rest is in the ledger
    recipe = make_recipe(args)
    urls = (args.url_column,) if args.url_column else URL_COLUMNS
    captions = (args.caption_column,) if args.caption_column else CAPTION_COLUMNS
    for path in args.lists:
        check_columns(path, {"--url-column": urls, "--caption-column": captions})
        for name in recipe.keep_columns:
            check_columns(path, {"--keep-column": (name,)})
    options = Options(urls, captions, other_columns=(*recipe.filters.columns, *urls, *recipe.keep_columns))
    downloads = Downloads(urls, fetch_options(args), args.retry_failed)
    plan = {name: getattr(downloads.options, name) for name in _POLICY}
    if args.retry_failed:
        rows_per_table(args.retry_failed)  # it must be there
        if args.retry_failed.resolve() == args.out.resolve():
            raise UserError(
                f"--retry-failed {args.retry_failed}: that is --out too; give the new data set its own folder"
            )
        plan["retry_failed"] = str(args.retry_failed.resolve())
    build(args.out, args.lists, options, recipe, args.workers, args.overwrite, downloads, plan)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    defaults = FetchOptions()
    parser = Parser(__doc__)
    parser.add_argument("lists", nargs="+", type=Path, metavar="LIST")
    add_output(parser)
    # while one worker waits for its chunk's slowest servers, another has images to decode
    parser.set_defaults(workers=2 * len(os.sched_getaffinity(0)))
    parser.add_argument("--url-column", help=f"default: the first of {', '.join(URL_COLUMNS)}")
    parser.add_argument("--caption-column", help=f"default: the first of {', '.join(CAPTION_COLUMNS)}")
    group = parser.add_argument_group("network")
    group.add_argument("--connections", type=int, default=256, help="of all workers together; at least one each")
    group.add_argument("--per-host", type=int, default=8, help="connections to one host, counted in the same way")
    group.add_argument("--host-delay-seconds", type=float, default=0.0, help="between a worker's requests to one host")
    group.add_argument("--timeout-seconds", type=float, default=defaults.total_seconds, help="of one try")
    group.add_argument("--max-bytes", type=int, default=defaults.max_bytes, help="of one file")
    group.add_argument("--retries", type=int, default=defaults.retries, help="after timeouts, resets, 429 and 5xx")
    group.add_argument("--user-agent", default=defaults.user_agent, help="say who you are: NAME/1.0 (mail or web page)")
    group.add_argument("--allow-private", action="store_true", help="also connect to addresses inside your network")
    group.add_argument("--ignore-robots-tag", action="store_true", help="also take what its owner has marked noai")
    group.add_argument("--retry-failed", type=Path, metavar="DATA_SET", help="only what failed there; see above")
    add_filters(parser)
    return checked(parser.parse_args(arguments))


def fetch_options(args: argparse.Namespace) -> FetchOptions:
    """One worker's part of the connections, and the other options of the network. Raises UserError."""
    if min(args.connections, args.per_host) < 1:
        raise UserError("--connections and --per-host are at least 1")
    defaults = FetchOptions()
    return FetchOptions(
        connections=max(1, args.connections // args.workers),
        per_host=max(1, args.per_host // args.workers),
        host_delay_seconds=args.host_delay_seconds,
        max_bytes=args.max_bytes,
        connect_seconds=min(defaults.connect_seconds, args.timeout_seconds),
        read_seconds=min(defaults.read_seconds, args.timeout_seconds),
        total_seconds=args.timeout_seconds,
        retries=args.retries,
        user_agent=args.user_agent,
        allow_private=args.allow_private,
        heed_robots_tag=not args.ignore_robots_tag,
    )


def check_columns(path: Path, wanted: dict[str, tuple[str, ...]]) -> None:
    """Find out before anything is fetched that a list has no such column.

    Args:
        wanted: option -> columns, one of which must be there.

    Raises:
        UserError: one is missing, or the list cannot be read.
    """
    if path.suffix[1:] not in TABLES:
        raise UserError(f"{path}: not a list; give a table ({', '.join(TABLES)})")
    try:
        if path.suffix == ".parquet":
            names = list(pq.read_schema(path).names)
        else:
            with path.open("rb") as file:
                records = Records(str(path), file)
                names = list(records.header) if records.header else list(next(iter(records), {}))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    for option, columns in wanted.items():
        if names and not set(columns) & set(names):
            raise UserError(f"{path}: no column {' or '.join(columns)}; it has {', '.join(names)}; see {option}")


if __name__ == "__main__":
    log.guarded(main)
