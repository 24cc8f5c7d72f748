"""Fetches images from http(s) URLs, where the server allows it.

Only from hosts on the allow-list. A host's name is resolved once, all of its addresses must be public, and the
connection goes to the address that was checked, so a second DNS answer cannot redirect it. Redirects go through the
same checks.
"""

import asyncio
import functools
import ipaddress
import socket
import ssl
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import httptools

from .errors import APIError, bad_request
from .options import RemoteImages

# Public by their numbers, and yet: Azure's metadata; IETF protocols (a cloud's metadata among them), which older
# Pythons call global; and IPv6 that carries an IPv4 address to somewhere else (NAT64, 6to4, Teredo).
REFUSED_NETWORKS = tuple(
    map(
        ipaddress.ip_network,
        ("168.63.129.16/32", "192.0.0.0/24", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"),
    )
)
MAX_REDIRECTS = 3
MAX_HEAD_BYTES = 64 << 10  # of an answer
DNS_THREADS = 8  # of their own: a name server that does not answer holds up other fetches at most
PORTS = {"http": 80, "https": 443}

Resolver = Callable[[str, int], Sequence[str]]


def is_public(address: str) -> bool:
    """False for loopback, private, link-local (the clouds' metadata), shared, multicast and reserved addresses, also
    where IPv6 wraps them."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if any(ip in network for network in REFUSED_NETWORKS):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in found))


@dataclass(frozen=True)
class Target:
    """What a URL asks for."""

    scheme: str
    host: str
    port: int
    path: str  # with the query

    def request(self) -> bytes:
        """A GET of it. Raises UnicodeError and ValueError where the URL holds what no request may."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        host = host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"
        lines = [f"GET {self.path} HTTP/1.1", f"Host: {host}", "User-Agent: minivlm2vec", "Accept: image/*",
                 "Connection: close"]  # fmt: skip
        if any(c <= " " or c == "\x7f" for c in self.path + host):
            raise ValueError("white space or control characters in the URL")
        return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("ascii")


class ImageFetcher:
    """Fetches images from the hosts of an allow-list.

    Args:
        options: the hosts, and the limits of one image.
        resolver, address_allowed: replaceable for tests.
    """

    def __init__(
        self,
        options: RemoteImages,
        *,
        resolver: Resolver = resolve,
        address_allowed: Callable[[str], bool] = is_public,
    ):
        self.options, self._resolve, self._address_allowed = options, resolver, address_allowed
        self._dns = ThreadPoolExecutor(DNS_THREADS, thread_name_prefix="minivlm2vec-dns")

    def stop(self) -> None:
        """Ends the threads."""
        self._dns.shutdown(wait=False, cancel_futures=True)

    async def fetch(self, url: str, param: str) -> bytes:
        """The bytes behind a URL. Raises APIError 400 (403 where the server does not allow it)."""
        try:
            return await asyncio.wait_for(self._follow(url, param), self.options.timeout)
        except asyncio.TimeoutError:
            raise _failed(f"{param}: not fetched within {self.options.timeout:g} s", param) from None
        except (OSError, EOFError, ValueError, httptools.HttpParserError, httptools.HttpParserUpgrade) as e:
            # The class alone: what the system says would tell a caller about the network behind the server.
            raise _failed(f"{param}: the image could not be fetched ({type(e).__name__})", param) from None

    async def _follow(self, url: str, param: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            target = self._checked(url, param)
            address = await self._address(target, param)
            status, location, body = await self._get(target, address, param)
            if status == 200:
                return body
            if status not in (301, 302, 303, 307, 308) or not location:
                raise _failed(f"{param}: the host answered {status}", param)
            try:
                url = urljoin(url, location)
            except ValueError as e:
                raise _failed(f"{param}: the host redirects to what is not a URL: {e}", param) from None
        raise _failed(f"{param}: more than {MAX_REDIRECTS} redirects", param)

    def _checked(self, url: str, param: str) -> Target:
        try:
            parts = urlsplit(url)
            port = parts.port or PORTS.get(parts.scheme, 0)
        except ValueError as e:
            raise bad_request(f"{param}: not a URL: {e}", param, "invalid_image_url") from None
        if parts.scheme not in PORTS or not parts.hostname or parts.username or parts.password:
            raise bad_request(f"{param}: not an http(s) URL without a user name", param, "invalid_image_url")
        if not any(_matches(parts.hostname, port, pattern) for pattern in self.options.hosts):
            raise _refused(f"{param}: this server fetches no images from that host", param)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return Target(parts.scheme, parts.hostname, port, path)

    async def _address(self, target: Target, param: str) -> str:
        loop = asyncio.get_running_loop()
        addresses = await loop.run_in_executor(self._dns, self._resolve, target.host, target.port)
        if not addresses or not all(map(self._address_allowed, addresses)):
            raise _refused(f"{param}: the host has an address that is not public", param)
        return addresses[0]

    @functools.cached_property
    def _tls(self) -> ssl.SSLContext:
        """Made once: it reads the certificates of the system."""
        return ssl.create_default_context()

    async def _get(self, target: Target, address: str, param: str) -> tuple[int, str, bytes]:
        """Status, Location and body of one GET to `address`; the name is still checked against the certificate."""
        tls = self._tls if target.scheme == "https" else None
        name = target.host if tls else None
        reader, writer = await asyncio.open_connection(address, target.port, ssl=tls, server_hostname=name)
        try:
            writer.write(target.request())
            await writer.drain()
            return await self._read(reader, param)
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, param: str) -> tuple[int, str, bytes]:
        answer, received = _Answer(), 0
        while not answer.complete:
            data = await reader.read(1 << 16)
            if not data:
                answer.end()
                break
            answer.parser.feed_data(data)
            received += len(data)
            if answer.status not in (0, 200):
                break
            if len(answer.body) > self.options.max_bytes:
                raise _failed(f"{param}: the image is larger than {self.options.max_bytes:,} bytes", param)
            if received > MAX_HEAD_BYTES + 8 * len(answer.body):  # heads, trailers and what frames chunks
                raise _failed(f"{param}: the host sends hardly any image among its headers", param)
        return answer.status, answer.headers.get(b"location", b"").decode("latin-1"), bytes(answer.body)


class _Answer:
    """What httptools reads from one answer. A chunk of one byte costs a call of a function, not more."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.status = 0  # until the head is complete
        self.headers: dict[bytes, bytes] = {}
        self.body = bytearray()
        self.complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        status = self.parser.get_status_code()
        if status >= 200:  # else it is informational, and the answer comes behind it
            self.status = status

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = self.status > 0
        if not self.complete:
            self.headers.clear()

    def end(self) -> None:
        """The connection has ended: so has a body of no given length. Raises EOFError for another one."""
        if not self.status or b"content-length" in self.headers or b"transfer-encoding" in self.headers:
            raise EOFError("the connection ended before the answer")


def _matches(host: str, port: int, pattern: str) -> bool:
    name, _, allowed_port = pattern.lower().partition(":")
    if port != int(allowed_port) if allowed_port else port not in PORTS.values():
        return False
    if name.startswith("*."):
        return host.endswith(name[1:])
    return name in ("*", host)


def _failed(message: str, param: str) -> APIError:
    return bad_request(message, param, "image_fetch_failed")


def _refused(message: str, param: str) -> APIError:
    return APIError(403, message, param=param, code="image_host_not_allowed")
