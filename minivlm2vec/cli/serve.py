"""`minivlm2vec serve MODEL`."""

import argparse
import os
import socket
import sys
from typing import TYPE_CHECKING

from .arguments import add_model_arguments, load_embedder

if TYPE_CHECKING:
    import uvicorn

EXTRA = "`minivlm2vec serve` needs the extra: pip install 'minivlm2vec[serve]'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `minivlm2vec serve`; sets `run`."""
    parser.description = "Serves a checkpoint with OpenAI's embeddings API, images included."
    add_model_arguments(parser, positional=True)
    web = parser.add_argument_group("address and access")
    web.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s; 0.0.0.0 for all)")
    web.add_argument("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    web.add_argument(
        "--served-model-name", action="append", metavar="NAME", help="repeatable (default: MODEL, or the adapter)"
    )
    web.add_argument("--api-key", action="append", metavar="KEY",
                     help="repeatable; better in MINIVLM2VEC_API_KEY, where `ps` does not show it")  # fmt: skip
    web.add_argument("--allow-remote-images", action="append", metavar="HOST", default=[],
                     help="fetch images from this host: example.com, example.com:8443, *.example.com, or * for every "
                          "public host; repeatable (default: data URIs only)")  # fmt: skip
    web.add_argument("--access-log", action="store_true", help="a line for every request")
    batching = parser.add_argument_group("batching")
    batching.add_argument("--batch-tokens", type=int, default=16384, help="tokens of a pack (%(default)s)")
    batching.add_argument("--max-batch-inputs", type=int, default=1024, help="inputs of a pack (%(default)s)")
    batching.add_argument("--max-wait-ms", type=float, default=5.0, help="wait for company (%(default)s)")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--queue-tokens", type=int, help="beyond them 429 (default: 16 packs)")
    limits.add_argument("--max-requests", type=int, default=512, help="at a time; beyond them 429 (%(default)s)")
    limits.add_argument("--max-inputs", type=int, default=2048, help="of a request (%(default)s, and no more)")
    limits.add_argument("--max-input-tokens", type=int, help="of one input (default: a pack's, or the model's limit)")
    limits.add_argument("--max-body-mb", type=float, default=32, help="of a request (%(default)s)")
    limits.add_argument("--max-image-megapixels", type=float, default=64, help="width x height (%(default)s)")
    limits.add_argument("--max-num-crops", type=int, default=16, help="that a request may ask for (%(default)s)")
    limits.add_argument("--request-timeout", type=float, default=60, metavar="SECONDS", help="(%(default)s)")
    limits.add_argument("--drain-delay", type=float, default=1.0, metavar="SECONDS",
                        help="from SIGTERM, when /ready turns to 503, until the port closes (%(default)s)")  # fmt: skip
    parser.add_argument("--matryoshka-dimensions", type=int, action="append", default=[], metavar="N",
                        help="a size that `dimensions` may ask for, of a model trained so; repeatable")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Loads, listens, serves until SIGTERM or SIGINT, finishes what it has begun. Returns 0."""
    try:
        import fastapi  # noqa: F401
        import orjson  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as e:
        raise ImportError(f"{EXTRA} ({e})") from None
    check(args)
    listener = bind(args.host, args.port)  # before the model is loaded, so that a port in use is told at once
    with listener:
        make_server(args).run(sockets=[listener])
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises ValueError naming an argument that is out of range."""
    for name in ("batch_tokens", "max_batch_inputs", "queue_tokens", "max_requests", "max_inputs", "max_input_tokens",
                 "max_body_mb", "max_image_megapixels", "max_num_crops", "request_timeout"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    if not 0 <= args.port <= 65535:  # the system would take it modulo 65536
        raise ValueError(f"--port is {args.port}; a port is 0 to 65535")
    for name in ("max_wait_ms", "drain_delay"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must not be below 0")


def bind(host: str, port: int) -> socket.socket:
    """A bound socket; connections are refused until the server listens on it. Raises ValueError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as e:
        raise ValueError(f"cannot listen on {host}:{port}: {e}") from None
    return listener


def make_server(args: argparse.Namespace) -> "uvicorn.Server":
    """The loaded model behind a uvicorn server that drains."""
    from ..serve.app import create_app
    from ..serve.images import RemoteImages
    from ..serve.server import Server
    from ..serve.service import Limits, Service

    embedder = load_embedder(args, show_progress=sys.stderr.isatty())
    service = Service(
        embedder,
        names=args.served_model_name or [default_name(args.adapter or args.model)],
        limits=Limits(
            max_inputs=args.max_inputs,
            max_input_tokens=args.max_input_tokens,
            queue_tokens=args.queue_tokens,
            max_requests=args.max_requests,
            max_body_bytes=int(args.max_body_mb * 2**20),
            max_image_pixels=int(args.max_image_megapixels * 1e6),
            max_num_crops=args.max_num_crops,
            request_timeout=args.request_timeout,
        ),
        remote=RemoteImages(tuple(args.allow_remote_images)),
        matryoshka=args.matryoshka_dimensions,
        batch_tokens=args.batch_tokens,
        max_batch_inputs=args.max_batch_inputs,
        max_wait=args.max_wait_ms / 1000,
    )
    environment = os.environ.get("MINIVLM2VEC_API_KEY")
    app = create_app(service, api_keys=[*(args.api_key or []), *([environment] if environment else [])])
    return Server(app, drain_delay=args.drain_delay, access_log=args.access_log)


def default_name(model: str) -> str:
    """A folder is served under its own name, not under its path."""
    return os.path.basename(os.path.abspath(model)) if os.path.isdir(model) else model
