"""The cache of remote shards: whole and right or not there, fetched once, within its cap, whatever fails."""

import hashlib
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
from support.processes import HANG_SECONDS
from support.shelf import Shelf

from dalle_scale.data.cache import FetchError, ShardCache, open_remote, remote_size, retry
from dalle_scale.types import UserError

FORK = multiprocessing.get_context("fork")  # real processes, without the seconds that an import takes


@pytest.fixture
def shelf():
    with Shelf() as server:
        yield server


def put(shelf: Shelf, name: str, size: int = 3000, faults: tuple[str, ...] = ()) -> tuple[str, int, str]:
    """A file on the shelf: what `fetch` wants to know of it."""
    data = random.Random(name).randbytes(size)
    shelf.files[name], shelf.faults[name] = data, list(faults)
    return shelf.url(name), size, hashlib.sha256(data).hexdigest()


def make_cache(folder: Path, cap_bytes: int = 1 << 20, **options) -> ShardCache:
    return ShardCache(folder, cap_bytes, **{"timeout_seconds": 60.0, "attempts": 3, "backoff_seconds": 0.01, **options})


def start(folder: Path, shard: tuple[str, int, str]) -> multiprocessing.Process:
    """A process that fetches a shard."""
    process = FORK.Process(target=make_cache(folder, timeout_seconds=600.0).fetch, args=shard)
    process.start()
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_a_shard_is_fetched_once_and_right(tmp_path, shelf):
    shard = put(shelf, "a.tar", size=3 << 20)
    cache = make_cache(tmp_path / "deep" / "cache", cap_bytes=4 << 20)
    path = cache.fetch(*shard)
    assert path.read_bytes() == shelf.files["a.tar"]
    assert cache.fetch(*shard) == path and shelf.counts["a.tar"] == 1
    assert names(path.parent) == [f"{shard[2]}.tar"]


@pytest.mark.parametrize("fault", ["500", "503", "429", "short", "other", "long"])
def test_what_fails_twice_is_tried_again_and_said(tmp_path, shelf, capsys, fault):
    shard = put(shelf, "a.tar", faults=(fault, fault))
    assert make_cache(tmp_path).fetch(*shard).read_bytes() == shelf.files["a.tar"]
    assert shelf.counts["a.tar"] == 3
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "attempt 2 of 3" in said[0] and "attempt 3 of 3" in said[1]


@pytest.mark.parametrize(
    ("fault", "requests", "message"),
    [
        ("500", 3, "500.*tried 3 times"),
        ("404", 1, "FileNotFoundError"),
        ("403", 1, "403"),
        ("short", 3, "tried 3 times"),
        ("other", 3, "other content than the manifest says"),
        ("long", 3, "longer than the 3000 bytes"),
        ("shorter", 3, "ends after 2999 of 3000 bytes"),
    ],
)
def test_what_fails_for_good_leaves_nothing(tmp_path, shelf, fault, requests, message):
    shard = put(shelf, "a.tar", faults=(fault,) * 9)
    with pytest.raises(FetchError, match=message) as caught:
        make_cache(tmp_path).fetch(*shard)
    assert "\n" not in str(caught.value) and shard[0] in str(caught.value)
    assert shelf.counts["a.tar"] == requests and names(tmp_path) == []


def test_hanging_and_dripping_connections_are_given_up(tmp_path, shelf, monkeypatch):
    shard = put(shelf, "a.tar", faults=("hang",))
    assert make_cache(tmp_path, timeout_seconds=2.0).fetch(*shard).read_bytes() == shelf.files["a.tar"]
    assert shelf.counts["a.tar"] == 2
    shard = put(shelf, "b.tar", faults=("drip",) * 3)
    with pytest.raises(FetchError, match="too slow"):
        make_cache(tmp_path, timeout_seconds=0.3).fetch(*shard)
    with pytest.raises(FetchError, match="tried 2 times"):  # nobody listens
        make_cache(tmp_path, attempts=2).fetch("http://127.0.0.1:9/a.tar", 5, "0" * 64)


def test_a_killed_process_leaves_nothing_that_counts(tmp_path, shelf):
    shard = put(shelf, "a.tar", size=1 << 20, faults=("hang",))
    process = start(tmp_path, shard)
    assert shelf.is_hanging.wait(HANG_SECONDS)
    partial = tmp_path / f".{shard[2]}.tar.tmp"
    while not partial.exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -9
    assert names(tmp_path) == [partial.name], "never under the final name"
    other = put(shelf, "b.tar")
    cache = make_cache(tmp_path, cap_bytes=2 << 20)
    cache.fetch(*other)
    assert names(tmp_path) == [f"{other[2]}.tar"], "what the dead process left is removed"
    assert cache.fetch(*shard).read_bytes() == shelf.files["a.tar"]
    assert shelf.counts["a.tar"] == 2


def test_a_partial_file_of_the_same_shard_is_written_over(tmp_path, shelf):
    shard = put(shelf, "a.tar")
    (tmp_path / f".{shard[2]}.tar.tmp").write_bytes(b"x" * 9000)
    assert make_cache(tmp_path).fetch(*shard).read_bytes() == shelf.files["a.tar"]


def test_processes_at_once_fetch_once(tmp_path, shelf):
    shard = put(shelf, "a.tar", size=1 << 20, faults=("hang",))
    processes = [start(tmp_path, shard) for _ in range(3)]
    assert shelf.is_hanging.wait(HANG_SECONDS)
    time.sleep(0.2)  # for the others to come and wait
    shelf.go_on.set()
    for process in processes:
        process.join(HANG_SECONDS)
    assert [process.exitcode for process in processes] == [0, 0, 0] and shelf.counts["a.tar"] == 1
    assert (tmp_path / f"{shard[2]}.tar").read_bytes() == shelf.files["a.tar"] and len(names(tmp_path)) == 1


def test_one_who_waited_fetches_if_the_first_has_failed(tmp_path, shelf):
    shard = put(shelf, "a.tar", faults=("hang",))
    first = start(tmp_path, shard)
    assert shelf.is_hanging.wait(HANG_SECONDS)
    second = start(tmp_path, shard)
    time.sleep(0.2)
    assert shelf.counts["a.tar"] == 1
    first.kill()
    for process in (first, second):
        process.join(HANG_SECONDS)
    assert (first.exitcode, second.exitcode) == (-9, 0) and shelf.counts["a.tar"] == 2
    assert (tmp_path / f"{shard[2]}.tar").read_bytes() == shelf.files["a.tar"]


def test_the_cap_holds_and_the_last_used_stay(tmp_path, shelf):
    shards = [put(shelf, f"{number}.tar", size=1000) for number in range(5)]
    foreign = tmp_path / "my own.tar"
    foreign.write_bytes(b"x" * 9000)
    cache = make_cache(tmp_path, cap_bytes=3500)

    def held() -> list[int]:
        return [number for number, shard in enumerate(shards) if (tmp_path / f"{shard[2]}.tar").exists()]

    for number, shard in enumerate(shards[:3]):
        path = cache.fetch(*shard)
        os.utime(path, (number, number))
    assert held() == [0, 1, 2]
    cache.fetch(*shards[0])  # is now the last that was used
    cache.fetch(*shards[3])
    assert held() == [0, 2, 3]
    cache.fetch(*shards[4])
    assert held() == [0, 3, 4] and shelf.counts["0.tar"] == 1
    assert foreign.exists(), "only copies are removed"
    cache.fetch(*shards[1])
    assert shelf.counts["1.tar"] == 2 and len(held()) == 3 and 1 in held()
    small = make_cache(tmp_path, cap_bytes=1000)
    small.fetch(*shards[2])
    assert held() == [2]
    with pytest.raises(UserError, match="more than the cache of 999 holds"):
        make_cache(tmp_path, cap_bytes=999).fetch(*shards[2])


def test_an_open_copy_can_be_read_after_it_was_removed(tmp_path, shelf):
    first, second = put(shelf, "a.tar", size=1000), put(shelf, "b.tar", size=1000)
    cache = make_cache(tmp_path, cap_bytes=1500)
    with cache.open(*first) as file:
        cache.fetch(*second)
        assert names(tmp_path) == [f"{second[2]}.tar"]
        assert file.read() == shelf.files["a.tar"]


def test_open_fetches_again_what_went_between(tmp_path, shelf, monkeypatch):
    shard = put(shelf, "a.tar")
    cache = make_cache(tmp_path)
    fetch, paths = cache.fetch, []

    def fetch_and_lose_once(*arguments):
        paths.append(fetch(*arguments))
        if len(paths) == 1:
            paths[0].unlink()
        return paths[-1]

    monkeypatch.setattr(cache, "fetch", fetch_and_lose_once)
    with cache.open(*shard) as file:
        assert file.read() == shelf.files["a.tar"]
    assert shelf.counts["a.tar"] == 2


def test_a_copy_of_another_size_is_not_used(tmp_path, shelf):
    shard = put(shelf, "a.tar")
    (tmp_path / f"{shard[2]}.tar").write_bytes(b"cut off by somebody")
    assert make_cache(tmp_path).fetch(*shard).read_bytes() == shelf.files["a.tar"]


def test_after_a_fork_file_systems_are_new(tmp_path, shelf):
    """A file system of the parent would wait for a thread that the child does not have."""
    first, second = put(shelf, "a.tar"), put(shelf, "b.tar")
    cache = make_cache(tmp_path)
    cache.fetch(*first)
    child = start(tmp_path, second)
    child.join(HANG_SECONDS)
    child.kill()
    assert (tmp_path / f"{second[2]}.tar").read_bytes() == shelf.files["b.tar"]


@pytest.mark.parametrize("url", ["pipe:touch sentinel", "file:///etc/passwd", "zip://x::http://y", "a.tar", "://"])
def test_only_remote_addresses_are_fetched(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not an address that can be read"):
        make_cache(tmp_path / "cache").fetch(url, 5, "0" * 64)
    assert not (tmp_path / "sentinel").exists() and names(tmp_path / "cache") == []
    with pytest.raises(UserError, match="no sha256"):
        make_cache(tmp_path / "cache").fetch("http://127.0.0.1/", 5, "../../evil")
    for wrong in ({"cap_bytes": 0}, {"timeout_seconds": 0}, {"attempts": 0}):
        with pytest.raises(UserError, match="at least"):
            make_cache(tmp_path, **wrong)


def test_streams_and_sizes(shelf):
    url, size, sha256 = put(shelf, "a.tar", size=1 << 20)
    assert remote_size(url, 5.0) == size
    with open_remote(url, 5.0) as file:
        assert hashlib.sha256(b"".join(iter(lambda: file.read(1000), b""))).hexdigest() == sha256


def test_retry_lets_mistakes_of_the_program_through():
    with pytest.raises(KeyError):
        retry(lambda: {}["x"], "what", attempts=3, backoff_seconds=0)
