"""An OpenAI-compatible embeddings server: `minivlm2vec serve MODEL` (extra `serve`).

app       HTTP: routes, keys, limits, OpenAI's error shape
service   a request's way: inputs -> plans -> jobs -> vectors
batching  jobs of all requests -> packs for the model's one thread
images    data URIs and, where allowed, http(s) -> opened images
"""
