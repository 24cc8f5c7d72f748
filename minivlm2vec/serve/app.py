"""The HTTP side: routes, keys, and every error in OpenAI's shape."""

import asyncio
import base64
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import __version__
from ..embedder import Embedder
from . import metrics, schema
from .errors import APIError, BodyTooLarge, bad_request
from .limiter import InFlight
from .options import ServeOptions
from .service import EmbeddingService
from .task_schema import (
    ClassifyRequest,
    ClassifyResponse,
    RerankRequest,
    RerankResponse,
    ScoreRequest,
    ScoreResponse,
)
from .tasks import Tasks

log = logging.getLogger("minivlm2vec.serve")

DESCRIPTION = (
    "Text and images to vectors with VLM2Vec: OpenAI's embeddings API, with vLLM's `messages` for images; and what the "
    "vectors are for: classifying, reranking, scoring."
)
LINGER_SECONDS, LINGER_BYTES = 10.0, 1 << 30  # for a refused body
INLINE_BYTES = 64 << 10  # bodies up to here are parsed in the event loop: a thread would cost more
ERRORS = {
    400: "The request is at fault",
    401: "The API key is missing or wrong",
    403: "The host of a remote image is not allowed",
    404: "No such model",
    408: "The body did not come in time",
    413: "The body is too large",
    415: "The body is compressed",
    429: "The queue is full; see Retry-After",
    500: "The model failed",
    503: "The model is broken",
    504: "Not finished in time",
}

REQUESTS: tuple[type[BaseModel], ...] = (schema.EmbeddingRequest, ClassifyRequest, RerankRequest, ScoreRequest)
Guard = Callable[..., Awaitable[None]]
Answer = Callable[[Any], Awaitable[dict[str, Any]]]
Responses = dict[int | str, dict[str, Any]]


def create_app(embedder: Embedder | str | Path, options: ServeOptions | None = None) -> FastAPI:
    """The ASGI application, for any ASGI server.

    Its lifespan starts the model's thread, warms the model up, and finishes what waits when it ends, so the server
    must run the lifespan (uvicorn does; an app that mounts this one must enter `app.router.lifespan_context`).
    From then on the embedder belongs to the app. Set `app.state.draining` to True to turn /ready to 503.

    embedder: the model, or the folder or name that `Embedder.from_pretrained` loads it from.
    """
    if isinstance(embedder, str | Path):
        embedder = Embedder.from_pretrained(embedder)
    if not isinstance(embedder, Embedder):
        raise TypeError(f"create_app serves an Embedder, or a folder or name of one; got {type(embedder).__name__}")
    return app_of(EmbeddingService(embedder, options))


def app_of(service: EmbeddingService) -> FastAPI:
    """The application around a service."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = _Application(
        title="minivlm2vec", description=DESCRIPTION, version=__version__, lifespan=lifespan, redoc_url=None
    )
    app.state.service, app.state.draining = service, False
    access = service.options.access
    app.add_middleware(HeadMiddleware)
    if access.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(DrainMiddleware, state=app.state)
    app.add_middleware(RequestIdMiddleware)
    guard = _guard(access.api_keys)
    _add_errors(app)
    _add_probes(app, service)
    _add_models(app, service, guard)
    for endpoint in _endpoints(service):
        _add_endpoint(app, service, guard, endpoint)
    return app


class _Application(FastAPI):
    """FastAPI, and the schemas of the bodies that the endpoints read by themselves."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            for kind in REQUESTS:
                request = kind.model_json_schema(ref_template="#/components/schemas/{model}")
                document["components"]["schemas"] |= request.pop("$defs") | {kind.__name__: request}
        assert self.openapi_schema is not None
        return self.openapi_schema


class RequestIdMiddleware:
    """Gives every answer an id in x-request-id; `scope["request_id"]` holds it."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["request_id"] = uuid.uuid4().hex
            header = (b"x-request-id", scope["request_id"].encode())
            send = _adding(send, lambda: [header])
        await self.app(scope, receive, send)


class DrainMiddleware:
    """While the server drains, every answer says that its connection ends."""

    def __init__(self, app: ASGIApp, state: Any):
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            send = _adding(send, lambda: [(b"connection", b"close")] if self.state.draining else [])
        await self.app(scope, receive, send)


class HeadMiddleware:
    """Answers HEAD as GET; the ASGI server leaves out the body."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self.app(scope, receive, send)


class RefusedBodyResponse(Response):
    """An answer to a body that is still coming: sent at once, and the connection ends only when the client has
    stopped sending (or has sent much more). A connection that ends with unread bytes is reset, and the client would
    lose the answer."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [*self.raw_headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        if "100-continue" not in Headers(scope=scope).get("expect", "").lower():  # else nothing comes unless asked for
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(_discard(receive), LINGER_SECONDS)
        await send({"type": "http.response.body", "body": b""})


async def _discard(receive: Receive) -> None:
    size, more = 0, True
    while more and size < LINGER_BYTES:
        message = await receive()
        size += len(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)


def _adding(send: Send, headers: Callable[[], list[tuple[bytes, bytes]]]) -> Send:
    """`send`, with more headers at the start of the answer."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"].extend(headers())
        await send(message)

    return send_with_headers


def _guard(api_keys: Sequence[str]) -> Guard:
    """A dependency that lets only the holders of a key pass."""
    digests = [sha256(key.encode()).digest() for key in api_keys]
    bearer = Depends(HTTPBearer(auto_error=False, description="only where the server was started with --api-key"))

    async def check(request: Request, _=bearer) -> None:  # the second for the OpenAPI document alone
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = sha256(key.strip().encode("latin-1")).digest()
        right = [hmac.compare_digest(given, digest) for digest in digests]  # all of them, in constant time
        if digests and not (any(right) and scheme.lower() == "bearer"):
            raise APIError(
                401, "the API key is missing or wrong", code="invalid_api_key", headers={"www-authenticate": "Bearer"}
            )

    return check


@dataclass(frozen=True)
class Endpoint:
    """A POST: its paths (the first is documented), what it takes and gives, and what answers a request (all but id,
    created and model)."""

    paths: tuple[str, ...]
    request: type[BaseModel]
    response: type[BaseModel]
    prefix: str
    answer: Answer
    summary: str


def _endpoints(service: EmbeddingService) -> list[Endpoint]:
    tasks = Tasks(service)
    embed = partial(_embed, service)
    return [
        Endpoint(("/v1/embeddings",), schema.EmbeddingRequest, schema.EmbeddingResponse, "embd", embed,
                 "Embed texts and images"),
        Endpoint(("/v1/classify", "/classify"), ClassifyRequest, ClassifyResponse, "classify",
                 _of_task(tasks.classify), "The nearest labels of images"),
        Endpoint(("/v1/rerank", "/v2/rerank", "/rerank"), RerankRequest, RerankResponse, "rerank",
                 _of_task(tasks.rerank), "Documents by their nearness to a query"),
        Endpoint(("/v1/score", "/score"), ScoreRequest, ScoreResponse, "score", _of_task(tasks.score),
                 "Cosines of pairs"),
    ]  # fmt: skip


def _of_task(function: Callable[[Any], Awaitable[tuple[dict[str, Any], int]]]) -> Answer:
    async def answer(request: Any) -> dict[str, Any]:
        found, tokens = await function(request)
        return found | {"usage": _usage(tokens)}

    return answer


def _add_endpoint(app: FastAPI, service: EmbeddingService, guard: Guard, endpoint: Endpoint) -> None:
    answers: Responses = {
        status: {"model": schema.ErrorResponse, "description": text} for status, text in ERRORS.items()
    }

    async def post(request: Request) -> Response:
        start, status = time.perf_counter(), 500
        try:
            with service.limiter.body(request) as held:
                response = await _answer(service, endpoint, request, held)
            status = response.status_code
            service.metrics.request_seconds.observe(time.perf_counter() - start)
            return response
        except APIError as e:
            status = e.status
            raise
        except ClientDisconnect:
            status = 499  # nobody reads it
            service.metrics.disconnects.inc()
            return Response(status_code=499)
        finally:
            service.metrics.requests.labels(endpoint.paths[0], status).inc()

    for path in endpoint.paths:
        app.post(path, dependencies=[Depends(guard)], responses=answers, openapi_extra=_request_body(endpoint.request),
                 response_model=endpoint.response, summary=endpoint.summary, tags=["v1"],
                 include_in_schema=path == endpoint.paths[0])(post)  # fmt: skip


async def _answer(service: EmbeddingService, endpoint: Endpoint, request: Request, held: InFlight) -> Response:
    """The response, within the time that a request has, unless its client goes away."""
    if request.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        raise APIError(415, "the body is compressed; send it as it is", code="unsupported_content_encoding")
    timeout = service.limits.request_timeout
    end = time.monotonic() + timeout
    try:
        body = await asyncio.wait_for(service.limiter.read_body(request, held), timeout)
    except asyncio.TimeoutError:
        message = f"the body did not come within {timeout:g} s"
        raise APIError(408, message, code="request_timeout", headers={"connection": "close"}) from None
    with service.limiter.request(body):
        return await _answer_until(end, service, endpoint, body, request)


async def _answer_until(
    end: float, service: EmbeddingService, endpoint: Endpoint, body: bytes, request: Request
) -> Response:
    work = asyncio.ensure_future(_work(service, endpoint, body, request.scope["request_id"]))
    gone = asyncio.ensure_future(_until_disconnect(request))
    try:
        await asyncio.wait({work, gone}, timeout=end - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        if gone.done():
            raise ClientDisconnect
        raise APIError(504, f"not finished within {service.limits.request_timeout:g} s", code="request_timeout")
    finally:
        work.cancel()
        gone.cancel()
        with suppress(asyncio.CancelledError, APIError):
            await work


async def _until_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _work(service: EmbeddingService, endpoint: Endpoint, body: bytes, request_id: str) -> Response:
    parsed: Any
    if len(body) <= INLINE_BYTES:
        parsed = schema.parse(body, endpoint.request)
    else:
        parsed = await service.in_thread(schema.parse, body, endpoint.request)
    model = service.reader.model_name(parsed.model)
    found = await endpoint.answer(parsed)
    head = {"id": f"{endpoint.prefix}-{request_id}", "object": "list", "created": int(time.time()), "model": model}
    return Response(orjson.dumps(head | found), media_type="application/json")


async def _embed(service: EmbeddingService, request: schema.EmbeddingRequest) -> dict[str, Any]:
    vectors, tokens = await service.embed(request)
    as_base64 = request.encoding_format == "base64"
    if vectors.size > 1 << 17:  # some tenths of a second for the largest
        data = await service.in_thread(_embeddings, vectors, as_base64)
    else:
        data = _embeddings(vectors, as_base64)
    return {"data": data, "usage": _usage(tokens)}


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _embeddings(vectors: np.ndarray, as_base64: bool) -> list[dict[str, Any]]:
    encode = _base64 if as_base64 else _numbers
    return [{"object": "embedding", "index": i, "embedding": encode(v)} for i, v in enumerate(vectors)]


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _numbers(vector: np.ndarray) -> orjson.Fragment:
    return orjson.Fragment(orjson.dumps(np.ascontiguousarray(vector), option=orjson.OPT_SERIALIZE_NUMPY))


def _add_models(app: FastAPI, service: EmbeddingService, guard: Guard) -> None:
    created = int(time.time())
    denied: Responses = {401: {"model": schema.ErrorResponse}}
    unknown: Responses = {404: {"model": schema.ErrorResponse}}

    def describe(name: str) -> schema.Model:
        return schema.Model(
            id=name, object="model", created=created, owned_by="minivlm2vec", tokenizer=service.tokenizer,
            max_model_len=service.max_input_tokens, dimensions=service.embedder.dimension,
        )  # fmt: skip

    @app.get("/v1/models", dependencies=[Depends(guard)], responses=denied, tags=["v1"])
    async def models() -> schema.ModelList:
        return schema.ModelList(object="list", data=[describe(name) for name in service.names])

    @app.get("/v1/models/{model:path}", dependencies=[Depends(guard)], responses=denied | unknown, tags=["v1"])
    async def model(model: str) -> schema.Model:
        return describe(service.reader.model_name(model))


def _add_probes(app: FastAPI, service: EmbeddingService) -> None:
    unwell: Responses = {503: {"model": schema.ErrorResponse}}

    def check(*reasons: str | None) -> schema.Status:
        for reason in filter(None, reasons):
            raise APIError(503, reason, code="not_ready")
        return schema.Status(status="ok")

    @app.get("/health", responses=unwell, tags=["probes"], summary="Does the model work?")
    async def health() -> schema.Status:
        return check(service.batcher.broken)

    @app.get("/ready", responses=unwell, tags=["probes"], summary="Should new requests come here?")
    async def ready() -> schema.Status:
        return check(service.batcher.broken, "the server is shutting down" if app.state.draining else None)

    @app.get("/metrics", tags=["probes"], summary="For Prometheus", response_class=Response,
             responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})  # fmt: skip
    async def render() -> Response:
        return Response(service.metrics.render(), media_type=metrics.CONTENT_TYPE)


def _add_errors(app: FastAPI) -> None:
    def answer(error: APIError) -> Response:
        kind = RefusedBodyResponse if isinstance(error, BodyTooLarge) else Response
        return kind(orjson.dumps(error.body), error.status, error.headers, media_type="application/json")

    @app.exception_handler(APIError)
    async def api_error(request: Request, e: APIError) -> Response:
        return answer(e)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, e: HTTPException) -> Response:
        known = {404: ("no such path", "not_found"), 405: ("this path has another method", "method_not_allowed")}
        message, code = known.get(e.status_code, (str(e.detail), None))
        return answer(APIError(e.status_code, message, code=code, headers=dict(e.headers or {})))

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, e: RequestValidationError) -> Response:
        return answer(bad_request("a parameter of the path or the query is wrong"))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, e: Exception) -> Response:
        return answer(APIError(500, "an error of the server; its log says more", code="internal_error"))


def _request_body(request: type[BaseModel]) -> dict:
    reference = {"$ref": f"#/components/schemas/{request.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}
