"""The bodies or reasons that `fetch` gives for urls, with short delays."""

from __future__ import annotations

from dalle_scale.curation.download.client import FetchOptions, fetch

OPTIONS = FetchOptions(
    allow_private=True, backoff_seconds=0.01, connect_seconds=20, read_seconds=20, total_seconds=40, max_bytes=1 << 20
)


REASONS = {
    "no url", "malformed url", "not http(s)", "credentials in url", "private address", "dns failure", "tls failure",
    "connection refused", "connection reset", "cannot connect", "timeout", "cut off", "malformed answer",
    "redirects too often", "opted out", "compressed in transfer", "too large", "empty body", "host given up",
}  # fmt: skip


def fetch_all(urls, options: FetchOptions = OPTIONS) -> list[bytes | str]:
    """The body or the reason of each url."""
    results = list(fetch(enumerate(urls), options))
    assert [result.row for result in results] == list(range(len(results))) and len(results) == len(urls)
    assert all(bool(result.body) != bool(result.reason) for result in results), "one of the two"
    heads = {result.reason.partition(":")[0] for result in results if result.reason}
    assert all(head in REASONS or head.startswith("http ") for head in heads)
    return [result.body or result.reason for result in results]


def one(url: str, options: FetchOptions = OPTIONS) -> bytes | str:
    return fetch_all([url], options)[0]
