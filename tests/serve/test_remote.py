"""Fetches of remote images: they go only where they may. Loopback only."""

import asyncio
import base64
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from minivlm2vec.serve.errors import APIError
from minivlm2vec.serve.options import RemoteImages
from minivlm2vec.serve.remote import ImageFetcher, is_public, resolve
from tests.support.serving import data_uri, picture


@pytest.mark.parametrize("address", [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "100.100.100.200", "168.63.129.16", "224.0.0.1", "255.255.255.255", "192.0.0.192", "198.18.0.1", "240.0.0.1",
    "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1",
    "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::", "2001:db8::1",
])  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.215.14", "2606:4700:4700::1111", "::ffff:1.1.1.1"])
def test_public_addresses(address):
    assert is_public(address)


def fetch(url: str, *, resolver=resolve, address_allowed=is_public, **options) -> bytes:
    fetcher = ImageFetcher(RemoteImages(**options), resolver=resolver, address_allowed=address_allowed)
    return asyncio.run(fetcher.fetch(url, "here"))


def refused(url: str, status: int, message: str, **options) -> APIError:
    with pytest.raises(APIError, match=message) as e:
        fetch(url, **options)
    assert e.value.status == status, e.value.message
    assert e.value.param == "here"
    return e.value


def resolving(*answers: list[str]):
    """A resolver that gives these answers one after another, then fails the test."""
    left = list(answers)

    def resolve(host, port):
        return left.pop(0)

    return resolve


@pytest.mark.parametrize("url", ["http://127.0.0.1/", "http://[::1]/", "http://localhost/", "http://2130706433/",
                                 "http://0x7f.1/", "http://169.254.169.254/latest/meta-data/"])  # fmt: skip
def test_no_loopback_or_metadata_even_where_every_host_is_allowed(url):
    error = refused(url, 403, "not public", hosts=("*",))
    assert error.code == "image_host_not_allowed"


def test_one_private_address_among_public_ones_is_enough():
    resolve = resolving(["1.1.1.1", "10.0.0.7"])
    refused("http://example.com/", 403, "not public", hosts=("example.com",), resolver=resolve)


@pytest.mark.parametrize(("pattern", "url", "ok"), [
    ("example.com", "https://example.com/a.png", True),
    ("example.com", "https://EXAMPLE.com:443/a.png", True),
    ("example.com", "https://example.com:8443/a.png", False),
    ("example.com:8443", "https://example.com:8443/a.png", True),
    ("example.com:8443", "https://example.com/a.png", False),
    ("example.com", "https://www.example.com/", False),
    ("example.com", "https://example.com.evil.test/", False),
    ("*.example.com", "https://img.example.com/", True),
    ("*.example.com", "https://evilexample.com/", False),
    ("*.example.com", "https://example.com/", False),
])  # fmt: skip
def test_allow_list(pattern, url, ok):
    private = resolving(["10.0.0.1"])  # so that nothing is ever fetched here
    refused(url, 403, "not public" if ok else "no images from that host", hosts=(pattern,), resolver=private)


@pytest.mark.parametrize("url", ["ftp://example.com/", "file:///etc/passwd", "http://", "http://a:b@example.com/",
                                 "http://example.com:99999/", "http://[::1/"])  # fmt: skip
def test_other_urls(url):
    refused(url, 400, "URL", hosts=("*",), resolver=resolving())


class Handler(BaseHTTPRequestHandler):
    """What the path says."""

    def do_GET(self):
        self.server.seen.append((self.path, self.headers["Host"]))
        getattr(self, "path_" + re.match(r"/(\w+)", self.path)[1])()

    def path_image(self):
        self.answer(200, self.server.image)

    def path_large(self):
        self.answer(200, b"x" * 5000)

    def path_endless(self):
        self.send_response(200)
        self.end_headers()
        while not self.server.closing:  # no Content-Length, one byte after another
            self.wfile.write(b"x")
            time.sleep(0.01)

    def path_bytes(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"".join(b"1\r\n%c\r\n" % b for b in self.server.large) + b"0\r\n\r\n")

    def path_unframed(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.image)

    def path_short(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.image) + 1))
        self.end_headers()
        self.wfile.write(self.server.image)

    def path_hints(self):
        image = self.server.image
        self.wfile.write(b"HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\n\r\n")
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(image) + image)

    def path_nonsense(self):
        self.wfile.write(b"220 mail.test ESMTP\r\n")

    def path_headers(self):
        self.send_response(200)
        for n in range(4000):
            self.send_header(f"X-{n}", "y" * 40)
        self.path_image()

    def path_switch(self):
        self.answer(101, b"", Upgrade="h2c", Connection="Upgrade")

    def path_nowhere(self):
        self.answer(302, b"", Location={"1": "http://[::1", "2": "//[x]/", "3": "http://a\u00e9b/ c"}[self.path[-1]])

    def path_missing(self):
        self.answer(404, b"")

    def path_redirect(self):
        self.answer(302, b"", Location=self.path.removeprefix("/redirect"))

    def path_loop(self):
        self.answer(302, b"", Location="/loop")

    def path_away(self):
        self.answer(302, b"", Location="http://169.254.169.254/latest/")

    def path_file(self):
        self.answer(302, b"", Location="file:///etc/passwd")

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def image_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.large = bytes(range(256)) * 2000
    server.image, server.seen, server.closing = base64.b64decode(data_uri(picture(8, 8)).partition(",")[2]), [], False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server, f"http://pictures.test:{server.server_address[1]}"
    finally:
        server.closing = True
        server.shutdown()
        thread.join(10)
        server.server_close()


def here(server, **options):
    """Options that let a fetch reach the test's own server, as if 127.0.0.1 were public."""
    return {
        "hosts": (f"pictures.test:{server.server_address[1]}",),
        "resolver": resolving(*[["127.0.0.1"]] * 5),
        "address_allowed": lambda address: address == "127.0.0.1",
    } | options


def test_fetch():
    with image_server() as (server, url):
        assert fetch(url + "/image?a=b", **here(server)) == server.image
        assert server.seen == [("/image?a=b", url.removeprefix("http://"))]  # the name, though by its address


def test_the_address_that_was_checked_is_the_one_that_is_used():
    """A DNS that answers otherwise the second time is not asked a second time."""
    with image_server() as (server, url):
        rebinding = resolving(["127.0.0.1"], ["10.0.0.1"])
        assert fetch(url + "/image", **here(server, resolver=rebinding)) == server.image
        assert rebinding("", 0) == ["10.0.0.1"]  # the second answer is still there


def test_redirects_are_followed_and_checked():
    with image_server() as (server, url):
        assert fetch(url + "/redirect/image", **here(server)) == server.image
        refused(url + "/loop", 400, "more than 3 redirects", **here(server))
        refused(url + "/away", 403, "no images from that host", **here(server))
        everything = here(server, hosts=("*", *here(server)["hosts"]))
        everything["resolver"] = resolving(["127.0.0.1"], ["169.254.169.254"])
        refused(url + "/away", 403, "not public", **everything)
        everything["resolver"] = resolving(["127.0.0.1"])
        refused(url + "/file", 400, "URL", **everything)
        moved = {"resolver": resolving(["127.0.0.1"], ["10.0.0.1"])}
        refused(url + "/redirect/image", 403, "not public", **(here(server) | moved))


def test_size_time_and_status():
    with image_server() as (server, url):
        refused(url + "/large", 400, "larger than 4,999 bytes", **here(server, max_bytes=4999))
        refused(url + "/missing", 400, "answered 404", **here(server))
        refused(url + "/endless", 400, "not fetched within 0.3 s", **here(server, timeout=0.3))


def test_framings():
    with image_server() as (server, url):
        for path in ("unframed", "hints"):
            assert fetch(f"{url}/{path}", **here(server)) == server.image
        for path in ("short", "nonsense", "headers", "switch"):
            refused(f"{url}/{path}", 400, "image|answered", **here(server))


@pytest.mark.parametrize("which", ["1", "2", "3"])
def test_a_redirect_to_what_is_no_url(which):
    with image_server() as (server, url):
        refused(f"{url}/nowhere/{which}", 400, "here: ", **here(server, hosts=("*", *here(server)["hosts"])))


def test_chunks_of_one_byte_do_not_hold_up_the_event_loop():
    async def body(url, options):
        longest, last, done = 0.0, time.monotonic(), False

        async def watch():
            nonlocal longest, last
            while not done:
                await asyncio.sleep(0.001)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()

        watching = asyncio.ensure_future(watch())
        start = time.process_time()
        fetcher = ImageFetcher(RemoteImages(options.pop("hosts"), timeout=60), **options)
        data = await fetcher.fetch(url + "/bytes", "here")
        done = True
        await watching
        return data, longest, time.process_time() - start

    with image_server() as (server, url):
        data, longest, cost = asyncio.run(body(url, here(server)))
    assert data == server.large
    assert cost < 6 and longest < 10, (cost, longest)  # half a million chunks; h11 took 30 s


def test_dns_that_does_not_answer_leaves_other_threads_alone():
    """More names than there are threads for DNS; the loop's own threads are free."""
    release = threading.Event()

    def resolve(host, port):
        release.wait(60)
        return []

    async def body():
        fetcher = ImageFetcher(RemoteImages(("*",), timeout=0.5), resolver=resolve)
        fetches = [asyncio.ensure_future(fetcher.fetch(f"http://h{n}.test/", "here")) for n in range(40)]
        await asyncio.sleep(0.1)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: 7), 20) == 7
        errors = await asyncio.gather(*fetches, return_exceptions=True)
        release.set()
        fetcher.stop()
        assert {(e.status, e.code) for e in errors} == {(400, "image_fetch_failed")}

    asyncio.run(body())


def test_what_cannot_be_reached_tells_nothing_about_the_network():
    with image_server() as (server, url):
        options = here(server)
    message = refused(url + "/image", 400, "could not be fetched", **options).message
    assert "127.0.0.1" not in message
