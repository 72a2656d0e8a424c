"""A real HTTP server on loopback whose behaviour the path names: kind, slow, broken or hostile.

    with Web() as web:
        rows = [(0, web.url("/ok/7")), (1, web.url("/status/404")), (2, web.url("/ok/7", host="127.0.0.2"))]

It answers at 127.0.0.1, 127.0.0.2 and ::1, writes HTTP by hand, so that it can be wrong, and counts what it is asked.
`python web.py` serves until it is killed and prints its port.
"""

from __future__ import annotations

import asyncio
import gzip
import socket
import ssl
import struct
import threading
import urllib.parse
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

HOSTS = ("127.0.0.1", "127.0.0.2", "::1")
PATIENCE_SECONDS = 3600.0  # of behaviours that never end by themselves; above every limit that tests set
BOMB = gzip.compress(bytes(64 << 20))


def content(name: str) -> bytes:
    """The body of /ok/<name>; `Web.files` may hold others."""
    return f"content of {name};".encode() * (1 + len(name) % 7)


@dataclass
class Visit:
    """One request."""

    web: Web
    host: str
    path: str
    argument: str  # what follows the first part of the path
    headers: list[tuple[str, str]]
    head: bytes
    count: int  # of requests for this path, this one included
    at_seconds: float
    writer: asyncio.StreamWriter = field(repr=False)

    def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        """A sound answer. `headers` replace those that would be sent."""
        lines = {"Content-Length": str(len(body)), **(headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.writer.write(f"HTTP/1.1 {status} Whatever\r\n{head}\r\n".encode("utf-8", "surrogateescape") + body)

    def body(self) -> bytes:
        """The content that the path names."""
        return self.web.files.get(self.argument, content(self.argument))

    def raw(self, data: bytes) -> None:
        """Bytes as they are."""
        self.writer.write(data)

    def reset(self) -> None:
        """End the connection rudely."""
        with suppress(OSError):
            linger = struct.pack("ii", 1, 0)
            self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()


async def ok(visit: Visit) -> None:
    visit.send(200, visit.body())


async def status(visit: Visit) -> None:
    visit.send(int(visit.argument), b"no image here")


async def after(visit: Visit) -> None:
    """/after/<n>/<status>: n times the status, then the content."""
    times, code = visit.argument.split("/")[:2]
    visit.send(int(code)) if visit.count <= int(times) else visit.send(200, visit.body())


async def after_reset(visit: Visit) -> None:
    """/after-reset/<n>: n times a reset, then the content."""
    visit.reset() if visit.count <= int(visit.argument.split("/")[0]) else visit.send(200, visit.body())


async def busy(visit: Visit) -> None:
    """/busy/<Retry-After>: once 429, then the content."""
    header = {"Retry-After": urllib.parse.unquote(visit.argument)}
    visit.send(429, headers=header) if visit.count == 1 else visit.send(200, content(visit.argument))


async def hop(visit: Visit) -> None:
    """/hop/<n>: n redirects to /ok/end, relative and with each of the codes."""
    left = int(visit.argument)
    code = (301, 302, 303, 307, 308)[left % 5]
    visit.send(code, headers={"Location": f"/hop/{left - 1}" if left > 1 else "/ok/end"})


async def late_hop(visit: Visit) -> None:
    """/late-hop/<n>: n redirects, a third of a second each."""
    await asyncio.sleep(0.33)
    left = int(visit.argument)
    visit.send(302, headers={"Location": f"/late-hop/{left - 1}" if left > 1 else "/ok/end"})


async def to(visit: Visit) -> None:
    """/to/<quoted url>: a redirect there."""
    visit.send(302, headers={"Location": urllib.parse.unquote(visit.argument, errors="surrogateescape")})


async def hold(visit: Visit) -> None:
    """Keep the request until `web.crowd` are being held, then a little, so that more than these would be seen."""
    web = visit.web
    for place in (visit.host, "all"):
        web.held[place] += 1
        web.most_held[place] = max(web.most_held[place], web.held[place])
    while web.most_held["all"] < web.crowd:
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.03)
    for place in (visit.host, "all"):
        web.held[place] -= 1
    visit.send(200, b"held")


async def headers(visit: Visit) -> None:
    """/headers/<n>?name=value: the n-th content with these headers; a name may come several times."""
    given = urllib.parse.parse_qsl(urllib.parse.urlsplit(visit.path).query)
    lines = "".join(f"{name}: {value}\r\n" for name, value in given)
    body = content(visit.argument)
    visit.raw(f"HTTP/1.1 200 OK\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body)


async def silent(visit: Visit) -> None:
    await asyncio.sleep(PATIENCE_SECONDS)


async def drip(visit: Visit) -> None:
    """Bytes without end, each well before any read limit."""
    visit.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    while True:
        visit.raw(b".")
        await visit.writer.drain()
        await asyncio.sleep(0.02)


async def slow_head(visit: Visit) -> None:
    """Headers without end, one at a time."""
    visit.raw(b"HTTP/1.1 200 OK\r\n")
    for number in range(100_000):
        visit.raw(f"X-{number}: y\r\n".encode())
        await visit.writer.drain()
        await asyncio.sleep(0.05)


async def continues(visit: Visit) -> None:
    """Interim answers without end."""
    while True:
        visit.raw(b"HTTP/1.1 100 Continue\r\n\r\n")
        await visit.writer.drain()
        await asyncio.sleep(0.02)


async def many_heads(visit: Visit) -> None:
    visit.raw(b"HTTP/1.1 200 OK\r\n")
    while True:
        visit.raw(b"X-More: and more\r\n" * 1000)
        await visit.writer.drain()


async def long_head(visit: Visit) -> None:
    visit.raw(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while True:
        visit.raw(b"a" * 65536)
        await visit.writer.drain()


async def endless(visit: Visit) -> None:
    visit.raw(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        visit.raw(bytes(65536))
        visit.web.sent_bytes += 65536
        await visit.writer.drain()


async def endless_chunks(visit: Visit) -> None:
    visit.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        visit.raw(b"10000\r\n" + bytes(65536) + b"\r\n")
        await visit.writer.drain()


async def huge(visit: Visit) -> None:
    """Says that it is large, and is."""
    visit.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5000000000\r\n\r\n")
    while True:
        visit.raw(bytes(65536))
        visit.web.sent_bytes += 65536
        await visit.writer.drain()


async def until_close(visit: Visit) -> None:
    """A sound body that ends with the connection."""
    visit.raw(b"HTTP/1.0 200 OK\r\n\r\n" + content(visit.argument))
    visit.writer.close()


async def chunked(visit: Visit) -> None:
    body = content(visit.argument)
    parts = b"".join(b"%x\r\n%s\r\n" % (len(body[at : at + 5]), body[at : at + 5]) for at in range(0, len(body), 5))
    visit.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + parts + b"0\r\n\r\n")


async def short(visit: Visit) -> None:
    visit.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this")
    visit.writer.close()


async def short_chunks(visit: Visit) -> None:
    visit.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n")
    visit.writer.close()


async def reset_body(visit: Visit) -> None:
    visit.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this")
    await visit.writer.drain()
    await asyncio.sleep(0.02)
    visit.reset()


async def reset_now(visit: Visit) -> None:
    visit.reset()


async def hang_up(visit: Visit) -> None:
    visit.writer.close()


async def bomb(visit: Visit) -> None:
    visit.send(200, BOMB, {"Content-Encoding": "gzip"})


async def empty(visit: Visit) -> None:
    visit.send(200)


async def empty_chunks(visit: Visit) -> None:
    visit.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")


async def noise(visit: Visit) -> None:
    """/noise/<hex>: these bytes, and the end."""
    visit.raw(bytes.fromhex(visit.argument))
    visit.writer.close()


async def echo(visit: Visit) -> None:
    """The request itself, and a cookie to keep."""
    visit.send(200, visit.head, {"Set-Cookie": "id=7; Path=/"})


BEHAVIOURS: dict[str, Callable[[Visit], Awaitable[None]]] = {
    "ok": ok, "status": status, "after": after, "after-reset": after_reset, "busy": busy, "hop": hop, "to": to,
    "late-hop": late_hop, "hold": hold, "headers": headers, "silent": silent, "drip": drip, "slow-head": slow_head,
    "continues": continues, "many-heads": many_heads, "long-head": long_head, "endless": endless,
    "endless-chunks": endless_chunks, "huge": huge, "until-close": until_close, "chunked": chunked, "short": short,
    "short-chunks": short_chunks, "reset-body": reset_body, "reset": reset_now, "hang-up": hang_up, "bomb": bomb,
    "empty": empty, "empty-chunks": empty_chunks, "noise": noise, "echo": echo,
}  # fmt: skip


class Web:
    """The server, in a thread of its own. Use as a context."""

    def __init__(self, certificate: Path | None = None) -> None:
        """certificate: a PEM file with key and certificate, for https."""
        self.files: dict[str, bytes] = {}  # bodies of /ok/<name>
        self.visits: list[Visit] = []
        self.counts: Counter[str] = Counter()  # requests by path
        self.connections = 0  # all that were accepted
        self.held: Counter[str] = Counter()  # by host and "all", at the moment
        self.most_held: Counter[str] = Counter()
        self.crowd = 1
        self.sent_bytes = 0  # of bodies without end
        self.port = 0
        self._certificate = certificate
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        """Where this server answers to `path`."""
        host = f"[{host}]" if ":" in host else host
        return f"http{'s' if self._certificate else ''}://{host}:{self.port}{path}"

    def __enter__(self) -> Web:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *unused: object) -> None:
        self._loop.call_soon_threadsafe(self._main.cancel)
        self._thread.join()

    def _run(self) -> None:
        self._main = self._loop.create_task(self._serve())
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._main)
        self._loop.close()

    async def _serve(self) -> None:
        context = None
        if self._certificate:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(self._certificate)
        servers = []
        try:
            for host in HOSTS:
                servers.append(await asyncio.start_server(self._connected, host, self.port, ssl=context, backlog=1000))
                self.port = servers[0].sockets[0].getsockname()[1]
            self._ready.set()
            await asyncio.sleep(1e9)
        finally:
            for server in servers:
                server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        gone = (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ssl.SSLError)
        with suppress(*gone, asyncio.CancelledError):
            while not writer.is_closing():
                await self._answer(await reader.readuntil(b"\r\n\r\n"), writer)
                await writer.drain()
        writer.close()

    async def _answer(self, head: bytes, writer: asyncio.StreamWriter) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        path = first.split(" ")[1]
        name, _, argument = path.partition("?")[0].strip("/").partition("/")
        host = writer.get_extra_info("sockname")[0]
        pairs = [(line.partition(":")[0].lower(), line.partition(":")[2].strip()) for line in lines if line]
        self.counts[path] += 1
        visit = Visit(self, host, path, argument, pairs, head, self.counts[path], self._loop.time(), writer)
        self.visits.append(visit)
        behaviour = BEHAVIOURS.get(name)
        visit.send(404, b"no such path") if behaviour is None else await behaviour(visit)


if __name__ == "__main__":
    with Web() as server:
        print(server.port, flush=True)
        threading.Event().wait()
