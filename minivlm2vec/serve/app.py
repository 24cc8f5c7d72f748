"""The HTTP side: routes, keys, limits, and every error in OpenAI's shape."""

import asyncio
import base64
import hmac
import logging
import time
import uuid
from collections.abc import Sequence
from contextlib import asynccontextmanager, suppress
from hashlib import sha256

import numpy as np
import orjson
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .. import __version__
from . import metrics, schema
from .errors import APIError, bad_request, busy
from .service import Service

log = logging.getLogger("minivlm2vec.serve")

DESCRIPTION = "Text and images to vectors with VLM2Vec: OpenAI's embeddings API, with vLLM's `messages` for images."
ERRORS = {
    400: "The request is at fault",
    401: "The API key is missing or wrong",
    403: "The host of a remote image is not allowed",
    404: "No such model",
    408: "The body did not come in time",
    413: "The body is too large",
    429: "The queue is full; see Retry-After",
    500: "The model failed",
    503: "The model is broken",
    504: "Not finished in time",
}


def create_app(service: Service, *, api_keys: Sequence[str] = ()) -> FastAPI:
    """The ASGI application. Starts and stops the service with its lifespan.

    api_keys: /v1 needs one of them as a bearer token; none: it is open.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        await service.start()
        yield
        await service.stop()

    app = FastAPI(title="minivlm2vec", description=DESCRIPTION, version=__version__, lifespan=lifespan, redoc_url=None)
    app.state.service, app.state.draining = service, False
    app.add_middleware(Courtesy, state=app.state)
    _add_errors(app)
    _add_probes(app, service)
    _add_models(app, service, _guard(api_keys))
    _add_embeddings(app, service, _guard(api_keys))
    return app


class Courtesy:
    """ASGI middleware: an id for every answer and, while the server drains, word that the connection ends."""

    def __init__(self, app, state):
        self.inner, self.state = app, state

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.inner(scope, receive, send)
        scope["request_id"] = uuid.uuid4().hex

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                message["headers"].append((b"x-request-id", scope["request_id"].encode()))
                if self.state.draining:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        await self.inner(scope, receive, send_with_headers)


class House:
    """The requests that are being answered, and the bytes of their bodies."""

    def __init__(self, service: Service):
        self.service, self.limits = service, service.limits
        self.requests = self.bytes = 0

    def check_room(self) -> None:
        if self.requests >= self.limits.max_requests:
            raise busy(f"{self.requests} requests are being answered already; try again later", self.service.delay)
        self.service.check_room()

    async def read(self, request: Request) -> bytes:
        """The body. Raises APIError 413 and 429."""
        if int(request.headers.get("content-length", 0)) > self.limits.max_body_bytes:
            raise self._too_large()
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                self.bytes += len(chunk)
                if len(body) > self.limits.max_body_bytes:
                    raise self._too_large()
                if self.bytes > 16 * self.limits.max_body_bytes:
                    raise busy("the bodies of other requests fill the memory; try again later", self.service.delay)
        finally:
            self.bytes -= len(body)
        return bytes(body)

    def _too_large(self) -> APIError:
        # The rest of the body is not read: the connection ends with the answer.
        message = f"the body is larger than the {self.limits.max_body_bytes:,} bytes that this server takes"
        return APIError(413, message, code="request_too_large", headers={"connection": "close"})


def _guard(api_keys: Sequence[str]):
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


def _add_embeddings(app: FastAPI, service: Service, guard) -> None:
    house = House(service)
    answers = {status: {"model": schema.ErrorResponse, "description": text} for status, text in ERRORS.items()}

    @app.post("/v1/embeddings", dependencies=[Depends(guard)], responses=answers, openapi_extra=_request_body(),
              response_model=schema.EmbeddingResponse, summary="Embed texts and images", tags=["v1"])  # fmt: skip
    async def embeddings(request: Request) -> Response:
        start, status = time.perf_counter(), 500
        try:
            house.check_room()
            house.requests += 1
            service.metrics.in_flight.inc()
            try:
                response = await _answer(house, service, request)
            finally:
                house.requests -= 1
                service.metrics.in_flight.dec()
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
            service.metrics.requests.labels(status).inc()

    _describe_bodies(app)


async def _answer(house: House, service: Service, request: Request) -> Response:
    """The response, within the time a request has, unless its client goes away."""
    timeout = house.limits.request_timeout
    end = time.monotonic() + timeout
    try:
        body = await asyncio.wait_for(house.read(request), timeout)
    except asyncio.TimeoutError:
        message = f"the body did not come within {timeout:g} s"
        raise APIError(408, message, code="request_timeout", headers={"connection": "close"}) from None
    work = asyncio.ensure_future(_embed(service, body, request.scope["request_id"]))
    gone = asyncio.ensure_future(_until_disconnect(request))
    try:
        await asyncio.wait({work, gone}, timeout=end - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        if gone.done():
            raise ClientDisconnect
        raise APIError(504, f"not finished within {timeout:g} s", code="request_timeout")
    finally:
        for task in (work, gone):
            task.cancel()
        with suppress(asyncio.CancelledError, APIError):
            await work


async def _until_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _embed(service: Service, body: bytes, request_id: str) -> Response:
    parsed = schema.parse(body)
    model = service.model_name(parsed.model)
    vectors, tokens = await service.embed(parsed)
    as_base64 = parsed.encoding_format == "base64"
    if vectors.size > 1 << 17:  # some tenths of a second for the largest
        data = await asyncio.get_running_loop().run_in_executor(None, _embeddings, vectors, as_base64)
    else:
        data = _embeddings(vectors, as_base64)
    answer = {
        "id": f"embd-{request_id}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return Response(orjson.dumps(answer), media_type="application/json")


def _embeddings(vectors: np.ndarray, as_base64: bool) -> list[dict]:
    if as_base64:
        encoded = [base64.b64encode(v.astype("<f4").tobytes()).decode() for v in vectors]
    else:
        encoded = [orjson.Fragment(orjson.dumps(np.ascontiguousarray(v), option=orjson.OPT_SERIALIZE_NUMPY))
                   for v in vectors]  # fmt: skip
    return [{"object": "embedding", "index": i, "embedding": e} for i, e in enumerate(encoded)]


def _add_models(app: FastAPI, service: Service, guard) -> None:
    created = int(time.time())
    errors = {401: {"model": schema.ErrorResponse}, 404: {"model": schema.ErrorResponse}}

    def describe(name: str) -> schema.Model:
        return schema.Model(
            id=name, object="model", created=created, owned_by="minivlm2vec", tokenizer=service.tokenizer,
            max_model_len=service.limits.max_input_tokens, dimensions=service.embedder.dimension,
        )  # fmt: skip

    @app.get("/v1/models", dependencies=[Depends(guard)], responses={401: errors[401]}, tags=["v1"])
    async def models() -> schema.ModelList:
        return schema.ModelList(object="list", data=[describe(name) for name in service.names])

    @app.get("/v1/models/{model:path}", dependencies=[Depends(guard)], responses=errors, tags=["v1"])
    async def model(model: str) -> schema.Model:
        return describe(service.model_name(model))


def _add_probes(app: FastAPI, service: Service) -> None:
    unwell = {503: {"model": schema.ErrorResponse}}

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
        # ASCII, since a message may quote what a caller sent
        return Response(orjson.dumps(error.body), error.status, error.headers, media_type="application/json")

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


def _request_body() -> dict:
    reference = {"$ref": "#/components/schemas/EmbeddingRequest"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def _describe_bodies(app: FastAPI) -> None:
    """The endpoint reads its body itself, so the document does not know the body's schema by itself."""
    generate = app.openapi

    def openapi() -> dict:
        if app.openapi_schema is None:
            document = generate()
            request = schema.EmbeddingRequest.model_json_schema(ref_template="#/components/schemas/{model}")
            document["components"]["schemas"] |= request.pop("$defs") | {"EmbeddingRequest": request}
        return app.openapi_schema

    app.openapi = openapi
