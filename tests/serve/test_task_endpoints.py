"""/v1/classify, /v1/rerank, /v1/score through HTTP: equality with `minivlm2vec.tasks`, shapes, errors, limits."""

import base64
import json

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from minivlm2vec import tasks
from minivlm2vec.prompts import Task
from minivlm2vec.serve import Access, Limits, RemoteImages, ServeOptions, create_app
from minivlm2vec.serve.app import app_of
from minivlm2vec.serve.service import EmbeddingService
from tests.support.serving import Answer, call, data_uri, picture, running, wait_for

TOLERANCE = 2e-6  # float32; packs differ, so sums are in another order
LABELS = ["a cat", "a dog", "a red bicycle", "ünïcode 🐈", "x", "y", "z"]


@pytest.fixture(scope="module")
def url(embedder):
    options = ServeOptions(names=("tiny",), limits=Limits(max_body_bytes=4 << 20))
    with running(create_app(embedder, options)) as server:
        yield server.url


@pytest.fixture(scope="module")
def images():
    return [picture(90, 60, seed) for seed in range(4)]


def png(image) -> bytes:
    return base64.b64decode(data_uri(image).partition(",")[2])


def part(image) -> dict:
    return {"type": "image_url", "image_url": {"url": data_uri(image)}}


def classify(url: str, **body) -> Answer:
    return call(url, "/v1/classify", body)


def rerank(url: str, **body) -> Answer:
    return call(url, "/v1/rerank", body)


def score(url: str, **body) -> Answer:
    return call(url, "/v1/score", body)


def refused(answer: Answer, status: int, param: str | None = None, code: str | None = None) -> str:
    assert answer.status == status, answer.body
    assert answer.error["param"] == param, answer.error
    assert code is None or answer.error["code"] == code, answer.error
    return answer.error["message"]


def close(a, b) -> None:
    assert np.shape(a) == np.shape(b)
    assert np.abs(np.asarray(a) - np.asarray(b)).max() <= TOLERANCE


# --------------------------------------------------------------------------------------------------------- classify


def assert_classified(answer: Answer, expected: list[tasks.Classification]) -> None:
    assert answer.status == 200, answer.body
    data = answer.json["data"]
    assert [row["index"] for row in data] == list(range(len(expected)))
    for row, one in zip(data, expected, strict=True):
        assert row["object"] == "classification" and set(row) == {
            "object",
            "index",
            "prediction",
            "score",
            "predictions",
        }
        assert [x["label"] for x in row["predictions"]] == [x.text for x in one.labels]
        assert row["prediction"] == one.label and row["score"] == row["predictions"][0]["score"]
        close([x["cosine"] for x in row["predictions"]], [x.score for x in one.labels])
        assert np.allclose([x["score"] for x in row["predictions"]], [x.probability for x in one.labels], atol=1e-3)


def test_classify_is_that_of_the_library(url, embedder, images):
    items = [{"image": data_uri(image)} for image in images]
    answer = classify(url, model="tiny", input=items, labels=LABELS)
    assert_classified(answer, tasks.classify(embedder, images, LABELS))
    assert (
        answer.json["object"] == "list" and answer.json["model"] == "tiny" and answer.json["id"].startswith("classify-")
    )
    assert answer.json["usage"]["total_tokens"] == answer.json["usage"]["prompt_tokens"] > 4 * 13
    assert len(answer.json["data"][0]["predictions"]) == 5
    every = classify(url, input=items, labels=LABELS, top_n=0).json["data"][0]["predictions"]
    assert len(every) == 7 and sum(x["score"] for x in every) == pytest.approx(1)
    assert_classified(
        classify(url, input=items, labels=LABELS, top_n=10**30, instruction="classify_scene"),
        tasks.classify(embedder, images, LABELS, top=7, instruction="classify_scene"),
    )
    templates = ["{}", "a photo of {}"]
    assert_classified(
        classify(url, input=items[:1], labels=LABELS, template=templates, instruction=None),
        tasks.classify(embedder, images[:1], LABELS, template=templates),
    )
    assert_classified(
        classify(url, input=items[0], labels=LABELS[:2], template="a {}", top_n=1),
        tasks.classify(embedder, images[:1], LABELS[:2], template="a {}", top=1),
    )


def test_classify_takes_an_image_with_a_text(url, embedder, images):
    expected = tasks.classify(embedder, [{"image": images[0], "text": "news"}], LABELS, instruction="classify_news")
    for item in (
        {"image": data_uri(images[0]), "text": "news"},
        {"content": [part(images[0]), {"type": "text", "text": "news"}]},
    ):
        assert_classified(classify(url, input=[item], labels=LABELS, instruction="classify_news"), expected)
    answer = classify(url, input=[part(images[0])], labels=LABELS, instruction="classify_news")
    assert "has no text, and the instruction" in refused(answer, 400, "input[0]")
    own = {"query": "Look: {text}!", "document": "It is {text}"}
    assert_classified(
        classify(url, input=[part(images[0])], labels=LABELS, instruction={**own, "query": "Look:"}),
        tasks.classify(embedder, images[:1], LABELS, instruction=Task("Look:", "It is {text}")),
    )
    answer = classify(url, input=["a text"], labels=LABELS)
    assert 'input[0] has no image, and the instruction is for one; instruction "none"' in refused(
        answer, 400, "input[0]"
    )
    answer = classify(url, input=["a text"], labels=LABELS, instruction="none")
    close([x["cosine"] for x in answer.json["data"][0]["predictions"]],
          sorted(embedder.similarity(embedder.encode("a text"), embedder.encode(LABELS))[0])[::-1][:5])  # fmt: skip


@pytest.mark.parametrize(("change", "param", "message"), [
    ({"labels": []}, "labels", "labels: none is given; 2 are needed"),
    ({"labels": ["a"]}, "labels", "only 'a' is given; 2 are needed at least"),
    ({"labels": ["a", "b", "a"]}, "labels", "label 2: 'a' is label 0 too"),
    ({"labels": ["a", " "]}, "labels", "label 1: is empty"),
    ({"labels": ["a", 3]}, "labels[1]", "valid string"),
    ({"labels": "a"}, "labels", "valid list"), ({"labels": None}, "labels", "valid list"),
    ({"labels": ["x"] * 100_000}, "labels", "at most 2048"),
    ({"input": []}, "input", "at least 1 item"), ({"input": ""}, "input", "neither text nor image"),
    ({"input": [{}]}, "input[0]", "neither text nor image"), ({"input": 3}, "input", "an item is a string"),
    ({"input": [None]}, "input[0]", "an item is a string"), ({"input": [[]]}, "input[0]", "an item is a string"),
    ({"template": "no place"}, "template", "has no {} for the label"), ({"template": []}, "template", "at least 1"),
    ({"template": ["{}"] * 64, "labels": [str(i) for i in range(100)]}, "template", "6400 labels times templates"),
    ({"template": "{}" * 1000, "labels": ["a" * 5000, "b"]}, "template", "characters; this server takes"),
    ({"template": "a" * 3_000_000 + "{}"}, "template", "characters; this server takes"),
    ({"labels": ["a", "b" * 100_000]}, "labels[1]", "characters are more than the"),
    ({"top_n": -1}, "top_n", "greater than or equal to 0"), ({"top_n": 1.5}, "top_n", "valid integer"),
    ({"top_n": True}, "top_n", "valid integer"), ({"top_n": "5"}, "top_n", "valid integer"),
    ({"instruction": "clasify"}, "instruction", "instruction is no task; there are classify,"),
    ({"instruction": {"query": 3}}, "instruction.query", "valid string"),
    ({"instruction": {}}, "instruction.query", "missing field"),
    ({"instruction": {"query": "a" * 5000}}, "instruction.query", "at most 4096"),
    ({"colour": 1}, "colour", "unknown field"),
    ({"mm_processor_kwargs": {"num_crops": 999}}, "mm_processor_kwargs.num_crops", "takes at most 16"),
])  # fmt: skip
def test_bad_classifications_are_named(url, images, change, param, message):
    body = {"input": [{"image": data_uri(images[0])}], "labels": ["a", "b"]} | change
    assert message in refused(classify(url, **body), 400, param)


def test_missing_fields_and_models_are_named(url, images):
    refused(classify(url, labels=["a", "b"]), 400, "input", "missing_required_parameter")
    refused(classify(url, input=["a"]), 400, "labels", "missing_required_parameter")
    refused(rerank(url, query="a"), 400, "documents", "missing_required_parameter")
    refused(rerank(url, documents=["a"]), 400, "query", "missing_required_parameter")
    for path in ("/v1/classify", "/v1/rerank", "/v1/score"):
        refused(call(url, path, b"[]"), 400, code="invalid_json")
        refused(call(url, path, b"{"), 400, code="invalid_json")
        refused(call(url, path), 405)
    refused(rerank(url, model="other", query="a", documents=["b"]), 404, "model", "model_not_found")


def test_many_predictions_are_refused_before_anything_is_computed(url):
    items, labels = ["a"] * 1000, [str(i) for i in range(1000)]
    answer = classify(url, input=items, labels=labels, top_n=0, instruction="none")
    assert "1000 inputs times 1000 labels (top_n) are more than the 65,536" in refused(answer, 400, "top_n")


# ----------------------------------------------------------------------------------------------------------- rerank


def test_rerank_is_that_of_the_library(url, embedder, images):
    documents = [{"image": data_uri(images[0])}, "a red bicycle", {"image": data_uri(images[1]), "text": "a cat"},
                 {"content": [part(images[2])]}, part(images[3]), {"text": "a dog"}, {"content": "x"},
                 {"type": "text", "text": "y"}]  # fmt: skip
    candidates = [images[0], "a red bicycle", {"image": images[1], "text": "a cat"}, images[2], images[3], "a dog", "x",
                  "y"]  # fmt: skip
    for options in ({}, {"instruction": "wikipedia"}, {"instruction": "none"}):
        expected = tasks.rank(embedder, "a cat", candidates, **options
                              if options.get("instruction") != "none" else {"instruction": None})  # fmt: skip
        answer = rerank(url, model="tiny", query="a cat", documents=documents, **options)
        assert answer.status == 200, answer.body
        results = answer.json["results"]
        assert [r["index"] for r in results] == [hit.index for hit in expected.hits]
        close([r["relevance_score"] for r in results], [hit.score for hit in expected.hits])
    assert answer.json["usage"]["total_tokens"] > 0 and answer.json["model"] == "tiny"
    top = rerank(url, query="a cat", documents=documents, top_n=3).json["results"]
    assert [r["index"] for r in top] == [hit.index for hit in tasks.rank(embedder, "a cat", candidates, top=3).hits]
    for every in (0, None, 8, 9, 10**400):
        assert len(rerank(url, query="a cat", documents=documents, top_n=every).json["results"]) == 8


def test_a_query_may_be_an_image(url, embedder, images):
    texts = ["a cat", "a dog"]
    expected = tasks.rank(embedder, images[0], texts, instruction="i2t")
    for query in ({"image": data_uri(images[0])}, {"content": [part(images[0])]}, part(images[0])):
        results = rerank(url, query=query, documents=texts, instruction="i2t").json["results"]
        close([r["relevance_score"] for r in results], [hit.score for hit in expected.hits])
    message = refused(rerank(url, query={"image": data_uri(images[0])}, documents=texts), 400, "query")
    assert "has no text, and the instruction 'Find me an everyday image" in message and "`instruction` names" in message
    both = {"content": [part(images[0]), {"type": "text", "text": "what?"}]}
    expected = tasks.rank(embedder, {"image": images[0], "text": "what?"}, texts, instruction="vqa")
    results = rerank(url, query=both, documents=texts, instruction="vqa").json["results"]
    close([r["relevance_score"] for r in results], [hit.score for hit in expected.hits])


def test_images_between_texts_stay_where_they_are(url, embedder, images):
    mixed = {"content": [{"type": "text", "text": "first"}, part(images[0]), {"type": "text", "text": "then"},
                         part(images[1])]}  # fmt: skip
    item = {"text": "Find: first <|image_1|> then <|image_2|>!", "images": images[:2]}
    answer = score(
        url, text_1=mixed["content"][0], text_2=[mixed], instruction={"query": "a", "document": "Find: {text}!"}
    )
    close(answer.json["data"][0]["score"], embedder.similarity(embedder.encode("afirst"), embedder.encode(item))[0, 0])
    two = {"content": [part(images[0]), part(images[1]), {"type": "text", "text": "then"}]}
    answer = score(url, text_1="a", text_2=[two])
    expected = embedder.encode({"text": "then", "images": images[:2]})
    close(answer.json["data"][0]["score"], embedder.similarity(embedder.encode("a"), expected)[0, 0])


def test_documents_come_back_as_they_were_asked_for(url, images):
    image = {"image": data_uri(images[0]), "text": "t"}
    content = {"content": [part(images[1])]}
    documents = ["a", {"text": "b"}, image, content]
    by_index = {
        asked: {
            r["index"]: r.get("document") for r in rerank(url, query="q", documents=documents, **more).json["results"]
        }
        for asked, more in ((None, {}), (True, {"return_documents": True}), (False, {"return_documents": False}))
    }
    assert by_index[None] == {0: {"text": "a"}, 1: {"text": "b"}, 2: None, 3: None}
    assert by_index[True] == {0: {"text": "a"}, 1: {"text": "b"}, 2: image, 3: content}
    assert by_index[False] == {0: None, 1: None, 2: None, 3: None}


def test_max_tokens_cut_texts(url, embedder):
    long = "a" * 300
    answer = rerank(url, query=long, documents=[long, "b"], max_tokens_per_query=5, max_tokens_per_doc=9,
                    instruction="none")  # fmt: skip
    query, document = embedder.encode(long, max_length=5), embedder.encode(long, max_length=9)
    found = {r["index"]: r["relevance_score"] for r in answer.json["results"]}
    close(found[0], embedder.similarity(query, document)[0, 0])
    assert answer.json["usage"]["total_tokens"] == 5 + 9 + len(embedder.plan("b"))
    every = rerank(url, query="a", documents=[long], max_tokens_per_doc=0, instruction="none", truncate_prompt_tokens=0)
    assert every.json["usage"]["total_tokens"] == len(embedder.plan("a")) + len(embedder.plan(long))
    short = rerank(url, query="a", documents=[long], truncate_prompt_tokens=2, instruction="none")
    assert short.json["usage"]["total_tokens"] == 4


@pytest.mark.parametrize(("change", "param", "message"), [
    ({"documents": []}, "documents", "at least 1 item"),
    ({"documents": [""]}, "documents[0]", "neither text nor image"),
    ({"documents": ["a", " \n"]}, "documents[1]", "neither text nor image"),
    ({"documents": None}, "documents", "an item is a string"), ({"documents": 7}, "documents", "an item is a string"),
    ({"documents": ["a", None]}, "documents[1]", "an item is a string"),
    ({"documents": ["a", ["b"]]}, "documents[1]", "an item is a string"),
    ({"documents": ["a"] * 100_000}, "documents", "at most 2048"),
    ({"documents": [{"text": 3}]}, "documents[0].text", "valid string"),
    ({"documents": [{"image": 3}]}, "documents[0].image", "valid string"),
    ({"documents": [{"image": {"url": "data:,"}}]}, "documents[0].image", "valid string"),
    ({"documents": [{"image": "cat.jpg"}]}, "documents[0].image", "a data URI or an http(s) URL"),
    ({"documents": [{"image": "https://example.com/a.png"}]}, "documents[0].image", "fetches no remote images"),
    ({"documents": [{"image": "file:///etc/passwd"}]}, "documents[0].image", "a data URI or an http(s) URL"),
    ({"documents": [{"image": "data:image/png;base64,AAAA"}]}, "documents[0].image", "documents[0].image"),
    ({"documents": [{"title": "a"}]}, "documents[0].title", "unknown field"),
    ({"documents": [{"content": []}]}, "documents[0].content", "at least 1"),
    ({"documents": [{"content": [{"content": "a"}]}]}, "documents[0].content[0]", "type"),
    ({"documents": [{"content": 3}]}, "documents[0].content", "content is a string or a list of parts"),
    ({"documents": [{"content": [{"type": "video_url"}]}]}, "documents[0].content[0]", "type"),
    ({"documents": [{"type": "input_audio"}]}, "documents[0]", "an item is a string"),
    ({"documents": {"content": [{"type": "text", "text": "a"}] * 2}}, "documents", "send a list of items"),
    ({"query": ""}, "query", "neither text nor image"), ({"query": ["a"]}, "query", "an item is a string"),
    ({"query": {}}, "query", "neither text nor image"),
    ({"top_n": -1}, "top_n", "greater than or equal to 0"), ({"top_n": "3"}, "top_n", "valid integer"),
    ({"return_documents": "yes"}, "return_documents", "valid boolean"),
    ({"rank_fields": ["title"]}, "rank_fields[0]", "'text'"),
    ({"return_embeddings": True}, "return_embeddings", "False"),
    ({"max_tokens_per_doc": -5}, "max_tokens_per_doc", "greater than or equal to 0"),
])  # fmt: skip
def test_bad_rerankings_are_named(url, change, param, message):
    body = {"query": "a", "documents": ["a", "b"]} | change
    assert message in refused(rerank(url, **body), 400, param)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_in_json_is_refused(url, number):
    for place in ('"top_n": %s', '"documents": [%s]', '"query": %s', '"max_tokens_per_doc": %s'):
        body = '{"query": "a", "documents": ["a"], %s}' % (place % number)
        refused(call(url, "/v1/rerank", body.encode()), 400, code="invalid_json")
    assert call(url, "/v1/rerank", b'{"query": "a", "documents": ["a"], "top_n": 1e999}').status == 400


def test_deep_and_wide_bodies_are_refused(url):
    deep = json.loads("[" * 150 + "]" * 150)
    assert "an item is a string" in refused(rerank(url, query="a", documents=[deep]), 400, "documents[0]")
    wide = b'{"query": "a", "documents": [' + b",".join([b"{}"] * 70_000) + b"]}"
    refused(call(url, "/v1/rerank", wide), 400, code="too_many_values")
    fields = {f"f{i}": 0 for i in range(100)}
    assert "more than 64 fields" in refused(rerank(url, query="a", documents=[fields]), 400, "documents[0]")
    refused(call(url, "/v1/rerank", {"query": "a" * (5 << 20), "documents": ["b"]}), 413)
    refused(rerank(url, query="a", documents=["b" * 200_000]), 400, "documents[0]", "context_length_exceeded")
    own = {"query": "a", "document": "Read: {text}" * 100}
    assert rerank(url, query="{text}{text}", documents=["<|image_1|>"], instruction=own).status == 200


# ------------------------------------------------------------------------------------------------------------- score


def test_score_is_the_cosine_of_the_embeddings(url, embedder, images):
    a, b, c = embedder.encode(["A cat", "A dog", "x"])
    for first, second in (("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"), ("queries", "items")):
        answer = score(url, model="tiny", **{first: "A cat", second: ["A dog", "x", "A cat"]})
        assert [(row["index"], row["object"]) for row in answer.json["data"]] == [(i, "score") for i in range(3)]
        close([row["score"] for row in answer.json["data"]], embedder.similarity(a, np.stack([b, c, a]))[0])
        one = score(url, **{first: "A cat", second: "A dog"}).json["data"]
        close([row["score"] for row in one], [a @ b])
        pairs = score(url, **{first: ["A cat", "x"], second: ["x", "A dog"]}).json["data"]
        close([row["score"] for row in pairs], embedder.similarity_pairwise(np.stack([a, c]), np.stack([c, b])))
    assert answer.json["object"] == "list" and answer.json["id"].startswith("score-")
    image = embedder.encode(images[0])
    answer = score(url, queries={"content": [part(images[0])]}, documents=[{"image": data_uri(images[0])}, "A cat"])
    close([row["score"] for row in answer.json["data"]], [1, image @ a])
    answer = score(url, text_1="A cat", text_2={"image": data_uri(images[0])}, instruction="t2i")
    expected = tasks.rank(embedder, "A cat", [images[0]])
    close([row["score"] for row in answer.json["data"]], [hit.score for hit in expected.hits])


@pytest.mark.parametrize(("body", "param", "message"), [
    ({}, None, "one of these pairs is needed: text_1 and text_2, data_1 and data_2, queries and documents"),
    ({"text_1": "a"}, "text_2", "got text_1"), ({"documents": "a"}, "queries", "got documents"),
    ({"text_1": "a", "text_2": "b", "queries": "c"}, None, "got text_1 and text_2 and queries"),
    ({"text_1": "a", "documents": "b"}, None, "got text_1 and documents"),
    ({"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_2", "text_1 has 2 items and text_2 3"),
    ({"text_1": ["a", "b"], "text_2": "a"}, "text_2", "text_1 has 2 items and text_2 1"),
    ({"text_1": [], "text_2": "a"}, "text_1", "at least 1"), ({"text_1": "", "text_2": "a"}, "text_1", "neither"),
    ({"text_1": "a", "text_2": ["b", 3]}, "text_2[1]", "an item is a string"),
    ({"text_1": "a", "text_2": ["b"] * 100_000}, "text_2", "at most 2048"),
])  # fmt: skip
def test_bad_scorings_are_named(url, body, param, message):
    assert message in refused(score(url, **body), 400, param)


# -------------------------------------------------------------------------------- limits, keys, metrics, other paths


def test_limits_are_those_of_embeddings(embedder, images):
    limits = Limits(max_inputs=3, max_request_pixels=10_000, max_input_tokens=64, queue_tokens=150)
    with running(create_app(embedder, ServeOptions(limits=limits))) as server:
        url = server.url
        assert rerank(url, query="a", documents=["b"] * 3, instruction="none").status == 200
        assert "4 documents are more than the 3" in refused(
            rerank(url, query="a", documents=["b"] * 4), 400, "documents"
        )
        assert "4 labels" in refused(classify(url, input=part(images[0]), labels=list("abcd")), 400, "labels")
        refused(score(url, text_1="a", text_2=["b"] * 4), 400, "text_2")
        two = [{"image": data_uri(image)} for image in images[:2]]
        assert rerank(url, query="a", documents=two[:1], instruction="none").status == 200
        refused(rerank(url, query="a", documents=two, instruction="none"), 400, code="too_many_pixels")
        refused(rerank(url, query="a" * 80, documents=["b"]), 400, "query", "context_length_exceeded")
        answer = rerank(url, query="a" * 60, documents=["b" * 50] * 3, instruction="none")
        refused(answer, 400, "input", "too_many_tokens")


def test_one_bad_image_fails_its_own_request(url, images):
    broken = base64.b64encode(png(images[0])[:2000]).decode()
    answer = rerank(url, query="a", documents=[{"image": data_uri(images[1])},
                                               {"image": f"data:image/png;base64,{broken}"}])  # fmt: skip
    assert refused(answer, 400, "documents[1].image", "invalid_image").startswith("documents[1].image: ")


def test_keys_guard_every_path(embedder):
    with running(create_app(embedder, ServeOptions(access=Access(("k",))))) as server:
        for path in ("/v1/classify", "/classify", "/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score"):
            refused(call(server.url, path, {}), 401, code="invalid_api_key")
            assert call(server.url, path, {}, headers={"authorization": "Bearer k"}).status == 400


def test_paths_of_other_servers(url):
    body = {"query": "a", "documents": ["a", "b"]}
    expected = call(url, "/v1/rerank", body).json["results"]
    for path in ("/v2/rerank", "/rerank"):
        assert call(url, path, body).json["results"] == expected
    assert call(url, "/score", {"text_1": "a", "text_2": "a"}).json["data"][0]["score"] == pytest.approx(1, abs=1e-6)
    assert call(url, "/classify", {"input": ["a"], "labels": ["a", "b"], "instruction": "none"}).status == 200


def test_metrics_and_counters(embedder):
    service = EmbeddingService(embedder)
    with running(app_of(service)) as server:
        rerank(server.url, query="a", documents=["b", "c"])
        rerank(server.url, query="a")
        score(server.url, text_1="a", text_2="b")
        text = call(server.url, "/metrics").body.decode()
        for path, status in (("rerank", 200), ("rerank", 400), ("score", 200)):
            assert f'minivlm2vec_requests_total{{path="/v1/{path}",status="{status}"}} 1.0' in text
        assert "minivlm2vec_request_seconds_count 2.0" in text
        wait_for(lambda: service.batcher._in_flight == 0)
        assert service.limiter.tokens == service.limiter.requests == 0 and service.batcher.waiting == (0, 0)


def test_the_document_has_all_of_them(url):
    document = call(url, "/openapi.json").json
    schemas = document["components"]["schemas"]
    for path, name in (("classify", "Classify"), ("rerank", "Rerank"), ("score", "Score")):
        operation = document["paths"][f"/v1/{path}"]["post"]
        reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert reference == f"#/components/schemas/{name}Request" and f"{name}Response" in schemas
    assert "/v2/rerank" not in document["paths"]
    text = json.dumps(document)
    used = {word.split('"')[0] for word in text.split('"#/components/schemas/')[1:]}
    assert used <= set(schemas), used - set(schemas)


def test_remote_images_of_items(embedder, images):
    class Fetcher:
        async def fetch(self, url, name):
            assert url == "https://example.com/a.png" and name == "documents[1].image"
            return png(images[0])

        def stop(self):
            pass

    options = ServeOptions(remote_images=RemoteImages(hosts=("example.com",)))
    with running(app_of(EmbeddingService(embedder, options, fetcher=Fetcher()))) as server:
        body = {"query": "a", "documents": ["b", {"image": "https://example.com/a.png"}]}
        results = rerank(server.url, **body).json["results"]
    expected = tasks.rank(embedder, "a", ["b", images[0]])
    close([r["relevance_score"] for r in results], [hit.score for hit in expected.hits])


# ------------------------------------------------------------------------------------------------------ real clients


def test_coheres_clients(url, embedder):
    cohere = pytest.importorskip("cohere")
    documents = ["a red bicycle", "a cat", "a dog"]
    expected = tasks.rank(embedder, "a cat", documents)
    for client in (cohere.Client("k", base_url=url), cohere.ClientV2("k", base_url=url)):
        answer = client.rerank(model="tiny", query="a cat", documents=documents, top_n=2)
        assert [r.index for r in answer.results] == [hit.index for hit in expected.hits[:2]]
        close([r.relevance_score for r in answer.results], [hit.score for hit in expected.hits[:2]])
        assert answer.id.startswith("rerank-")
        with pytest.raises(cohere.core.ApiError) as error:
            client.rerank(model="tiny", query="", documents=documents)
        assert error.value.status_code == 400 and "neither text nor image" in str(error.value.body)
    first = cohere.Client("k", base_url=url)
    answer = first.rerank(model="tiny", query="a cat", documents=[{"text": x} for x in documents], rank_fields=["text"],
                          return_documents=True, max_chunks_per_doc=10)  # fmt: skip
    assert [r.document.text for r in answer.results] == [documents[hit.index] for hit in expected.hits]
    second = cohere.ClientV2("k", base_url=url)
    assert len(second.rerank(model="tiny", query="a", documents=documents, max_tokens_per_doc=4).results) == 3


def test_openais_client_posts_any_of_them(url, embedder):
    """As people call vLLM's rerank and score with it."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0) as client:
        answer = client.post("/rerank", cast_to=object, body={"model": "tiny", "query": "a", "documents": ["a", "b"]})
        assert {r["index"] for r in answer["results"]} == {0, 1}
        answer = client.post("/score", cast_to=object, body={"model": "tiny", "text_1": "a", "text_2": ["a", "b"]})
        assert answer["data"][0]["score"] == pytest.approx(1, abs=1e-6)
        assert client.embeddings.create(model="tiny", input="a", extra_body={"store": False}).data
