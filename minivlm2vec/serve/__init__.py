"""An OpenAI-compatible embeddings server, for any ASGI server (extra `serve`).

    app = create_app(embedder, ServeOptions(names=("vlm2vec",), limits=Limits(max_inputs=256)))

options    what a server can be told
app        HTTP: routes, keys, OpenAI's error shape
schema     what a request and an answer look like
inputs     request -> its inputs, checked
planning   inputs -> tokens and sizes
remote     http(s) URLs of images -> bytes
decoding   bytes of images -> sizes and crops, in processes (decoder_process) that can be killed
limiter    what is in flight, and the 429s
service    a request's way through all of these
batching   jobs of all requests -> batches for the model's one thread
tasks      /v1/classify, /v1/rerank, /v1/score, with task_schema and task_inputs, around the same service
server     uvicorn, with a drain and bounded headers: what `minivlm2vec serve` runs
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .app import create_app
    from .options import Access, Batching, Limits, RemoteImages, ServeOptions

__all__ = ["Access", "Batching", "Limits", "RemoteImages", "ServeOptions", "create_app"]
_HOMES = {name: "app" if name == "create_app" else "options" for name in __all__}

__getattr__ = lazy_names(__name__, _HOMES)  # the options need neither torch nor the extra
