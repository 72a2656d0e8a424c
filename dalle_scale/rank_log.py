"""A log file for each rank, and who died first.

`<run>/logs/rank_00001.log` gets what the rank prints, appended over resumes: a line that says when, where and with
which command it began, whole lines without the redraws of progress bars, and a line with the exit code. What C
libraries and the rank's own processes print comes by way of `tee`, which outlives a rank that is killed. `<run>/log`
has the commands alone.

The ranks know each other's process ids (`watch`). When one has gone the first to see it names it, its exit and its last
lines on the console, and all end: within seconds where a collective raises, and where it hangs, because a thread looks
too. The thread sees ranks of its own machine; other machines learn it from a file in `logs/`, if the folder is shared.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from dalle_scale import dist

POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0  # in which the main thread may find out by itself that a rank is gone
PATIENCE_SECONDS = 3.0  # between a broken connection and the end of the process that broke it
LAST_LINES = 10
_current: RankLog | None = None


def start(run: Path) -> None:
    """Begin this rank's log in `<run>/logs`, until `close`."""
    global _current
    assert _current is None
    _current = RankLog(run / "logs")


def watch() -> None:
    """Look after the other ranks from here on. A collective; the process group must exist."""
    if _current and dist.is_joined() and dist.world_size() > 1:
        _current.watch()


def report_failure() -> None:
    """Called with an exception in flight. If another rank has gone, that is the reason: name it and end this process
    with its exit code, or 1 if it was killed. Else return."""
    if _current:
        _current.report_failure(PATIENCE_SECONDS)


def close(exit_code: int) -> None:
    """End this rank's log."""
    global _current
    if _current:
        _current.close(exit_code)
        _current = None


@dataclass(frozen=True)
class Peer:
    """A rank's process."""

    rank: int
    host: str
    pid: int
    started: int  # clock ticks after boot: with the pid, never used twice


@dataclass(frozen=True)
class RankFailure:
    """A rank that has gone before its work was done."""

    peer: Peer
    how: str
    exit_code: int  # what the survivors end with


class RankLog:
    """The log of this rank in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        when, command = time.strftime("%Y-%m-%dT%H:%M:%S%z"), shlex.join(sys.argv)
        if dist.is_main():
            with (folder.parent / "log").open("a", encoding="utf-8") as commands:
                commands.write(f"{when} {command}\n")
            for note in folder.glob("death_*"):  # of runs before
                note.unlink()
        self._file = self._path(dist.rank()).open("a", buffering=1, errors="backslashreplace", encoding="utf-8")
        where = f"host {socket.gethostname()}, pid {os.getpid()}, rank {dist.rank()} of {dist.world_size()}"
        self._file.write(f"# {when} {where}: {command}\n")
        self._streams = (sys.stdout, sys.stderr)
        self._consoles = (self._copy(sys.stdout, 1), self._copy(sys.stderr, 2))
        sys.stdout, sys.stderr = (_Tee(console, self._file) for console in self._consoles)
        self._neighbours: list[Peer] = []
        self._note: Path | None = None  # exists once the failure of a rank has been reported
        self._thread: threading.Thread | None = None
        self._closed, self._telling = threading.Event(), threading.Lock()

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.log"

    def _copy(self, stream: TextIO, number: int) -> TextIO:
        """Lead file descriptor `number` to console and log, and return a stream that writes to the console alone. The
        latter is the console itself, not a pipe: progress bars look whether it is a terminal."""
        stream.flush()
        console = os.dup(number)
        # The launcher ends a rank's children with the rank, but what the rank says last should arrive
        command = ["sh", "-c", 'trap "" TERM INT; exec tee -a "$0"', str(self._path(dist.rank()))]
        tee = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=console)
        assert tee.stdin is not None
        os.dup2(tee.stdin.fileno(), number)
        tee.stdin.close()
        raw = os.fdopen(console, "wb", buffering=0)
        return io.TextIOWrapper(raw, stream.encoding, stream.errors, write_through=True)

    def watch(self) -> None:
        """Exchange process ids and start looking."""
        import torch.distributed

        me = _process(os.getpid())
        assert me is not None
        mine = (Peer(dist.rank(), socket.gethostname(), os.getpid(), me.started), secrets.token_hex(4))
        everyone: list[Any] = [None] * dist.world_size()
        torch.distributed.all_gather_object(everyone, mine)
        self._note = self.folder / f"death_{everyone[0][1]}"
        # Only whom this process can see: a host name may stand for several containers
        self._neighbours = [peer for peer, _ in everyone if peer.pid != os.getpid() and _is_running(peer)]
        self._handler = signal.signal(signal.SIGTERM, self._on_terminate)
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def close(self, exit_code: int) -> None:
        """Stop looking, write the last line and give the streams back."""
        self._closed.set()
        if self._thread:
            signal.signal(signal.SIGTERM, self._handler)
            self._thread.join()
        self._flush()
        self._file.write(_last_line(os.getpid(), exit_code) + "\n")
        sys.stdout, sys.stderr = self._streams
        for number, console in enumerate(self._consoles, start=1):
            os.dup2(console.fileno(), number)
            console.close()
        self._file.close()

    def report_failure(self, patience_seconds: float) -> None:
        """See `report_failure` above."""
        if not self._thread:
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends everyone now; first the word
        until = time.monotonic() + patience_seconds
        while not (failures := self._failures()) and not self._is_told() and time.monotonic() < until:
            time.sleep(0.05)
        if failures or self._is_told():
            self._file.write(traceback.format_exc())
            self._end(failures)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM outside the training loop: say whose death is the reason, if one is, and die."""
        self.report_failure(0)
        os.kill(os.getpid(), number)

    def _look(self) -> None:
        """The thread: find out about a death although the main thread hangs."""
        while not self._closed.wait(POLL_SECONDS):
            failures = self._failures()
            if failures or self._is_told():
                if self._closed.wait(GRACE_SECONDS):
                    return
                self._end(failures)

    def _failures(self) -> list[RankFailure]:
        """Ranks of this machine that have gone and did not end well."""
        failures = []
        for peer in self._neighbours:
            if _is_running(peer):
                continue
            process = _process(peer.pid)
            status = process.status if process and process.started == peer.started else None
            code = _logged_exit_code(self._path(peer.rank), peer.pid)
            if code is not None:
                how = f"ended with exit code {code}"
            elif status is None:
                how = "is gone; the launcher has its exit code"
            elif os.WIFSIGNALED(status):
                how = f"was killed by signal {os.WTERMSIG(status)} ({signal.strsignal(os.WTERMSIG(status))})"
            else:
                how = f"ended with exit code {os.WEXITSTATUS(status)} before its work was done"
            if code != 0:
                failures.append(RankFailure(peer, how, code or 1))
        return failures

    def _is_told(self) -> bool:
        return self._note is not None and self._note.exists()

    def _end(self, failures: list[RankFailure]) -> NoReturn:
        """Name the dead, if nobody has, and end this process at once: what it would wait for does not come."""
        with self._telling:
            if failures and self._is_first():
                for failure in failures:
                    path, peer = self._path(failure.peer.rank), failure.peer
                    who = f"rank {peer.rank} (host {peer.host}, pid {peer.pid})"
                    last = "".join(f"\n    {line}" for line in _tail(path, LAST_LINES))
                    with suppress(OSError):  # nobody reads the console any more
                        print(f"error: {who} {failure.how}; the end of {path}:{last}", file=sys.stderr, flush=True)
            for child in multiprocessing.active_children():
                child.terminate()
            code = max((failure.exit_code for failure in failures), default=1)
            self._flush()
            self._file.write(_last_line(os.getpid(), code) + "\n")
            os._exit(code)

    def _is_first(self) -> bool:
        """Whether nobody has reported before. Then nobody else will."""
        assert self._note is not None
        try:
            self._note.touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:  # no space left, say, which may be what has killed the rank
            pass
        return True

    def _flush(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()


class _Tee:
    """A text stream to console and log. The log gets whole lines, as they look once carriage returns are obeyed."""

    def __init__(self, console: TextIO, log: TextIO) -> None:
        self._console, self._log, self._line = console, log, ""

    def write(self, text: str) -> int:
        *lines, rest = (self._line + text).split("\n")
        self._line = rest.rpartition("\r")[2] if rest.strip("\r") else rest
        for line in lines:
            self._log.write(line.rstrip("\r").rpartition("\r")[2] + "\n")
        return self._console.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._console, name)


@dataclass(frozen=True)
class _Process:
    """Linux's record of a process."""

    started: int  # clock ticks after boot
    ended: bool  # though its parent does not know yet
    status: int  # as of wait(), once it has ended


def _process(pid: int) -> _Process | None:
    try:
        fields = (
            Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        )  # see proc_pid_stat(5), from field 3
    except OSError:
        return None
    return _Process(started=int(fields[19]), ended=fields[0] in b"ZX", status=int(fields[49]))


def _is_running(peer: Peer) -> bool:
    process = _process(peer.pid)
    return process is not None and process.started == peer.started and not process.ended


def _logged_exit_code(path: Path, pid: int) -> int | None:
    """Exit code at the end of a process's log; None if it was ended from outside."""
    begin = _last_line(pid, "")
    codes = [int(line.removeprefix(begin)) for line in _tail(path, LAST_LINES) if line.startswith(begin)]
    return codes[-1] if codes else None


def _last_line(pid: int, exit_code: int | str) -> str:
    return f"# pid {pid} ended with exit code {exit_code}"


def _tail(path: Path, lines: int) -> list[str]:
    """The last lines of a text file; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except OSError:
        return []
