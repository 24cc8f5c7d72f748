"""`minivlm2vec serve MODEL`: arguments, the port, signals and the exit code; the server is `minivlm2vec.serve`."""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..errors import Option, OptionError
from ..serve.options import Access, Batching, Limits, RemoteImages, ServeOptions
from .arguments import add_model_arguments, load_embedder

if TYPE_CHECKING:
    import uvicorn

EXTRA = "`minivlm2vec serve` needs the extra: pip install 'minivlm2vec[serve]'"
UNITS = {  # options that an argument gives in another unit: the argument, and how many of the option's one of it is
    "max_body_bytes": ("max_body_mb", 2**20),
    "max_image_pixels": ("max_image_megapixels", 10**6),
    "max_request_pixels": ("max_request_megapixels", 10**6),
    "queue_pixels": ("queue_megapixels", 10**6),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `minivlm2vec serve`; sets `run`."""
    parser.description = "Serves a checkpoint with OpenAI's embeddings API, images included."
    add_model_arguments(parser, positional=True)
    _add_access(parser.add_argument_group("address and access"))
    _add_batching(parser.add_argument_group("batching"))
    _add_limits(parser.add_argument_group("limits"))
    parser.add_argument("--matryoshka-dimensions", type=int, action="append", default=[], metavar="N",
                        help="a size that `dimensions` may ask for, of a model trained so; repeatable")  # fmt: skip
    parser.set_defaults(run=run)


def _add_access(web: argparse._ArgumentGroup) -> None:
    web.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s; 0.0.0.0 for all)")
    web.add_argument("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    web.add_argument(
        "--served-model-name", action="append", metavar="NAME", help="repeatable (default: MODEL, or the adapter)"
    )
    web.add_argument("--api-key", action="append", metavar="KEY",
                     help="repeatable; better in MINIVLM2VEC_API_KEY, where `ps` does not show it")  # fmt: skip
    web.add_argument("--cors-origin", action="append", metavar="ORIGIN", default=[],
                     help="let pages of this origin call the server from a browser: http://localhost:3000, or * for "
                          "every one; repeatable")  # fmt: skip
    web.add_argument("--allow-remote-images", action="append", metavar="HOST", default=[],
                     help="fetch images from this host: example.com, example.com:8443, *.example.com, or * for every "
                          "public host; repeatable (default: data URIs only)")  # fmt: skip
    web.add_argument("--access-log", action="store_true", help="a line for every request")


def _add_batching(batching: argparse._ArgumentGroup) -> None:
    tokens, inputs, wait = Batching.batch_tokens, Batching.max_batch_inputs, 1000 * Batching.max_wait
    batching.add_argument("--batch-tokens", type=int, default=tokens, help="tokens of a batch (%(default)s)")
    batching.add_argument("--max-batch-inputs", type=int, default=inputs, help="inputs of a batch (%(default)s)")
    batching.add_argument("--max-wait-ms", type=float, default=wait,
                          help="how long an input waits for others to share its batch (%(default)s)")  # fmt: skip


def _add_limits(limits: argparse._ArgumentGroup) -> None:
    def add(option: str, text: str, kind: type = int, metavar: str | None = None) -> None:
        argument, unit = UNITS.get(option, (option, 1))
        default = getattr(Limits, option)
        limits.add_argument("--" + argument.replace("_", "-"), type=kind, metavar=metavar, help=text,
                            default=default if default is None else kind(default / unit))  # fmt: skip

    add("queue_tokens", "in flight; beyond them 429 (default: 16 batches)")
    add("max_requests", "in flight; beyond them 429 (%(default)s)")
    add("max_inputs", "of a request (%(default)s, and no more)")
    add("max_input_tokens", "of one input (default: a batch's, or the model's limit)")
    add("max_body_bytes", "of a request (%(default)s)", float)
    add("max_image_pixels", "width x height (%(default)s)", float)
    add("max_request_pixels", "of all images (%(default)s)", float)
    add("queue_pixels", "in flight; beyond them 429 (%(default)s)", float)
    add("decode_timeout", "of one image (%(default)s)", float, "SECONDS")
    add("max_num_crops", "that a request may ask for (%(default)s)")
    add("request_timeout", "(%(default)s)", float, "SECONDS")
    limits.add_argument("--drain-delay", type=float, default=1.0, metavar="SECONDS",
                        help="from SIGTERM, when /ready turns to 503, until the port closes (%(default)s)")  # fmt: skip


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
    options = make_options(args)
    listener = bind(args.host, args.port)  # before the model is loaded, so that a port in use is told at once
    with listener:
        make_server(args, options).run(sockets=[listener])
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises ValueError naming an argument of the process itself that is out of range."""
    if not 0 <= args.port <= 65535:  # the system would take it modulo 65536
        raise ValueError(f"--port is {args.port}; a port is 0 to 65535")
    if not 0 <= args.drain_delay <= 3600:
        raise ValueError(f"--drain-delay is {args.drain_delay}; it is 0 to 3600 seconds")


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


def make_server(args: argparse.Namespace, options: ServeOptions) -> "uvicorn.Server":
    """The loaded model behind a uvicorn server that drains."""
    from ..serve import create_app
    from ..serve.server import Server

    app = create_app(load_embedder(args, show_progress=sys.stderr.isatty()), options)
    names = ", ".join(options.names)
    return Server(
        app,
        drain_delay=args.drain_delay,
        access_log=args.access_log,
        on_listening=lambda url: print(f"serving {names} on {url}", flush=True),
    )


def make_options(args: argparse.Namespace) -> ServeOptions:
    """What the arguments ask of `create_app`. Raises ValueError naming one that is out of range."""
    if not 0 <= args.max_wait_ms <= 60_000:
        raise ValueError(f"--max-wait-ms is {args.max_wait_ms}; it is 0 to 60000")
    return ServeOptions(
        names=tuple(args.served_model_name or [default_name(args.adapter or args.model)]),
        matryoshka_dimensions=tuple(args.matryoshka_dimensions),
        limits=Limits(**{field.name: _limit(args, field.name) for field in fields(Limits)}),
        batching=Batching(args.batch_tokens, args.max_batch_inputs, args.max_wait_ms / 1000),
        access=Access(api_keys=_api_keys(args.api_key or []), cors_origins=tuple(args.cors_origin)),
        remote_images=RemoteImages(hosts=tuple(args.allow_remote_images)),
    )


def _limit(args: argparse.Namespace, name: str) -> Any:
    """The value of an option of `Limits`, in the option's own unit."""
    if name not in UNITS:
        return getattr(args, name)
    argument, unit = UNITS[name]
    value = getattr(args, argument)
    if not 1 <= value * unit < 2**63:
        raise OptionError(Option(argument), f" is {value:g}; it must be above 0")
    return int(value * unit)


def _api_keys(given: Sequence[str]) -> tuple[str, ...]:
    """The keys of --api-key and of the environment. An empty one is an error and never an open server."""
    keys = [("--api-key", key) for key in given]
    if "MINIVLM2VEC_API_KEY" in os.environ:
        keys.append(("MINIVLM2VEC_API_KEY", os.environ["MINIVLM2VEC_API_KEY"]))
    for name, key in keys:
        if not key.strip():
            raise ValueError(f"{name} is empty; give a key, or leave it out for a server that needs none")
    return tuple(key for _, key in keys)


def default_name(model: str) -> str:
    """A folder is served under its own name, not under its path."""
    return os.path.basename(os.path.abspath(model)) if os.path.isdir(model) else model
