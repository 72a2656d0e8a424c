"""Local copies of remote shards, shared by the processes of a machine.

    cache = ShardCache(Path("/tmp/shards"), cap_bytes=100 << 30)
    path = cache.fetch("https://example.org/shard-000000.tar", size_bytes, sha256)

A copy is named by its digest and has that name only once size and digest are right and it is on disk. A shard that
one process fetches the others wait for; a process that is killed leaves nothing that counts. Above the cap the copies
that were not used for longest go; who has one open keeps reading it. Remote means http(s), s3 and gs, through fsspec,
whose file systems are made where they are used: they do not survive a fork.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar

import aiohttp
import fsspec

from dalle_scale import log
from dalle_scale.io import unfinished
from dalle_scale.types import UserError

PROTOCOLS = ("http", "https", "s3", "gs")
_PIECE_BYTES = 1 << 20
_BLOCK_BYTES = 8 << 20  # of one request to an object store
_SLOWEST_BYTES_PER_SECOND = 64 << 10  # a transfer below this, after the time limit of one read, is given up
_FINAL_STATUS = range(400, 500)  # of HTTP: the request is wrong and asking again does not help ...
_RETRIED_STATUS = (408, 425, 429)  # ... except for these: too slow, too early, too often
_BUGS = (AssertionError, AttributeError, LookupError, NameError, TypeError)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OURS = re.compile(r"\.?[0-9a-f]{64}\.tar(\.tmp)?")  # a copy, or what becomes one; nothing else is ever removed
_Result = TypeVar("_Result")


class FetchError(OSError):
    """A remote shard cannot be had: it is not there, not what it should be, or every attempt failed."""


class ShardCache:
    """A folder of copies, at most `cap_bytes` together with what is being fetched. Holds no open files.

    Args:
        cap_bytes: may be exceeded only while the processes fetch more at the same time than it holds.
        timeout_seconds: for connecting and for each read.
        attempts: how often a shard is tried; the n-th pause is `backoff_seconds` * 2^n, give or take half.

    Raises:
        UserError: a cap or limit that makes no sense.
    """

    def __init__(
        self,
        folder: str | Path,
        cap_bytes: int,
        timeout_seconds: float = 30.0,
        attempts: int = 5,
        backoff_seconds: float = 1.0,
    ) -> None:
        if cap_bytes < 1 or timeout_seconds <= 0 or attempts < 1 or backoff_seconds < 0:
            raise UserError(
                f"{folder}: a cache holds at least 1 byte, tries at least once and has a positive time limit"
            )
        self.folder = Path(folder)
        self.cap_bytes = cap_bytes
        self.timeout_seconds = timeout_seconds
        self.attempts = attempts
        self.backoff_seconds = backoff_seconds

    def fetch(self, url: str, size_bytes: int, sha256: str) -> Path:
        """The local copy of a shard, fetched if it is not there yet.

        Another process may need room and remove the copy before it is opened; `open` takes care of that.

        Raises:
            FetchError: the shard cannot be had.
            UserError: it is larger than the cache, or the address is of no kind that can be read.
        """
        if not _SHA256.fullmatch(sha256):
            raise UserError(f"{url}: '{sha256}' is no sha256; make the manifest again")
        if size_bytes > self.cap_bytes:
            raise UserError(
                f"{url}: {size_bytes} bytes, more than the cache of {self.cap_bytes} holds; give it more room"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{sha256}.tar"
        while not _is_there(path, size_bytes):
            temporary = unfinished(path)
            with _locked(temporary) as file:  # waits for who fetches it now
                if file is not None and not _is_there(path, size_bytes):
                    self._fill(file, temporary, path, url, size_bytes, sha256)
        return path

    def open(self, url: str, size_bytes: int, sha256: str) -> io.FileIO:
        """The local copy, open; it can be read to its end whatever happens to its name. Raises as `fetch`."""
        while True:
            with suppress(FileNotFoundError):  # removed to make room since
                return io.FileIO(self.fetch(url, size_bytes, sha256))

    def _fill(self, file: IO[bytes], temporary: Path, path: Path, url: str, size_bytes: int, sha256: str) -> None:
        """Fetch into an empty file that this process has locked, and give it its name."""
        try:
            self._make_room(file, temporary, size_bytes)
            retry(lambda: self._download(file, url, size_bytes, sha256), url, self.attempts, self.backoff_seconds)
            os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        with self._room():  # whoever counts the contents must not meet it between its two names
            temporary.replace(path)

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Nobody else removes or renames files of the folder."""
        with (self.folder / ".lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _download(self, file: IO[bytes], url: str, size_bytes: int, sha256: str) -> None:
        """One attempt."""
        file.seek(0)
        digest, received, started = hashlib.sha256(), 0, time.monotonic()
        with open_remote(url, self.timeout_seconds) as source:
            while piece := source.read(_PIECE_BYTES):
                received += len(piece)
                if received > size_bytes:
                    raise OSError(f"longer than the {size_bytes} bytes of the manifest")
                file.write(piece)
                digest.update(piece)
                if time.monotonic() - started > self.timeout_seconds + received / _SLOWEST_BYTES_PER_SECOND:
                    raise TimeoutError(f"too slow: {received} bytes in {time.monotonic() - started:.0f} s")
        if received != size_bytes:
            raise OSError(f"ends after {received} of {size_bytes} bytes")
        if digest.hexdigest() != sha256:
            raise OSError(f"other content than the manifest says: sha256 {digest.hexdigest()}, not {sha256}")
        file.flush()

    def _make_room(self, file: IO[bytes], temporary: Path, size_bytes: int) -> None:
        """Remove what was not used for longest until a new shard fits, and take its place."""
        with self._room():
            used_bytes, finished = 0, []
            for path in filter(lambda path: _OURS.fullmatch(path.name), self.folder.iterdir()):
                with suppress(FileNotFoundError):
                    if path.suffix == ".tmp" and path != temporary:
                        _remove_leftover(path)
                    status = path.stat()
                    used_bytes += status.st_size
                    if path.suffix == ".tar":
                        finished.append((status.st_mtime_ns, status.st_size, path))
            for _, freed_bytes, path in sorted(finished):
                if used_bytes + size_bytes > self.cap_bytes:
                    path.unlink(missing_ok=True)
                    used_bytes -= freed_bytes
            file.truncate(size_bytes)


def open_remote(url: str, timeout_seconds: float) -> BinaryIO:
    """A remote file as a stream from its start to its end.

    Raises:
        UserError: no kind of address that is read, or the package for it is missing.
        Exception: an error of the network; `retry` decides about it.
    """
    protocol, separator, _ = url.partition("://")
    if not separator or protocol not in PROTOCOLS:
        raise UserError(f"{url}: not an address that can be read; those start with {', '.join(PROTOCOLS)}://")
    http = protocol.startswith("http")
    options: dict[str, Any] = {}
    if http:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_seconds, sock_read=timeout_seconds)
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}, "headers": {"Accept-Encoding": "identity"}}
    try:
        system = fsspec.filesystem(protocol, **options)  # kept by fsspec, one a process
    except ImportError as error:
        raise UserError(f"{url}: a package is missing: {error}") from None
    # over HTTP one request for it all: without blocks, and with a size so that none is asked for
    reading = {"block_size": 0, "size": 1} if http else {"block_size": _BLOCK_BYTES, "cache_type": "readahead"}
    file: BinaryIO = system.open(url, "rb", **reading)
    return file


def remote_size(url: str, timeout_seconds: float) -> int | None:
    """Size of a remote file in bytes, None where the server does not say. Raises as `open_remote`."""
    with open_remote(url, timeout_seconds) as file:
        response = getattr(file, "r", None)  # of HTTP
        size: int | None = getattr(file, "size", None) if response is None else response.content_length
        return size


def retry(attempt: Callable[[], _Result], what: str, attempts: int = 5, backoff_seconds: float = 1.0) -> _Result:
    """Call `attempt` until it succeeds, with pauses that double, give or take half.

    Raises:
        FetchError: it failed `attempts` times, or in a way that trying again does not fix.
        UserError: as `attempt`.
    """
    for number in range(1, attempts + 1):
        try:
            return attempt()
        except (UserError, *_BUGS):
            raise
        except Exception as error:  # each file system raises what it likes
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if number == attempts or _is_final(error):
                tried = f" (tried {number} times)" if number > 1 else ""
                raise FetchError(f"{what}: {reason}{tried}") from None
        pause_seconds = backoff_seconds * 2 ** (number - 1) * random.uniform(0.5, 1.5)
        log.say(f"{what}: {reason}; attempt {number + 1} of {attempts} in {pause_seconds:.1f} s")
        time.sleep(pause_seconds)
    raise AssertionError("unreachable")


def _is_final(error: Exception) -> bool:
    """Whether trying again is of no use."""
    status = getattr(error, "status", None)  # of an HTTP response
    if isinstance(status, int):
        return status in _FINAL_STATUS and status not in _RETRIED_STATUS
    return isinstance(error, FileNotFoundError | PermissionError) or getattr(error, "errno", None) in _FULL


def _is_there(path: Path, size_bytes: int) -> bool:
    """Whether a copy is there; marks it as used now."""
    try:
        found = path.stat().st_size == size_bytes
        if found:
            os.utime(path)
        else:
            path.unlink()  # somebody else's doing: copies get their names when they are whole
        return found
    except FileNotFoundError:
        return False


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes] | None]:
    """The file `path`, made if need be, locked by this process alone; None if it lost its name before it was ours.

    The file that is fetched into is its own lock: the system frees it when the process ends, however it ends.
    """
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not _has_name(file, path):
            yield None
            return
        file.truncate(0)
        yield file


def _remove_leftover(path: Path) -> None:
    """Remove an unfinished file that no process is working on."""
    with path.open("rb") as file, suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _has_name(file, path):
            path.unlink()


def _has_name(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
