"""Rules of the downloader: what may be fetched, and names of failures. Pure functions without connections.

A reason is a short text; what stands before its first colon comes from a fixed list, so that reasons can be counted.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import random
import re
import socket
import ssl
from collections.abc import Iterable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

import aiohttp
from yarl import URL

from dalle_scale.data.decode import BadSample
from dalle_scale.types import UserError

MAX_URL_LETTERS = 8_000
_HOST = re.compile(r"[A-Za-z0-9._~%:-]+")  # after IDNA
_OPT_OUTS = ("noai", "noimageai", "noindex", "noimageindex")
_WITH_VALUE = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")  # "name: value" directives
_CLOUD_CONTROL = frozenset({ipaddress.ip_address("168.63.129.16")})  # looks public; Azure answers machines inside on it
_MAY_PASS = frozenset(
    ["timeout", "connection reset", "connection refused", "cannot connect", "cut off", "dns failure", "tls failure"]
    + ["malformed answer", "empty body", "host given up", "client error"]
    + [f"http {status}" for status in (403, 408, 425, 429, *range(500, 1000))]
)
_RESETS = (errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE)
_UNICAST_6 = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Passing(BadSample):
    """A failure that may be over when the same is asked again."""

    def __init__(self, reason: str, wait_seconds: float = 0.0) -> None:
        """wait_seconds: for how long the server wants to be left alone."""
        super().__init__(reason)
        self.wait_seconds = wait_seconds


class PrivateAddress(OSError):
    """A connection that was about to be made leads inside. Its text never varies: aiohttp joins texts that differ."""


def check_url(text: object, base: URL | None = None) -> URL:
    """A url that may be asked for.

    Args:
        text: one cell of the user's list, or a Location header.
        base: where the Location header came from.

    Raises:
        BadSample: nothing there, malformed, neither http nor https, or with a user name or password in it.
    """
    if not isinstance(text, str) or not text.strip():
        raise BadSample("no url")
    try:
        # only the start of a long one is looked at: a "data:" url may have megabytes
        url = URL(text.strip()[:MAX_URL_LETTERS])
        if base is not None:
            url = base.join(url)
        if url.scheme not in ("http", "https"):
            raise BadSample("not http(s)")
        sound = bool(_HOST.fullmatch(url.raw_host or "") and url.port) and len(text) <= MAX_URL_LETTERS
    except (ValueError, IndexError):  # yarl's, where brackets and "@" are mixed up
        sound = False
    if not sound:
        raise BadSample("malformed url")
    if url.raw_user or url.raw_password:
        raise BadSample("credentials in url")
    return url


def is_public(address: str) -> bool:
    """Whether an address, as the operating system will connect to it, lies in the public internet."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # a spelling that only the system's own parser knows
        return False
    inner = None
    if isinstance(ip, ipaddress.IPv6Address):
        # IPv4 in other clothes; of Teredo's two addresses the relay's server counts for nothing
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(ip.packed[-4:])
        if inner is None and ip not in _UNICAST_6:
            return False
    if inner is not None:
        return is_public(str(inner))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip in _CLOUD_CONTROL)


def opt_out(headers: Iterable[str], agent: str) -> str | None:
    """The directive of X-Robots-Tag headers that keeps this file out of training sets, None if there is none.

    "noai, noindex" speaks to everyone, "somebot: noai" to somebot; a name holds up to the next name in its header.

    Args:
        agent: what this program calls itself, in lower case.
    """
    for header in headers:
        addressed = True
        for part in header.lower().split(","):
            name, colon, rest = (piece.strip() for piece in part.partition(":"))
            if colon and name not in _WITH_VALUE:
                addressed = name in (agent, "*")
            directive = rest if colon and name not in _WITH_VALUE else name
            if addressed and directive in _OPT_OUTS:
                return directive
    return None


def retry_after_seconds(header: str | None, now: datetime | None = None) -> float:
    """Delay that a Retry-After header asks for, in seconds; 0 without one, or if it is neither seconds nor a date."""
    text = (header or "").strip()
    if re.fullmatch(r"[0-9]{1,12}", text):
        return float(text)
    try:
        date = parsedate_to_datetime(text)
        date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
        return max(0.0, (date - (now or datetime.now(timezone.utc))).total_seconds())
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0


def may_pass(reason: str) -> bool:
    """Whether the same url may give an image another day. The reasons in question are those of `fetch`."""
    return reason.partition(":")[0] in _MAY_PASS


def backoff_seconds(row: int, tries: int, first_seconds: float) -> float:
    """Delay after a failed try: doubled each time, give or take a half. A function of the row, so that the
    rows of a host do not come back all at once and every run has the same schedule."""
    return first_seconds * 2.0**tries * (0.5 + random.Random(f"{row}/{tries}").random())


def failure(error: Exception) -> BadSample:
    """Reason for a row, from an exception of the HTTP client.

    Raises:
        UserError: this process has no file descriptor left, which is no fault of the row.
    """
    if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
        return BadSample("tls failure")
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
        raise UserError("too many open files: fetch with fewer connections, or raise the limit with ulimit -n")
    if isinstance(cause, PrivateAddress):
        return BadSample("private address")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        kind = Passing if getattr(cause, "errno", None) == socket.EAI_AGAIN else BadSample
        return kind(f"dns failure: {getattr(cause, 'strerror', None) or 'no answer'}")
    if isinstance(error, asyncio.TimeoutError) or isinstance(cause, TimeoutError):
        return Passing("timeout")
    if isinstance(error, aiohttp.ClientPayloadError):
        return Passing("cut off")
    if isinstance(error, aiohttp.ClientResponseError):
        return BadSample("malformed answer")
    if isinstance(cause, ConnectionRefusedError):
        return BadSample("connection refused")
    if isinstance(error, aiohttp.ServerDisconnectedError) or getattr(cause, "errno", None) in _RESETS:
        return Passing("connection reset")
    if isinstance(cause, OSError):
        return BadSample(f"cannot connect: {cause.strerror or type(cause).__name__}")
    if isinstance(error, ValueError):
        return BadSample("malformed url")
    return BadSample(f"client error: {type(error).__name__}")
