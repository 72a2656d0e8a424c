"""A real HTTP server on loopback that hands out files, and fails as it is told.

with Shelf() as shelf:
    shelf.files["a.tar"] = data
    shelf.faults["a.tar"] = ["500", "short"]  # of the first requests; later ones are served well
    ... shelf.url("a.tar") ... shelf.counts["a.tar"]
"""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PATIENCE_SECONDS = 3600.0  # how long a request hangs; above every limit that tests set


class Shelf:
    """The server, in threads of its own. Use as a context."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}  # what goes wrong with the next requests, by file
        self.counts: Counter[str] = Counter()  # requests by file
        self.is_hanging = threading.Event()  # a request has got half of its body
        self.go_on = threading.Event()  # ends hanging
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def url(self, name: str) -> str:
        """Where a file is served."""
        return f"http://127.0.0.1:{self._server.server_port}/{name}"

    def next_fault(self, name: str) -> str:
        """Count a request; what is to go wrong with it."""
        with self._lock:
            self.counts[name] += 1
            faults = self.faults.get(name, [])
            return faults.pop(0) if faults else ""

    def __enter__(self) -> Shelf:
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(shelf: Shelf) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.lstrip("/")
            fault, body = shelf.next_fault(name), shelf.files.get(name)
            if fault.isdigit() or body is None:
                self.send_error(int(fault or 404))
                return
            body = body[:-1] if fault == "shorter" else body
            half = len(body) // 2
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) + (fault == "long")))
            self.end_headers()
            with suppress(ConnectionError):
                self.wfile.write(body[:half])
                if fault == "short":
                    return
                if fault == "hang":
                    self.wfile.flush()
                    shelf.is_hanging.set()
                    shelf.go_on.wait(PATIENCE_SECONDS)
                while fault == "drip" and not shelf.go_on.wait(0.02):
                    self.wfile.write(body[:1])
                self.wfile.write(bytes(byte ^ 1 for byte in body[half:]) if fault == "other" else body[half:])
                self.wfile.write(b"x" * (fault == "long"))

        def log_message(self, *unused: object) -> None:
            """Be quiet."""

    return Handler
