"""fetch keeps out of where it must not go: private addresses however spelled, opted-out images, bad certificates."""

import ipaddress
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.parse
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fetching import OPTIONS, one
from support.fetching import fetch_all as run
from support.web import HOSTS, Web, content

from dalle_scale.curation.download.policy import is_public, opt_out


@pytest.fixture
def web():
    with Web() as server:
        yield server


PRIVATE = [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.2.0/24",
    "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    "255.255.255.255/32", "168.63.129.16/32", "::/128", "::1/128", "::/96", "100::/64", "2001:db8::/32", "fc00::/7",
    "fe80::/10", "fec0::/10", "ff00::/8", "4000::/3", "::ffff:0:0:0/96",
]  # fmt: skip
PUBLIC = ["1.0.0.0/24", "8.0.0.0/8", "93.184.0.0/16", "151.101.0.0/16", "2001:4860::/32", "2606:4700::/32", "2a00::/16"]


@st.composite
def addresses(rng, networks):
    network = ipaddress.ip_network(rng(st.sampled_from(networks)))
    return network[rng(st.integers(0, network.num_addresses - 1))]


def disguises(address: ipaddress.IPv4Address) -> list[str]:
    """An IPv4 address inside IPv6 ones: mapped, NAT64, 6to4, Teredo."""
    bits = int(address)
    return [str(ipaddress.IPv6Address(value)) for value in (
        0xFFFF << 32 | bits, 0x64FF9B << 96 | bits, 0x2002 << 112 | bits << 80 | 1,
        0x20010000 << 96 | 0x41010101 << 64 | (bits ^ 0xFFFFFFFF),
    )]  # fmt: skip


@given(addresses(PRIVATE), addresses(PUBLIC))
def test_public_addresses(private, public):
    assert not is_public(str(private)) and is_public(str(public))
    for address, verdict in ((private, False), (public, True)):
        if address.version == 4:
            assert [is_public(text) for text in disguises(address)] == [verdict] * 4
    assert not is_public(f"fe80::{int(private) & 0xFFFF:x}%eth0")


def test_spellings_that_only_the_system_reads_are_not_public():
    for text in ("2130706433", "0x7f.1", "127.1", "0177.0.0.1", "", "localhost", "1.2.3.4.", "8.8.8.8 "):
        assert not is_public(text)


def test_no_spelling_leads_inside(web):
    ours = [
        "127.0.0.1", "127.0.0.2", "::1", "localhost", "LOCALHOST", "localhost.", "2130706433", "0x7f000001", "0x7f.1",
        "017700000001", "0177.0.0.1", "127.1", "127.0.1", "127.0.0.1.", "0", "0.0.0.0", "::", "::ffff:127.0.0.1",
        "::ffff:7f00:1", "::127.0.0.1", "0:0:0:0:0:0:0:1", "１２７.0.0.1", "127。0。0。1", "ⓛocalhost",
        "%31%32%37.0.0.1", socket.gethostname(),
    ]  # fmt: skip
    others = ["169.254.169.254", "10.0.0.1", "192.168.1.1", "100.64.0.1", "[fe80::1]", "[fd00:ec2::254]", "224.0.0.1"]
    urls = [web.url("/ok/1", host) for host in ours] + [
        f"{kind}://{host}/" for host in others for kind in ("http", "https")
    ]
    results = run(urls, replace(OPTIONS, allow_private=False, retries=0))
    refusals = {"private address", "malformed url", "dns failure"}
    assert {str(result).partition(":")[0] for result in results} <= refusals
    assert results[:5] == ["private address"] * 5 and results[len(ours) :] == ["private address"] * 14
    assert web.connections == 0, "nothing was even connected to"


def test_no_redirect_leads_inside(web, monkeypatch):
    """A first server that counts as public sends on to one that does not."""
    monkeypatch.setattr("dalle_scale.curation.download.client.is_public", lambda address: address == "127.0.0.2")
    for inside in (web.url("/ok/1"), web.url("/ok/1", "::1"), web.url("/ok/1", "localhost"), "http://169.254.169.254/"):
        url = web.url("/to/" + urllib.parse.quote(inside, safe=""), "127.0.0.2")
        assert one(url, replace(OPTIONS, allow_private=False)) == "private address"
    assert {visit.host for visit in web.visits} == {"127.0.0.2"} and web.connections <= 4


def test_no_name_leads_inside(web, monkeypatch):
    """Names of an attacker: one private address, several, and answers that change between look-ups."""
    asked = []

    def look_up(host, *unused, **unused_too):
        asked.append(host)
        ips = {"a.test": ["127.0.0.1"], "b.test": ["127.0.0.2", "::1"], "c.test": [HOSTS[len(asked) % 2]]}[host]
        families = (socket.AF_INET6 if ":" in ip else socket.AF_INET for ip in ips)
        return [(family, socket.SOCK_STREAM, 6, "", (ip, 0)) for family, ip in zip(families, ips, strict=True)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    urls = [web.url("/ok/1", name) for name in ("a.test", "b.test", "c.test") for _ in range(5)]
    assert set(run(urls, replace(OPTIONS, allow_private=False))) == {"private address"}
    assert web.connections == 0
    assert sorted(asked) == ["a.test", "b.test", "c.test"], "looked up once"
    assert set(run(urls)) == {content("1")}


def test_a_name_server_that_hangs_is_a_timeout(web, monkeypatch):
    over = threading.Event()
    found = socket.getaddrinfo

    def look_up(host, *rest, **options):
        if host.endswith(".test"):
            over.wait()
        return found(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    urls = [web.url("/ok/1", f"{index // 2}.test") for index in range(20)] + [web.url("/ok/1", "localhost")]
    results = run(urls, replace(OPTIONS, connect_seconds=2, retries=0))
    over.set()
    assert results == ["timeout"] * 20 + [content("1")], "nor does it stand in the way of other names"


def test_nothing_of_the_users_goes_out_and_nothing_is_kept(web, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    requests = run([web.url("/echo")] * 3, replace(OPTIONS, per_host=1, user_agent="somebody/1 (mail@example.org)"))
    for request in requests:
        names = {line.partition(b":")[0] for line in request.split(b"\r\n")[1:] if line}
        assert names == {b"Host", b"User-Agent", b"Accept", b"Accept-Encoding"}, "no cookie, no authorization"
        assert b"User-Agent: somebody/1 (mail@example.org)\r\n" in request
        assert b"Accept-Encoding: identity\r\n" in request


OPT_OUTS = [
    (["noai"], "noai"), (["NoImageAI"], "noimageai"), (["noindex"], "noindex"), (["*: noai"], "noai"),
    (["nofollow, noimageindex"], "noimageindex"), (["nofollow", "noai"], "noai"), (["otherbot: noai"], None),
    (["otherbot: noai, noindex"], None), (["ourbot: noai"], "noai"), (["OurBot: nofollow, noai"], "noai"),
    (["otherbot: noai, ourbot: noindex"], "noindex"), (["noai, otherbot: noindex"], "noai"),
    (["otherbot: noai", "noindex"], "noindex"), (["unavailable_after: 25 Jun 2030 15:00:00 GMT, noai"], "noai"),
    (["max-snippet: 5"], None), (["max-image-preview: none, nosnippet"], None), (["all"], None), ([""], None),
    (["noai2, xnoai"], None), ([], None),
]  # fmt: skip


@pytest.mark.parametrize("headers, directive", OPT_OUTS)
def test_opt_outs(headers, directive):
    assert opt_out(headers, "ourbot") == directive


def test_opt_outs_are_heeded_unless_told_otherwise(web):
    queries = ["X-Robots-Tag=all&x-robots-tag=noai", "X-Robots-Tag=otherbot:noai", "X-Robots-Tag=ourbot:noimageindex"]
    urls = [web.url(f"/headers/1?{query}") for query in queries]
    options = replace(OPTIONS, user_agent="OurBot/2.0")
    assert run(urls, options) == [
        "opted out: X-Robots-Tag says noai", content("1"), "opted out: X-Robots-Tag says noimageindex"
    ]  # fmt: skip
    assert run(urls, replace(options, heed_robots_tag=False)) == [content("1")] * 3


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    line = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=localhost"]
    line += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", path, "-out", path.with_suffix(".crt")]
    subprocess.run(line, check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + path.with_suffix(".crt").read_bytes())
    return path


def test_certificates_are_checked(certificate):
    with Web(certificate) as web:
        assert one(web.url("/ok/1")) == "tls failure" and not web.visits
        code = (
            "import sys; from dalle_scale.curation.download.client import fetch, FetchOptions\n"
            "for item in fetch(enumerate(sys.argv[1:]), FetchOptions(allow_private=True)):\n"
            "    print(item.body or item.reason)"
        )
        urls = [web.url("/ok/1"), web.url("/ok/1", "localhost"), web.url("/ok/1", "127.0.0.2")]
        environment = {**os.environ, "SSL_CERT_FILE": str(certificate.with_suffix(".crt"))}
        done = subprocess.run([sys.executable, "-c", code, *urls], capture_output=True, text=True, env=environment)
        assert done.stdout.splitlines() == [str(content("1"))] * 2 + ["tls failure"], "trusted, but not for that name"
