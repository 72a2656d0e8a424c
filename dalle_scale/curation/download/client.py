"""Fetch a chunk of urls from servers that nobody vouches for: each row ends as the body or as exactly one reason.

    for fetched in fetch([(0, "https://example.org/a.jpg"), (1, "http://example.org/b.png")], FetchOptions()):
        print(fetched.row, len(fetched.body), fetched.reason)

The connections live in a thread with an event loop of its own; the caller sees a plain generator, in the order of its
rows, and may be slow: what came meanwhile waits, up to `buffer_bytes`.

Only http and https, on every hop of a redirect. The address of each connection is checked in the moment in which its
socket is made, after all name resolution, so neither spelling, DNS nor redirect leads inside. No cookies, no
credentials, no proxies, nothing is decompressed. This is not a crawler: it reads no robots.txt and follows no links.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import resource
import socket
import threading
from collections.abc import AsyncIterator, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from dalle_scale.curation.download.policy import (
    Passing,
    PrivateAddress,
    backoff_seconds,
    check_url,
    failure,
    is_public,
    opt_out,
    retry_after_seconds,
)
from dalle_scale.data.decode import BadSample
from dalle_scale.types import UserError

_IDLE_SECONDS = 0.25  # for which a connection waits for its host's next row; short, so that few of them are open
_LOOK_UPS = 4  # threads for names, per connection: a look-up continues when the row that wanted it has given up
_HTTP_OK = 200
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = 429


@dataclass(frozen=True)
class FetchOptions:
    """Limits of one `fetch`. At most buffer_bytes + connections * max_bytes of bodies are in memory."""

    connections: int = 64  # rows in work at a time
    per_host: int = 4  # connections to one host name
    host_delay_seconds: float = 0.0  # between the starts of two requests to one host
    max_bytes: int = 16 << 20  # of one body
    connect_seconds: float = 10.0  # name, connection and TLS
    read_seconds: float = 10.0  # without a byte
    total_seconds: float = 30.0  # of one try, redirects included
    retries: int = 2  # after 5xx, 429, a timeout, a reset; aiohttp asks once more itself if a connection just closes
    backoff_seconds: float = 1.0  # before the first retry, doubled each time, give or take a half
    max_wait_seconds: float = 30.0  # of a back-off; a server that asks for more by Retry-After is not asked again
    redirects: int = 5
    host_failures: int = 32  # requests in a row without an answer, after which a host's rows of this chunk are given up
    buffer_bytes: int = 256 << 20  # bodies that wait for the caller; beyond it no new row begins
    user_agent: str = "dalle_scale/0.1"  # the part before "/" is the name that X-Robots-Tag may address
    allow_private: bool = False  # connect to loopback, link-local and other addresses that are not public
    heed_robots_tag: bool = True  # leave out what is marked noai, noimageai, noindex or noimageindex

    def __post_init__(self) -> None:
        """Raises UserError where a number makes no sense or the system allows too few open files."""
        for name in ("connections", "per_host", "max_bytes", "host_failures", "retries", "redirects"):
            least = 0 if name in ("retries", "redirects") else 1
            if getattr(self, name) < least:
                raise UserError(f"{name}: {getattr(self, name)} is too few, the least is {least}")
        for name in ("connect_seconds", "read_seconds", "total_seconds"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: {getattr(self, name)} is not above 0")
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if limit != resource.RLIM_INFINITY and limit < 4 * self.connections + 128:
            raise UserError(
                f"connections: {self.connections} may need {4 * self.connections + 128} open files, the limit is "
                f"{limit}; take fewer, or raise the limit with ulimit -n"
            )


@dataclass(frozen=True)
class Fetched:
    """One row's end: a body that is not empty, or a reason."""

    row: int
    body: bytes = b""
    reason: str = ""


def fetch(rows: Iterable[tuple[int, Any]], options: FetchOptions) -> Generator[Fetched, None, None]:
    """Fetch (row number, url) pairs; the results come in the same order, one for each.

    Close it, or use it up: a generator that is forgotten half-way may keep its connections for a while.
    All rows are taken in at once and state is kept for each host among them: give it some ten thousand, not all.

    Raises:
        UserError: this process ran out of file descriptors. Nothing else: no url and no server raises anything here.
    """
    work = _Work(list(rows), options)
    thread = threading.Thread(target=work.run, name="fetch", daemon=True)
    thread.start()
    try:
        early: dict[int, Fetched] = {}
        for position in range(len(work.rows)):
            while position not in early:
                item = work.finished.get()
                if isinstance(item, BaseException):
                    raise item
                early[item[0]] = item[1]
            fetched = early.pop(position)
            work.take(len(fetched.body))
            yield fetched
    finally:
        work.stop()
        thread.join()


class _Work:
    """One chunk in its thread. `finished` brings (position, Fetched) in any order, or the exception that ended it."""

    def __init__(self, rows: list[tuple[int, Any]], options: FetchOptions) -> None:
        self.rows = rows
        self.finished: queue.SimpleQueue[tuple[int, Fetched] | BaseException] = queue.SimpleQueue()
        self._options = options
        self._agent = options.user_agent.partition("/")[0].strip().lower()
        self._hosts: dict[str, _Host] = {}
        self._in_work: set[asyncio.Task[None]] = set()
        self._came_bytes = 0  # written by the thread only
        self._taken_bytes = 0  # written by the caller only
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._main = self._loop.create_task(self._fetch_all())

    def run(self) -> None:
        """The thread's life."""
        try:
            self._loop.run_until_complete(self._main)
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self.finished.put(error)
        finally:
            self._loop.close()

    def take(self, size_bytes: int) -> None:
        """The caller has taken a body: there is room for others."""
        self._taken_bytes += size_bytes
        with suppress(RuntimeError):  # the loop is closed: all rows are done
            self._loop.call_soon_threadsafe(self._changed.set)

    def stop(self) -> None:
        """Drop what is not done."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._main.cancel)

    async def _fetch_all(self) -> None:
        resolver = _Resolver(_LOOK_UPS * self._options.connections)
        try:
            async with self._session(resolver) as session:
                try:
                    for position, (row, url) in enumerate(self.rows):
                        await self._room()
                        task = self._loop.create_task(self._finish(session, position, row, url))
                        self._in_work.add(task)
                        task.add_done_callback(self._leave)
                    await asyncio.gather(*self._in_work)
                finally:
                    for task in self._in_work:
                        task.cancel()
                    await asyncio.gather(*self._in_work, return_exceptions=True)
            await asyncio.sleep(0)  # the transports close now
        finally:
            await resolver.close()

    def _session(self, resolver: _Resolver) -> aiohttp.ClientSession:
        """A client that keeps nothing between requests but idle connections."""
        connector = aiohttp.TCPConnector(
            limit=0,  # `connections` and `per_host` are counted here
            resolver=resolver,
            use_dns_cache=False,
            keepalive_timeout=_IDLE_SECONDS,
            socket_factory=None if self._options.allow_private else _public_socket,
        )
        return aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(
                total=None, connect=self._options.connect_seconds, sock_read=self._options.read_seconds
            ),
            headers={
                "User-Agent": self._options.user_agent,
                "Accept": "image/jpeg,image/png,image/webp,image/*;q=0.8,*/*;q=0.5",
                "Accept-Encoding": "identity",
            },
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,  # no proxy, which would make connections that are not checked here, and no ~/.netrc
        )

    async def _room(self) -> None:
        """Wait until another row may begin. The oldest row is in work already, so there will be room."""
        while (
            len(self._in_work) >= self._options.connections
            or self._came_bytes - self._taken_bytes > self._options.buffer_bytes
        ):
            self._changed.clear()
            await self._changed.wait()

    def _leave(self, task: asyncio.Task[None]) -> None:
        self._in_work.discard(task)
        self._changed.set()

    async def _finish(self, session: aiohttp.ClientSession, position: int, row: int, url: Any) -> None:
        """Bring one row to its end."""
        try:
            self.finished.put((position, await self._row(session, row, url)))
        except BaseException as error:  # also a stray cancellation: a row without an end would hold the caller forever
            self.finished.put(error)

    async def _row(self, session: aiohttp.ClientSession, row: int, url: Any) -> Fetched:
        """Try, and try again where it may help."""
        longest = self._options.max_wait_seconds
        for tries in itertools.count():
            try:
                return Fetched(row, body=await self._try(session, url))
            except Passing as error:
                if tries == self._options.retries or error.wait_seconds > longest:
                    return Fetched(row, reason=str(error))
                wait_seconds = min(backoff_seconds(row, tries, self._options.backoff_seconds), longest)
                wait_seconds = max(wait_seconds, error.wait_seconds)
            except BadSample as error:
                return Fetched(row, reason=str(error))
            await asyncio.sleep(wait_seconds)
        raise AssertionError("unreachable")

    async def _try(self, session: aiohttp.ClientSession, text: Any) -> bytes:
        """One url and the redirects from it. Time spent in waiting for a turn at a host does not count."""
        url, left_seconds = check_url(text), self._options.total_seconds
        for _ in range(self._options.redirects + 1):
            host = self._hosts.setdefault(url.raw_host or "", _Host(self._options))
            async with host.turn():
                started = self._loop.time()
                answer = await self._ask(session, host, url, left_seconds)
                left_seconds -= self._loop.time() - started
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise BadSample("redirects too often")

    async def _ask(self, session: aiohttp.ClientSession, host: _Host, url: URL, left_seconds: float) -> bytes | URL:
        """One request: the body, or where it is to be found. Raises BadSample."""
        try:
            answer = await asyncio.wait_for(self._get(session, url), left_seconds)
        except BadSample:
            host.failures = 0
            raise
        except Exception as error:
            reason = failure(error)
            host.failures += isinstance(reason, Passing)
            raise reason from None
        host.failures = 0
        return answer

    async def _get(self, session: aiohttp.ClientSession, url: URL) -> bytes | URL:
        async with session.get(url, allow_redirects=False) as response:
            location = response.headers.get("Location")
            if response.status in _REDIRECTS and location is not None:
                return check_url(location, url)
            self._check_head(response)
            return await self._read(response)

    def _check_head(self, response: aiohttp.ClientResponse) -> None:
        """Raise BadSample for an answer whose body is not wanted."""
        status, headers = response.status, response.headers
        if status == _BUSY or status >= 500:
            raise Passing(f"http {status}", retry_after_seconds(headers.get("Retry-After")))
        if status != _HTTP_OK:
            raise BadSample(f"http {status}")
        if self._options.heed_robots_tag:
            directive = opt_out(headers.getall("X-Robots-Tag", []), self._agent)
            if directive:
                raise BadSample(f"opted out: X-Robots-Tag says {directive}")
        encoding = headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise BadSample("compressed in transfer: identity was asked for")

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        """The body, as long as it is not too long."""
        limit = self._options.max_bytes
        if (response.content_length or 0) > limit:
            raise BadSample(f"too large: {response.content_length} bytes, the limit is {limit}")
        parts, size_bytes = [], 0
        try:
            async for part in response.content.iter_any():
                parts.append(part)
                size_bytes += len(part)
                self._came_bytes += len(part)
                if size_bytes > limit:
                    raise BadSample(f"too large: more than {limit} bytes")
            if not size_bytes:
                raise BadSample("empty body")
        except BaseException:
            self._came_bytes -= size_bytes
            raise
        return b"".join(parts)


class _Host:
    """The rows' turns at one host name."""

    def __init__(self, options: FetchOptions) -> None:
        self.failures = 0  # in a row, of those that another try may fix
        self._options = options
        self._slots = asyncio.Semaphore(options.per_host)
        self._next_at = 0.0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a connection to be free and for the delay to be over. Raises BadSample if the host is given up."""
        async with self._slots:
            if self.failures >= self._options.host_failures:
                raise BadSample(f"host given up: {self._options.host_failures} requests in a row without an answer")
            now = asyncio.get_running_loop().time()
            begin_at = max(now, self._next_at)
            self._next_at = begin_at + self._options.host_delay_seconds
            await asyncio.sleep(begin_at - now)
            yield


class _Resolver(AbstractResolver):
    """The system's name resolution, in threads. A name is looked up once a chunk, and its answer kept."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dns")
        self._look_ups: dict[str, asyncio.Future[list[tuple[int, str]] | Exception]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """All addresses of a host. Raises OSError."""
        look_up = self._look_ups.get(host)
        if look_up is None:
            look_up = asyncio.get_running_loop().run_in_executor(self._pool, _look_up, host)
            self._look_ups[host] = look_up
        found = await asyncio.shield(look_up)
        if isinstance(found, Exception):
            if getattr(found, "errno", None) == socket.EAI_AGAIN:
                self._look_ups.pop(host, None)  # the next try asks again
            raise found
        flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        return [
            ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=flags)
            for kind, address in found
        ]

    async def close(self) -> None:
        """Leave the threads to end by themselves: a look-up cannot be stopped."""
        for look_up in self._look_ups.values():
            look_up.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _look_up(host: str) -> list[tuple[int, str]] | Exception:
    """(family, address) pairs. An error is returned, not raised: the row that wanted it may be gone."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:  # ValueError: no host name can be spelled so
        return error
    return [(family, str(address[0])) for family, _, _, _, address in found]


def _public_socket(place: tuple[Any, ...]) -> socket.socket:
    """A socket for a connection to `place`, as getaddrinfo has it. Raises PrivateAddress."""
    family, kind, protocol, _, address = place
    if not is_public(address[0]):
        raise PrivateAddress("private address")
    return socket.socket(family, kind, protocol)
