"""Images from callers: nothing here trusts them.

data URI | http(s) URL -> bytes -> opened PIL image (header read, format, size and pixels checked, not yet decoded)

A remote image is fetched only from a host on the allow-list. Its name is resolved once, every address must be
public, and the connection goes to the address that was checked, so that a second answer of the DNS cannot move it.
Redirects go through the same checks.
"""

import asyncio
import base64
import binascii
import io
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

import h11
from PIL import Image

from ..errors import InputError
from .errors import APIError, bad_request

Image.init()
# Read by Pillow itself or by the libraries in its wheels; none of them runs another program, as EPS would.
FORMATS = tuple(f for f in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF") if f in Image.OPEN)
# Public by their numbers, and yet: Azure's metadata; IETF protocols (a cloud's metadata among them), which older
# Pythons call global; and IPv6 that carries an IPv4 address to somewhere else (NAT64, 6to4, Teredo).
REFUSED_NETWORKS = tuple(
    map(
        ipaddress.ip_network,
        ("168.63.129.16/32", "192.0.0.0/24", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"),
    )
)
MAX_REDIRECTS = 3
PORTS = {"http": 80, "https": 443}

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]


def decode_data_uri(uri: str, param: str) -> bytes:
    """The bytes of data:…;base64,… Raises APIError 400."""
    head, comma, body = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise bad_request(f"{param}: a data URI is data:image/…;base64,…", param, "invalid_image_url")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as e:
        raise bad_request(f"{param}: the data URI's base64 is damaged: {e}", param, "invalid_image_url") from None


def open_image(data: bytes, name: str, *, max_pixels: int) -> Image.Image:
    """Opens the bytes of an image file without decoding it. Raises InputError with `name`."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as e:
        raise InputError(f"decompression bomb: {e}", name=name) from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError):
        known = ", ".join(FORMATS)
        raise InputError(f"the {len(data):,} bytes are no image in a known format ({known})", name=name) from None
    if image.width * image.height > max_pixels:
        raise InputError(
            f"{image.width} x {image.height} = {image.width * image.height:,} pixels are more than the "
            f"{max_pixels:,} that this server takes", name=name
        )  # fmt: skip
    image.filename = name  # what messages call it
    return image


def is_public(address: str) -> bool:
    """False for loopback, private, link-local (the clouds' metadata), shared, multicast and reserved addresses, also
    where IPv6 wraps them."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    if any(ip in network for network in REFUSED_NETWORKS):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(info[4][0] for info in found))


@dataclass(frozen=True)
class RemoteImages:
    """Fetches images from the hosts of an allow-list.

    Fields:
        allow: hosts: "example.com", "example.com:8443", "*.example.com" (not example.com itself), "*" for every
            public host. Without a port, 80 and 443 are meant.
        max_bytes: of one image.
        timeout: seconds for one image, redirects included.
        resolver, address_allowed: replaceable for tests.
    """

    allow: tuple[str, ...] = ()
    max_bytes: int = 20 << 20
    timeout: float = 10.0
    resolver: Resolver = resolve
    address_allowed: Callable[[str], bool] = is_public

    async def fetch(self, url: str, param: str) -> bytes:
        """The bytes behind a URL. Raises APIError 400 (403 where the server does not allow it)."""
        try:
            return await asyncio.wait_for(self._follow(url, param), self.timeout)
        except asyncio.TimeoutError:
            raise _failed(f"{param}: not fetched within {self.timeout:g} s", param) from None
        except (OSError, EOFError, h11.ProtocolError, UnicodeError) as e:
            # The class alone: what the system says would tell a caller about the network behind the server.
            raise _failed(f"{param}: the image could not be fetched ({type(e).__name__})", param) from None

    async def _follow(self, url: str, param: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            parts, port = self._checked(url, param)
            address = await self._address(parts.hostname, port, param)
            status, location, body = await self._get(parts, port, address, param)
            if status == 200:
                return body
            if status not in (301, 302, 303, 307, 308) or not location:
                raise _failed(f"{param}: the host answered {status}", param)
            url = urljoin(url, location)
        raise _failed(f"{param}: more than {MAX_REDIRECTS} redirects", param)

    def _checked(self, url: str, param: str) -> tuple[SplitResult, int]:
        try:
            parts = urlsplit(url)
            port = parts.port or PORTS.get(parts.scheme, 0)
        except ValueError as e:
            raise bad_request(f"{param}: not a URL: {e}", param, "invalid_image_url") from None
        if parts.scheme not in PORTS or not parts.hostname or parts.username or parts.password:
            raise bad_request(f"{param}: not an http(s) URL without a user name", param, "invalid_image_url")
        if not any(_matches(parts.hostname, port, pattern) for pattern in self.allow):
            raise _refused(f"{param}: this server fetches no images from that host", param)
        return parts, port

    async def _address(self, host: str, port: int, param: str) -> str:
        addresses = await self.resolver(host, port)
        if not addresses or not all(map(self.address_allowed, addresses)):
            raise _refused(f"{param}: the host has an address that is not public", param)
        return addresses[0]

    async def _get(self, url: SplitResult, port: int, address: str, param: str) -> tuple[int, str, bytes]:
        """Status, Location and body of one GET to `address`; the name is still checked against the certificate."""
        tls = {"ssl": ssl.create_default_context(), "server_hostname": url.hostname} if url.scheme == "https" else {}
        reader, writer = await asyncio.open_connection(address, port, **tls)
        try:
            connection = h11.Connection(h11.CLIENT)
            writer.write(connection.send(_request(url, port)) + connection.send(h11.EndOfMessage()))
            await writer.drain()
            return await self._read(connection, reader, param)
        finally:
            writer.close()

    async def _read(
        self, connection: h11.Connection, reader: asyncio.StreamReader, param: str
    ) -> tuple[int, str, bytes]:
        status, location, body = 0, "", bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(1 << 16))
            elif isinstance(event, h11.Response):
                status = event.status_code
                location = dict(event.headers).get(b"location", b"").decode("latin-1")
                if status != 200:
                    return status, location, b""
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > self.max_bytes:
                    raise _failed(f"{param}: the image is larger than {self.max_bytes:,} bytes", param)
            elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
                return status, location, bytes(body)


def _request(url: SplitResult, port: int) -> h11.Request:
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    host = host if port == PORTS[url.scheme] else f"{host}:{port}"
    headers = [("Host", host), ("User-Agent", "minivlm2vec"), ("Accept", "image/*"), ("Connection", "close")]
    return h11.Request(method="GET", target=target.encode("ascii"), headers=headers)


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
