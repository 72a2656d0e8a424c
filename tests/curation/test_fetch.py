"""fetch: every row ends as the body or as one reason, in order, within its limits, whatever urls and servers do."""

import gc
import os
import random
import resource
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.fetching import OPTIONS, REASONS, one
from support.fetching import fetch_all as run
from support.processes import TESTS
from support.web import HOSTS, Web, content
from yarl import URL

from dalle_scale.curation.download.client import Fetched, FetchOptions, fetch
from dalle_scale.curation.download.policy import backoff_seconds, check_url, retry_after_seconds
from dalle_scale.data.decode import BadSample
from dalle_scale.types import UserError

HASTY = replace(OPTIONS, read_seconds=0.5, total_seconds=1.5, retries=0)  # for servers that never answer


@pytest.fixture
def web():
    with Web() as server:
        yield server


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# --- what comes back --------------------------------------------------------------------------------------------------


def test_bodies_however_they_are_sent(web):
    paths = ["/ok/abc", "/chunked/abc", "/until-close/abc", "/headers/abc?Content-Encoding=identity"]
    assert run([web.url(path) for path in paths]) == [content("abc")] * 4
    assert run([web.url("/ok/abc", host) for host in HOSTS]) == [content("abc")] * 3
    assert run([f" {web.url('/ok/abc')}\n", web.url("/ok/abc#part", "localhost")]) == [content("abc")] * 2
    assert run([]) == []


def test_order_and_row_numbers_are_those_of_the_rows(web):
    paths = ["/late-hop/2", "/after/2/503", "/ok/2", "/short", "/ok/4", "/after-reset/1"] * 5
    numbers = [random.Random(index).randrange(10**12) for index in range(len(paths))]
    rows = [(number, web.url(path)) for number, path in zip(numbers, paths, strict=True)]
    results = list(fetch(iter(rows), replace(OPTIONS, retries=2, per_host=30)))
    assert [result.row for result in results] == numbers
    assert results[2] == Fetched(numbers[2], body=content("2"))
    assert results[0] == Fetched(numbers[0], body=content("end"))
    assert results[3] == Fetched(numbers[3], reason="cut off")
    assert all(results[at].body == content(str(at % 6)) for at in range(len(paths)) if at % 6 in (2, 4))


@pytest.mark.parametrize(
    "path, reason, requests",
    [
        ("/status/404", "http 404", 1),
        ("/status/206", "http 206", 1),
        ("/status/302", "http 302", 1),
        ("/status/999", "http 999", 3),
        ("/status/500", "http 500", 3),
        ("/status/429", "http 429", 3),
        ("/empty", "empty body", 1),
        ("/empty-chunks", "empty body", 1),
        ("/reset", "connection reset", 6),  # aiohttp asks twice by itself
        ("/hang-up", "connection reset", 6),
        ("/reset-body", "cut off", 3),
        ("/short", "cut off", 3),
        ("/short-chunks", "cut off", 3),
        ("/bomb", "compressed in transfer: identity was asked for", 1),
        ("/many-heads", "malformed answer", 1),
        ("/long-head", "malformed answer", 1),
        ("/to/file%3A%2F%2F%2Fetc%2Fpasswd", "not http(s)", 1),
        ("/to/http%3A%2F%2Fa%3Ab%40127.0.0.1%2F", "credentials in url", 1),
        ("/to/http%3A%2F%2F127.0.0.1%3A1%2F", "connection refused", 1),
        ("/to/%2Fto%2F", "no url", 2),
    ],
)
def test_failures_have_one_reason_and_the_right_number_of_requests(web, path, reason, requests):
    assert one(web.url(path)) == reason
    assert len(web.visits) == requests


@pytest.mark.parametrize("path", ["/silent", "/drip", "/slow-head", "/continues"])
def test_no_server_is_waited_for_longer_than_the_limits(web, path):
    assert one(web.url(path), replace(HASTY, retries=1)) == "timeout"
    assert web.counts[path] == 2


def test_each_limit_holds_by_itself(web):
    assert one(web.url("/silent"), replace(HASTY, total_seconds=10_000)) == "timeout"
    assert one(web.url("/drip"), replace(HASTY, read_seconds=10_000)) == "timeout"


def test_urls_that_cannot_be_asked_for():
    urls = {
        None: "no url", 5: "no url", "  ": "no url", b"http://127.0.0.1/": "no url",
        "ftp://127.0.0.1/x": "not http(s)", "file:///etc/passwd": "not http(s)", "//127.0.0.1/x": "not http(s)",
        "x.jpg": "not http(s)", "javascript:alert(1)": "not http(s)", 
        "data:image/png;base64," + "A" * 10**6: "not http(s)", "http://a b/": "malformed url",
        "http://": "malformed url", "http:///x": "malformed url", "http://[::1/": "malformed url",
        "http://127.0.0.1:0/": "malformed url", "http://127.0.0.1:99999/": "malformed url",
        "http://127.0.0.1/" + "a" * 10**6: "malformed url", f"http://{'a' * 70}.invalid/": "malformed url",
        "http://u:p@127.0.0.1/": "credentials in url", "http://u@127.0.0.1/": "credentials in url",
        "http://127.0.0.1:1/": "connection refused",
    }  # fmt: skip
    assert dict(zip(urls, run(list(urls)), strict=True)) == urls
    assert str(one("http://no-such-name.invalid/", replace(OPTIONS, retries=0))).startswith("dns failure: ")


@given(st.text(max_size=60) | st.text("htps:/@[]%.#?\\ 0123x\ud800\r\n", max_size=40).map("http://".__add__))
@example("http://ép@ß][2s@")
@example("http://a b/")
def test_any_text_is_a_url_or_has_a_reason(text):
    for base in (None, URL("http://127.0.0.1/x")):
        try:
            url = check_url(text, base)
        except BadSample as error:
            assert str(error) in REASONS
        else:
            assert url.scheme in ("http", "https") and url.raw_host and not url.raw_user and not url.raw_password
            assert not set("\r\n ") & set(str(url)), "nothing that would end the request line"


def test_noise_from_the_server_is_one_reason_a_row(web):
    rng = random.Random(0)
    sound = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Robots-Tag: x: y\r\nRetry-After: 0\r\n\r\nabcde"
    chunked = b"HTTP/1.1 301 Moved\r\nLocation: /ok/1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    paths = []
    for _ in range(300):
        data = bytearray(rng.choice([sound, chunked, b"HTTP/1.1 200 \r\n\r\n", b""]))
        for _ in range(rng.randrange(6)):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
        paths.append(f"/noise/{data.hex()}")
    results = run([web.url(path) for path in paths], replace(HASTY, read_seconds=2, total_seconds=3))
    assert b"abcde" in results and len({str(result) for result in results}) > 5


# --- limits -----------------------------------------------------------------------------------------------------------


def test_bodies_are_cut_at_the_limit(web):
    limits = replace(OPTIONS, max_bytes=100_000)
    assert one(web.url("/huge"), limits) == "too large: 5000000000 bytes, the limit is 100000"
    for path in ("/endless", "/endless-chunks"):
        assert one(web.url(path), limits) == "too large: more than 100000 bytes"
        assert web.counts[path] == 1
    assert web.sent_bytes < 32 << 20, "what fits into the buffers of two sockets, not a file without end"
    several = run([web.url("/endless")] * 20, replace(limits, connections=2, buffer_bytes=150_000))
    assert several == ["too large: more than 100000 bytes"] * 20, "what was dropped takes no room"
    web.files = {"fits": bytes(100_000), "over": bytes(100_001)}
    assert run([web.url("/ok/fits"), web.url("/ok/over")], limits) == [
        bytes(100_000),
        "too large: 100001 bytes, the limit is 100000",
    ]


def test_connections_to_one_host_are_limited(web):
    web.crowd = 6
    urls = [web.url("/hold", host) for _ in range(12) for host in HOSTS[:2]]
    assert run(urls, replace(OPTIONS, per_host=3)) == [b"held"] * 24
    assert web.most_held == {"127.0.0.1": 3, "127.0.0.2": 3, "all": 6}
    assert web.connections <= 24


def test_connections_are_limited(web):
    web.crowd = 5
    urls = [web.url("/hold", host) for _ in range(8) for host in HOSTS]
    assert run(urls, replace(OPTIONS, connections=5, per_host=4)) == [b"held"] * 24
    assert web.most_held["all"] == 5


def test_requests_to_one_host_are_spaced(web):
    urls = [web.url("/ok/1", host) for _ in range(5) for host in HOSTS[:2]]
    began = time.monotonic()
    run(urls, replace(OPTIONS, host_delay_seconds=0.1))
    assert time.monotonic() - began > 0.39, "four delays"
    assert Counter(visit.host for visit in web.visits) == dict.fromkeys(HOSTS[:2], 5)


def test_redirects_are_followed_so_far(web):
    assert one(web.url("/hop/5")) == content("end")
    assert one(web.url("/hop/6")) == "redirects too often"
    assert one(web.url("/hop/1"), replace(OPTIONS, redirects=0)) == "redirects too often"
    loop = web.url("/to/" + urllib.parse.quote(web.url("/to/x", "127.0.0.2"), safe=""))
    assert one(loop) == "redirects too often"
    other = web.url("/to/" + urllib.parse.quote(web.url("/ok/7", "127.0.0.2"), safe=""))
    assert one(other) == content("7") and web.visits[-1].host == "127.0.0.2"


def test_redirects_share_one_time_limit(web):
    assert one(web.url("/late-hop/5"), replace(HASTY, read_seconds=20)) == "timeout"
    assert one(web.url("/late-hop/5")) == content("end")


def test_what_passes_is_tried_again(web):
    paths = ["/after/2/503", "/after/2/429", "/after/2/500", "/after-reset/2"]
    assert run([web.url(path) for path in paths]) == [content(path.split("/", 2)[2]) for path in paths]
    assert [web.counts[path] for path in paths] == [3] * 4
    assert run([web.url("/after/3/503"), web.url("/after/1/404")]) == ["http 503", "http 404"]
    assert one(web.url("/after/1/502"), replace(OPTIONS, retries=0)) == "http 502"
    assert web.counts["/after/1/502"] == 1


def test_the_schedule_of_retries():
    schedule = [[backoff_seconds(row, tries, 2.0) for tries in range(4)] for row in range(200)]
    assert schedule == [[backoff_seconds(row, tries, 2.0) for tries in range(4)] for row in range(200)]
    for tries in range(4):
        shares = [waits[tries] / (2.0 * 2**tries) for waits in schedule]
        assert 0.5 <= min(shares) < 0.6 and 1.4 < max(shares) < 1.5 and len(set(shares)) == 200


def test_retry_after_is_heeded_up_to_a_limit(web):
    now = datetime.now(timezone.utc)
    date = urllib.parse.quote(format_datetime(now + timedelta(seconds=2), usegmt=True))
    paths = ["/busy/1", "/busy/31", f"/busy/{date}", "/busy/soon"]
    results = run([web.url(path) for path in paths])
    assert results[0] == content("1") and results[1] == "http 429" and results[3] == content("soon")
    assert isinstance(results[2], bytes)
    first, second = (visit.at_seconds for visit in web.visits if visit.path == "/busy/1")
    assert second - first > 0.99
    assert sum(visit.path == "/busy/31" for visit in web.visits) == 1, "a server that asks for long is left alone"


def test_retry_after_seconds():
    now = datetime(2030, 1, 1, tzinfo=timezone.utc)
    expected = {
        "0": 0.0, "7": 7.0, " 12 ": 12.0, "-5": 0.0, "1e9": 0.0, "²": 0.0, "": 0.0, "soon": 0.0, "9" * 13: 0.0,
        "Tue, 01 Jan 2030 00:01:00 GMT": 60.0, "Tue, 01 Jan 2030 00:01:00 -0000": 60.0,
        "Tue, 01 Jan 2019 00:01:00 GMT": 0.0, "Tue, 99 Jan 2030 00:01:00 GMT": 0.0,
        "Tue, 01 Jan 2030 00:01:00 +9999999999999": 0.0,
    }  # fmt: skip
    assert {text: retry_after_seconds(text, now) for text in expected} == expected
    assert retry_after_seconds(None, now) == 0.0


@given(st.text(max_size=30))
def test_any_retry_after_is_a_number(text):
    assert retry_after_seconds(text) >= 0


def test_a_host_that_never_answers_is_given_up(web):
    limits = replace(OPTIONS, read_seconds=1, retries=0, per_host=1, host_failures=3)
    results = run([web.url("/silent")] * 6 + [web.url("/ok/1", "127.0.0.2")], limits)
    assert results[:3] == ["timeout"] * 3
    assert results[3:6] == ["host given up: 3 requests in a row without an answer"] * 3
    assert results[6] == content("1") and web.counts["/silent"] == 3
    # an answer in between, of whatever kind, starts the count again; so do refusals of ours
    assert run([web.url("/silent"), web.url("/silent"), web.url("/status/404")] * 2, limits) == [
        "timeout", "timeout", "http 404", "timeout", "timeout", "http 404",
    ]  # fmt: skip
    assert set(run([web.url("/ok/1")] * 9, replace(limits, allow_private=False))) == {"private address"}


def test_a_slow_caller_holds_the_bodies_back(web):
    size = 200_000
    web.files["large"] = bytes(size)
    limits = replace(OPTIONS, connections=4, buffer_bytes=5 * size)
    stream = fetch(((row, web.url("/ok/large")) for row in range(60)), limits)
    for taken in range(1, 4):
        assert len(next(stream).body) == size
        most = taken + 5 + 1 + 4  # what was taken, the buffer, one that crosses its limit, the connections
        while len(web.visits) < taken + 5:
            time.sleep(0.01)  # it continues without the caller
        time.sleep(0.2)
        assert len(web.visits) <= most
    assert len(list(stream)) == 57


def test_options_are_checked():
    for name in ("connections", "per_host", "max_bytes", "retries", "redirects", "host_failures", "total_seconds"):
        with pytest.raises(UserError, match=name):
            FetchOptions(**{name: -1})
    with pytest.raises(UserError, match="ulimit"):
        FetchOptions(connections=10**9)


# --- life and death ---------------------------------------------------------------------------------------------------


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "fetch"]


@pytest.fixture(scope="module")
def distant():
    """Where a server in a process of its own answers, at 127.0.0.1."""
    line = [sys.executable, str(TESTS / "support" / "web.py")]
    with subprocess.Popen(line, stdout=subprocess.PIPE) as server:
        yield f":{int(server.stdout.readline())}"
        server.kill()


def test_a_caller_that_stops_leaves_nothing_behind(distant):
    before = open_files()
    urls = [f"http://127.0.0.1{distant}/ok/1", *[f"http://127.0.0.1{distant}/silent"] * 300]
    stream = fetch(enumerate(urls), OPTIONS)
    assert next(stream).body == content("1") and threads() == ["fetch"]
    stream.close()
    assert threads() == []
    with pytest.raises(ZeroDivisionError):
        for _ in fetch(enumerate(urls), OPTIONS):
            1 / 0  # noqa: B018
    gc.collect()
    assert threads() == [] and open_files() == before


def test_an_exhausted_process_blames_no_row():
    stream = fetch([(0, None), (1, "http://127.0.0.1:1/")], OPTIONS)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [number for number in range(1000) if not os.path.exists(f"/proc/self/fd/{number}")]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[3], limit[1]))  # three more: what an event loop needs
    try:
        with pytest.raises(UserError, match="too many open files"):
            list(stream)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_memory_and_files_stay_flat_over_many_chunks(distant):
    """10,000 rows in ten chunks, good and bad ones."""
    good = [f"http://127.0.0.{1 + row % 2}{distant}/ok/{row}" for row in range(900)]
    bad = [f"http://127.0.0.1{distant}/status/404", "http://127.0.0.1:1/", f"http://127.0.0.1{distant}/short", "x:y"]
    expected = [content(str(row)) for row in range(900)]
    expected += ["http 404", "connection refused", "cut off", "not http(s)"] * 25
    sizes, files = [], []
    for _ in range(10):
        assert run(good + bad * 25, replace(OPTIONS, retries=0, host_failures=1000)) == expected
        gc.collect()
        sizes.append(int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize())
        files.append(open_files())
    assert len(set(files)) == 1, "open files"
    assert max(sizes[5:]) - sizes[4] < 8 << 20, "resident memory after the first half"
