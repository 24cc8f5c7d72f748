"""What a server is started with: typed options, checked when they are made."""

from dataclasses import dataclass, field
from math import inf
from urllib.parse import urlsplit

from ..errors import Option, OptionError


@dataclass(frozen=True)
class Limits:
    """What a server accepts.

    Fields:
        max_inputs: inputs in one request; OpenAI's own limit is 2048, and no server accepts more.
        max_input_tokens: tokens of one input, image tokens included; None: what fits into a batch and into the model.
        queue_tokens: once so many tokens are in flight, new requests get a 429; also the most tokens of one request.
            None: 16 batches.
        max_requests: requests in flight, from when their body is there; beyond it 429.
        max_body_bytes: bytes of one request's body.
        max_image_pixels: width times height of one image.
        max_request_pixels: pixels of all images of one request.
        queue_pixels: pixels of all images in flight; beyond them 429. At most two of the largest are decoded at a time.
        decode_timeout: seconds to open or to decode one image; then its request gets a 400.
        max_num_crops: the largest mm_processor_kwargs.num_crops that a request may ask for.
        request_timeout: seconds until a request gets a 504.
    """

    max_inputs: int = 2048
    max_input_tokens: int | None = None
    queue_tokens: int | None = None
    max_requests: int = 512
    max_body_bytes: int = 32 << 20
    max_image_pixels: int = 64_000_000
    max_request_pixels: int = 512_000_000
    queue_pixels: int = 2_000_000_000
    decode_timeout: float = 20.0
    max_num_crops: int = 16
    request_timeout: float = 60.0

    def __post_init__(self) -> None:
        _check_positive(self, *self.__dataclass_fields__)


@dataclass(frozen=True)
class Batching:
    """How inputs of many requests are put together.

    Fields:
        batch_tokens: tokens of one batch; a longer input gets a batch of its own.
        max_batch_inputs: inputs of one batch.
        max_wait: seconds that an input waits for others to share its batch.
    """

    batch_tokens: int = 16384
    max_batch_inputs: int = 1024
    max_wait: float = 0.005

    def __post_init__(self) -> None:
        _check_positive(self, "batch_tokens", "max_batch_inputs")
        if not 0 <= self.max_wait < inf:
            raise OptionError(Option("max_wait"), f" is {self.max_wait}; it must not be below 0")


@dataclass(frozen=True)
class Access:
    """Who may use the server.

    Fields:
        api_keys: /v1 needs one of them as a bearer token; with none it is open. White space around a key is dropped.
        cors_origins: origins whose pages may call the server from a browser, as "http://localhost:3000"; "*" for all.
            A slash at the end is dropped, and capitals are lowered, as browsers do it.
    """

    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        keys = tuple(key.strip() for key in self.api_keys)
        for number, key in enumerate(keys):
            if not key or not key.isprintable():
                what = "has control characters" if key else "is empty: an empty key would let everybody in"
                raise ValueError(f"api_keys[{number}] {what}")
        object.__setattr__(self, "api_keys", keys)
        object.__setattr__(self, "cors_origins", tuple(map(_origin, self.cors_origins)))


@dataclass(frozen=True)
class RemoteImages:
    """Which http(s) images the server fetches.

    Fields:
        hosts: "example.com", "example.com:8443", "*.example.com" (not example.com itself), or "*" for every public
            host. Without a port, 80 and 443 are meant. Empty: images come as data URIs only.
        max_bytes: bytes of one image.
        timeout: seconds for one image, redirects included.
    """

    hosts: tuple[str, ...] = ()
    max_bytes: int = 20 << 20
    timeout: float = 10.0

    def __post_init__(self) -> None:
        _check_positive(self, "max_bytes", "timeout")


@dataclass(frozen=True)
class ServeOptions:
    """Everything that `create_app` can be told.

    Fields:
        names: what the model is called in requests; the first is the default. Empty: the embedder's own name.
        matryoshka_dimensions: sizes that `dimensions` may ask for besides the full one and those that the model's
            config.json says it was trained for.
    """

    names: tuple[str, ...] = ()
    matryoshka_dimensions: tuple[int, ...] = ()
    limits: Limits = field(default_factory=Limits)
    batching: Batching = field(default_factory=Batching)
    access: Access = field(default_factory=Access)
    remote_images: RemoteImages = field(default_factory=RemoteImages)

    def __post_init__(self) -> None:
        for size in self.matryoshka_dimensions:
            if size < 1:
                raise ValueError(f"matryoshka_dimensions holds {size}; sizes are above 0")


def _origin(given: str) -> str:
    """An origin as browsers send it. Raises ValueError for what they never send."""
    origin = given.strip().lower().removesuffix("/")
    try:
        parts = urlsplit(origin)
        is_origin = parts.hostname and origin == f"{parts.scheme}://{parts.netloc}" and not set("@*") & set(origin)
        default = {"http": 80, "https": 443}.get(parts.scheme) if parts.port else None
    except ValueError:
        is_origin = False
    if origin not in ("*", "null") and not is_origin:
        raise ValueError(f"{given!r} is no origin; one is like http://localhost:3000, without a path, or * for all")
    return origin.removesuffix(f":{default}") if is_origin and default else origin


def _check_positive(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < inf:
            raise OptionError(Option(name), f" is {value}; it must be above 0")
