"""The server in this process, through HTTP: schemas, errors, equality with the Embedder, real clients."""

import argparse
import asyncio
import base64
import copy
import gzip
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from minivlm2vec import Embedder
from minivlm2vec.batch import num_image_tokens
from minivlm2vec.cli.serve import add_arguments, make_options, make_server
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.serve import Access, Limits, RemoteImages, ServeOptions, create_app
from minivlm2vec.serve.app import app_of
from minivlm2vec.serve.inputs import TextInput
from minivlm2vec.serve.planning import Planner
from minivlm2vec.serve.remote import ImageFetcher
from minivlm2vec.serve.service import EmbeddingService
from tests.support.files_data import make_adapter
from tests.support.serving import Answer, call, data_uri, floats, picture, running, user, wait_for

TOLERANCE = 2e-6  # float32; packs differ, so sums are in another order


@pytest.fixture(scope="module")
def url(embedder):
    options = ServeOptions(names=("tiny", "text-embedding-3-large"), limits=Limits(max_body_bytes=4 << 20))
    with running(create_app(embedder, options)) as server:
        yield server.url


def post(url: str, **body) -> Answer:
    return call(url, body=body)


def refused(answer: Answer, status: int, param: str | None = None, code: str | None = None) -> dict:
    assert answer.status == status, answer.body
    assert answer.error["param"] == param, answer.error
    if code:
        assert answer.error["code"] == code
    return answer.error


def close(a, b, tolerance: float = TOLERANCE) -> None:
    assert np.shape(a) == np.shape(b)
    assert np.abs(np.asarray(a) - np.asarray(b)).max() <= tolerance


def test_a_model_with_an_adapter_is_served_under_the_adapters_name(tmp_path):
    folder = new_checkpoint(tmp_path / "base")
    adapter = make_adapter(folder, tmp_path / "adapted")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args([str(folder), "--adapter", str(adapter), "--device", "cpu"])
    expected = Embedder.from_pretrained(folder, adapter=adapter, device="cpu", show_progress=False).encode(["A cat"])
    with running(make_server(args, make_options(args)).config.app) as server:
        close(post(server.url, model="adapted", input="A cat").vectors, expected)
        refused(post(server.url, model="base", input="A cat"), 404, "model", "model_not_found")


# OpenAI's side


def test_the_answer_is_openais(url, embedder):
    answer = post(url, model="tiny", input=["A cat and a dog", "x"]).json
    assert answer["object"] == "list" and answer["model"] == "tiny"
    assert [row["object"] for row in answer["data"]] == ["embedding"] * 2
    tokens = sum(len(embedder.plan(t)) for t in ("A cat and a dog", "x"))
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


@pytest.mark.parametrize(
    "text", ["x", "A cat and a dog", "Größe 猫 🐈", "<|user|> hi</s> <s>", " \n\t", "\0", "a" * 3000]
)
def test_text_equals_encode(url, embedder, text):
    close(post(url, input=text).vectors, embedder.encode([text]))
    close(post(url, input=["y", text]).vectors, embedder.encode(["y", text]))


def test_base64_is_little_endian_float32(url):
    as_list = post(url, input="A cat", encoding_format="float").json["data"][0]["embedding"]
    encoded = post(url, input="A cat", encoding_format="base64").json["data"][0]["embedding"]
    assert isinstance(as_list, list)
    raw = base64.b64decode(encoded, validate=True)
    assert raw == np.array(as_list, "<f4").tobytes()  # the decimals are exact too
    assert len(raw) == 4 * 64


def test_vectors_are_normalised(url):
    assert np.linalg.norm(post(url, input="A cat").vectors) == pytest.approx(1, abs=1e-6)


def test_user_and_null_fields_are_ignored(url, embedder):
    answer = post(url, input="a", user="me", dimensions=None, encoding_format=None, model=None, messages=None)
    close(answer.vectors, embedder.encode(["a"]))


def test_dimensions(url, embedder):
    close(post(url, input="a", dimensions=64).vectors, embedder.encode(["a"]))
    error = refused(post(url, input="a", dimensions=32), 400, "dimensions")
    assert "32" in error["message"] and "64" in error["message"] and "Matryoshka" in error["message"]


def test_matryoshka_dimensions_are_cut_and_normalised(embedder):
    with running(create_app(embedder, ServeOptions(matryoshka_dimensions=(16,)))) as server:
        got = post(server.url, input=["a", "b"], dimensions=16).vectors
        refused(post(server.url, input="a", dimensions=17), 400, "dimensions")
    full = embedder.encode(["a", "b"])[:, :16]
    close(got, full / np.linalg.norm(full, axis=1, keepdims=True))


def test_sizes_that_the_checkpoint_was_trained_for_are_served(tmp_path):
    """Without a word on the command line; none above the model's own, or those that it is cut to already."""
    folder = new_checkpoint(tmp_path / "m", config={"minivlm2vec": {"dims": [8, 16]}})
    e = Embedder.from_pretrained(folder, device="cpu", show_progress=False)
    with running(create_app(e, ServeOptions(matryoshka_dimensions=(128,)))) as server:
        close(post(server.url, input=["a"], dimensions=8).vectors, e.encode(["a"], truncate_dim=8))
        error = refused(post(server.url, input="a", dimensions=128), 400, "dimensions")
        assert "[8, 16, 64]" in error["message"]
    small = Embedder.from_pretrained(folder, device="cpu", truncate_dim=8, show_progress=False)
    with running(create_app(small)) as server:
        close(post(server.url, input=["a"]).vectors, e.encode(["a"], truncate_dim=8))
        refused(post(server.url, input="a", dimensions=16), 400, "dimensions")


SYSTEM = [{"role": "system", "content": "Be brief."}]
ASSISTANT = [{"role": "assistant", "content": [{"type": "text", "text": ""}]}]  # what vLLM's clients send
IMAGE_PART = {"type": "image_url", "image_url": {"url": data_uri(picture(20, 20))}}


@pytest.mark.parametrize(("body", "param", "code"), [
    ({}, "input", "missing_required_parameter"),
    ({"input": ""}, "input", "invalid_value"),
    ({"input": []}, "input", "invalid_value"),
    ({"input": ["a", ""]}, "input[1]", "invalid_value"),
    ({"input": ["a", 3]}, "input[1]", "invalid_type"),
    ({"input": ["a", None]}, "input[1]", "invalid_type"),
    ({"input": 3}, "input", "invalid_value"),
    ({"input": {"a": "b"}}, "input", "invalid_value"),
    ({"input": [True]}, "input", "invalid_value"),
    ({"input": [[]]}, "input[0]", "invalid_value"),
    ({"input": [[1], ["a"]]}, "input[1][0]", "invalid_type"),
    ({"input": [-1]}, "input[0]", "invalid_value"),
    ({"input": ["a"] * 2049}, "input", "invalid_value"),
    ({"input": "a", "fields": 1}, "fields", "unknown_parameter"),
    ({"input": "a", "\nx\x00": 1}, "?x?", "unknown_parameter"),
    ({"input": "a", "encoding_format": "bytes"}, "encoding_format", "invalid_value"),
    ({"input": "a", "dimensions": "64"}, "dimensions", "invalid_type"),
    ({"input": "a", "dimensions": 0}, "dimensions", "invalid_value"),
    ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "invalid_value"),
    ({"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "invalid_value"),
    ({"input": "a", "mm_processor_kwargs": {"num_crops": 17}}, "mm_processor_kwargs.num_crops", "invalid_value"),
    ({"input": "a", "mm_processor_kwargs": {"crops": 4}}, "mm_processor_kwargs.crops", "unknown_parameter"),
    ({"input": "a", "use_activation": False}, "use_activation", "invalid_value"),
    ({"input": "a", "add_special_tokens": False}, "add_special_tokens", "invalid_value"),
    ({"input": "a", "messages": user("b")}, "messages", "invalid_value"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": user("a") + user("b")}, "messages", "invalid_value"),
    ({"messages": user("a") * 4}, "messages", "invalid_value"),
    ({"messages": SYSTEM + user("a") + user("b")}, "messages", "invalid_value"),
    ({"messages": user("a") + SYSTEM}, "messages", "invalid_value"),
    ({"messages": [*user("a"), {"role": "assistant", "content": "b"}]}, "messages", "invalid_value"),
    ({"messages": [user("c"), SYSTEM * 2 + user("a")]}, "messages[1]", "invalid_value"),
    ({"messages": SYSTEM + user("")}, "messages[1].content", "invalid_value"),
    ({"messages": [{"role": "system", "content": [IMAGE_PART]}, *user("a")]}, "messages[0].content", "invalid_value"),
    ({"messages": user("a"), "add_generation_prompt": True}, "add_generation_prompt", "invalid_value"),
    ({"messages": user("a"), "chat_template": "{{ x }}"}, "chat_template", "invalid_value"),
    ({"messages": user("a"), "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs", "invalid_value"),
    ({"input": "a", "normalize": False}, "normalize", "invalid_value"),
    ({"messages": [user("a"), []]}, "messages[1]", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "system", "content": None}]}, "messages[0].content", "missing_required_parameter"),
    ({"input": "a", "tools": [{}]}, "tools", "invalid_value"),
    ({"input": "a", "media_io_kwargs": {"image": {}}}, "media_io_kwargs", "invalid_value"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "messages[0].tool_calls", "invalid_value"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "invalid_value"),
    ({"messages": user("")}, "messages[0].content", "invalid_value"),
    ({"messages": user({"type": "audio"})}, "messages[0].content[0]", "invalid_value"),
    ({"messages": user({"type": "text"})}, "messages[0].content[0].text", "missing_required_parameter"),
    ({"messages": user({"type": "text", "text": 3})}, "messages[0].content[0].text", "invalid_type"),
    ({"messages": user({"type": "text", "text": "x", "cache_control": {}})}, "messages[0].content[0].cache_control",
     "unknown_parameter"),
    ({"messages": [user("a"), user("b", {**IMAGE_PART, "extra": 1})]}, "messages[1][0].content[1].extra",
     "unknown_parameter"),
    ({"messages": user({"type": "image_url", "image_url": {}})}, "messages[0].content[0].image_url.url",
     "missing_required_parameter"),
    ({"messages": user({"type": "image_url", "image_url": {"url": "", "text": 1}})},
     "messages[0].content[0].image_url.text", "unknown_parameter"),
    ({"messages": user({"type": "text", "text": "x", **{f"f{i}": 1 for i in range(64)}})}, "messages[0].content[0]",
     "unknown_parameter"),
    ({"input": [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}]}, "input[0].content[0].y",
     "unknown_parameter"),
])  # fmt: skip
def test_bad_requests_name_the_field(url, body, param, code):
    refused(post(url, **body), 400, param, code)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"input": NaN}', b'{"input": "\\ud800"}', b"[" * 10**4]
)
def test_bodies_that_are_no_object(url, body):
    refused(call(url, body=body), 400, code="invalid_json")


def test_paths_and_methods_that_are_not_there(url):
    refused(call(url, "/v1/embedding", {}), 404, code="not_found")
    refused(call(url, "/v1/embeddings"), 405, code="method_not_allowed")
    refused(call(url, "/", method="PATCH"), 404)


def test_models(url):
    models = call(url, "/v1/models").json
    assert [m["id"] for m in models["data"]] == ["tiny", "text-embedding-3-large"]
    assert models["data"][0]["dimensions"] == 64 and models["data"][0]["max_model_len"] == 4096
    assert call(url, "/v1/models/tiny").json == models["data"][0]
    refused(call(url, "/v1/models/TIGER-Lab/VLM2Vec-Full"), 404, "model", "model_not_found")
    refused(post(url, model="gpt-4", input="a"), 404, "model", "model_not_found")
    assert post(url, model="text-embedding-3-large", input="a").json["model"] == "text-embedding-3-large"
    assert post(url, input="a").json["model"] == "tiny"


def test_probes_and_documents(url):
    assert call(url, "/health").json == call(url, "/ready").json == {"status": "ok"}
    document = call(url, "/openapi.json").json
    assert "messages" in document["components"]["schemas"]["EmbeddingRequest"]["properties"]
    assert b"openapi.json" in call(url, "/docs").body


def test_metrics(url):
    before = _metrics(url)
    post(url, input=["a b", "c"])
    post(url, input=3)
    after = _metrics(url)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["minivlm2vec_inputs_total"] == 2
    assert grown["minivlm2vec_tokens_total"] == 5 + 3  # bytes, "▁" and BOS
    assert grown['minivlm2vec_requests_total{path="/v1/embeddings",status="200"}'] == 1
    assert grown['minivlm2vec_requests_total{path="/v1/embeddings",status="400"}'] == 1
    assert grown["minivlm2vec_request_seconds_count"] == grown["minivlm2vec_batch_seconds_count"] == 1
    assert grown["minivlm2vec_queue_seconds_count"] == 2
    assert after["minivlm2vec_queue_inputs"] == after["minivlm2vec_queue_tokens"] == 0
    assert after["minivlm2vec_requests_in_flight"] == 0


def _metrics(url: str) -> dict[str, float]:
    lines = call(url, "/metrics").body.decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


# Token ids


def test_token_ids_need_the_tokenizers_name(url, embedder):
    ids = embedder.processor.tokenizer("A cat")
    for body in (ids, [ids, ids]):
        error = refused(post(url, input=body), 400, "input" if body is ids else "input[0]", "token_ids_not_accepted")
        assert "check_embedding_ctx_length=False" in error["message"]
    refused(post(url, input=ids, tokenizer="cl100k_base"), 400, "input", "token_ids_not_accepted")
    tokenizer = call(url, "/v1/models").json["data"][0]["tokenizer"]
    expected = embedder.encode(["A cat"])
    for name in (tokenizer, "tiny"):
        close(post(url, input=ids, tokenizer=name).vectors, expected)
        close(post(url, input=[ids, ids[:3]], tokenizer=name).vectors[:1], expected)
    assert post(url, input=[ids, ids[:3]], tokenizer="tiny").json["usage"]["prompt_tokens"] == len(ids) + 3
    refused(post(url, input=[[1], [1, 320]], tokenizer="tiny"), 400, "input[1]")
    close(post(url, input=ids + [5] * 50, tokenizer="tiny", truncate_prompt_tokens=len(ids)).vectors, expected)


# vLLM's side: images


def test_image_and_text_equal_encode(url, embedder):
    image, text = picture(90, 60), "Represent the given image."
    expected = embedder.encode([{"text": f"<|image_1|> {text}", "image": image}])
    body = {  # as vLLM's example sends it
        "model": "tiny",
        "encoding_format": "float",
        "messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": data_uri(image)}},
            {"type": "text", "text": text},
        ]}],
    }  # fmt: skip
    close(post(url, **body).vectors, expected)
    close(post(url, **body, truncate_prompt_tokens=-1).vectors, expected)  # its bench
    close(post(url, input=body["messages"]).vectors, expected)  # its EmbeddingChatInputRequest
    ignored = {"request_id": "1", "priority": 0, "cache_salt": "s", "add_special_tokens": True, "use_activation": True,
               "embed_dtype": "float32", "endianness": "little", "truncation_side": "right"}  # fmt: skip
    close(post(url, **body, **ignored).vectors, expected)


@pytest.mark.parametrize("more", [
    {"continue_final_message": False, "add_special_tokens": False}, {"continue_final_message": True},
    {"add_generation_prompt": False}, {"chat_template": None, "chat_template_kwargs": {}, "normalize": True},
])  # fmt: skip
def test_vllms_fields_at_their_defaults(url, embedder, more):
    image = picture(90, 60)
    expected = embedder.encode([{"text": "<|image_1|> t", "image": image}, "t"])
    for messages, vector in ((user(image, "t"), expected[:1]), (user("t"), expected[1:])):
        close(post(url, messages=messages, **more).vectors, vector)
        close(post(url, messages=messages + ASSISTANT, **more).vectors, vector)


EMPTY_ASSISTANT = [{"role": "assistant"}, {"role": "assistant", "content": None, "tool_calls": None}]


def test_what_clients_send_for_nothing(url, embedder):
    """null, "", or an empty list or object stands for what is not given."""
    image = picture(90, 60)
    expected = embedder.encode([{"text": "<|image_1|> t", "image": image}])
    for nothing in (None, [], {}):
        unused = {"tools": nothing, "documents": nothing, "media_io_kwargs": nothing, "chat_template_kwargs": nothing}
        for end in ([], *([message] for message in EMPTY_ASSISTANT)):
            messages = [{"role": "system", "content": None}, *user(image, "t"), *end]
            close(post(url, model="", messages=messages, **unused).vectors, expected)
    for uuid in (None, "a"):
        part = {"type": "image_url", "image_url": {"url": data_uri(image)}, "uuid": uuid}
        close(post(url, messages=user(part, "t")).vectors, expected)
    bare = {"type": "image_url", "image_url": data_uri(image)}
    close(post(url, messages=user(bare, "t")).vectors, expected)


def test_a_system_message_is_the_instruction_in_front(url, embedder):
    a, b = picture(90, 60, 1), picture(40, 80, 2)
    cases = [
        (user(a, "t"), {"text": "<|image_1|> Be brief. t", "image": a}),
        (user(a), {"text": "<|image_1|> Be brief.", "image": a}),
        (user(a, b, "t"), {"text": "<|image_1|> <|image_2|> Be brief. t", "images": [a, b]}),
        (user("t", a), {"text": "Be brief. t <|image_1|>", "image": a}),
        (user("t"), "Be brief. t"),
        ([{"role": "user", "content": "t"}], "Be brief. t"),
    ]
    for messages, item in cases:
        for system in (SYSTEM, [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}]):
            for end in ([], ASSISTANT, [{"role": "assistant", "content": ""}]):
                close(post(url, messages=system + messages + end).vectors, embedder.encode([item]))
    many = post(url, messages=[SYSTEM + messages for messages, _ in cases])
    close(many.vectors, embedder.encode([item for _, item in cases]))
    close(post(url, messages=SYSTEM).vectors, embedder.encode(["Be brief."]))  # alone it is the text
    picture_of_the_assistant = [{"role": "assistant", "content": user(a)[0]["content"]}]  # is never dropped
    refused(post(url, messages=user("t") + picture_of_the_assistant), 400, "messages", "invalid_value")
    silent = [{"role": "system", "content": ""}]
    close(post(url, messages=silent + user(a, "t")).vectors, post(url, messages=user(a, "t")).vectors)


def test_orders_of_parts(url, embedder):
    a, b = picture(90, 60, 1), picture(40, 80, 2)
    cases = [
        ((a,), {"text": "<|image_1|>", "image": a}),
        (("t", a), {"text": "t <|image_1|>", "image": a}),
        ((a, b), {"text": "<|image_1|> <|image_2|>", "images": [a, b]}),
        ((a, "t", b), {"text": "<|image_1|> t <|image_2|>", "images": [a, b]}),
        (("t", b, "", a, "u"), {"text": "t <|image_1|>  <|image_2|> u", "images": [b, a]}),
        (("t", "u"), "t u"),
    ]
    items = [item for _, item in cases]
    for parts, item in cases:
        close(post(url, messages=user(*parts)).vectors, embedder.encode([item]))
    answer = post(url, messages=[user(*parts) for parts, _ in cases])
    close(answer.vectors, embedder.encode(items))
    assert answer.json["usage"]["prompt_tokens"] == sum(len(embedder.plan(item)) for item in items)
    close(post(url, messages=[{"role": "user", "content": "t u"}]).vectors, embedder.encode(["t u"]))


def test_usage_counts_image_tokens(url, embedder):
    grid = embedder.plan(picture(60, 60)).grids[0]
    tokens = num_image_tokens(grid, embedder.model.config.vision.merged_per_side)
    usage = post(url, messages=user(picture(60, 60))).json["usage"]
    assert usage == {"prompt_tokens": tokens + 2, "total_tokens": tokens + 2}  # a BOS before and behind


def test_num_crops(url, embedder):
    image, seen = picture(90, 60), set()
    for crops in (1, 4, 16):
        answer = post(url, messages=user(image, "t"), mm_processor_kwargs={"num_crops": crops})
        close(answer.vectors, embedder.encode([{"text": "<|image_1|> t", "image": image}], num_crops=crops))
        seen.add(answer.json["usage"]["prompt_tokens"])
    assert len(seen) == 3


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_image_files(url, embedder, format, mode):
    if format == "JPEG" and mode in ("P", "RGBA"):
        pytest.skip("JPEG has neither palette nor alpha")
    uri = data_uri(picture(70, 50).convert(mode), format)
    content = {"type": "image_url", "image_url": {"url": uri, "detail": "auto"}}
    expected = embedder.encode([{"text": "<|image_1|> t", "image": base64.b64decode(uri.partition(",")[2])}])
    close(post(url, messages=user(content, "t")).vectors, expected)


def test_a_callers_text_never_injects_an_image(url, embedder):
    tag, image, other = "<|image_1|>", picture(60, 60, 3), picture(60, 60, 4)
    plain = post(url, input=f"{tag} x").vectors
    close(plain, embedder.encode([f"{tag} x"]))
    close(post(url, messages=user(f"{tag} x")).vectors, plain)
    for text in (tag, f"{tag}{tag}", "<|image_2|>", f"see {tag} and <|image_7|>", "<|image|>"):
        answer = post(url, messages=user(image, text))
        text_tokens = len(embedder.plan(" " + text))
        image_tokens = len(embedder.plan(image)) - 1 - len(embedder.plan("\n"))
        assert answer.json["usage"]["prompt_tokens"] == 1 + image_tokens + text_tokens
        # the same places whatever the image: the text's tokens are not of it
        close(post(url, messages=user(text, image)).vectors, post(url, messages=[user(text, image)]).vectors)
    split = post(url, messages=user("<|image_", image, "1|>"))
    assert split.status == 200
    a, b = (post(url, messages=user(i, tag)).vectors for i in (image, other))
    assert np.abs(a - b).max() > 1e-3


@pytest.mark.parametrize(("image_url", "code"), [
    ("data:image/png;base64,AAAA", "invalid_image"),
    ("data:image/png;base64,", "invalid_image"),
    ("data:image/png,AAAA", "invalid_image"),
    ("data:image/png", "invalid_image_url"),
    ("data:image/png;base64,!!!!", "invalid_image_url"),
    ("http://example.com/a.png", "remote_images_not_allowed"),
    ("https://127.0.0.1/a.png", "remote_images_not_allowed"),
    ("file:///etc/passwd", "invalid_image_url"),
    ("/etc/passwd", "invalid_image_url"),
    ("", "invalid_image_url"),
])  # fmt: skip
def test_bad_images(url, image_url, code):
    part = {"type": "image_url", "image_url": {"url": image_url}}
    refused(post(url, messages=user("t", part)), 400, "messages[0].content[1].image_url", code)
    refused(post(url, messages=[user("t"), user("t", part)]), 400, "messages[1][0].content[1].image_url", code)


def test_damaged_and_impossible_images(url):
    head, _, body = data_uri(picture(60, 60), "JPEG").partition(",")
    half = body[: len(body) // 8 * 4]
    for uri, message in ((f"{head},{half}", "cannot be decoded"), (data_uri(picture(3000, 1)), "3000")):
        part = {"type": "image_url", "image_url": {"url": uri}}
        error = refused(post(url, messages=user("t", part)), 400, "messages[0].content[1].image_url")
        assert message in error["message"]
        assert error["message"].startswith(error["param"])


def test_remote_images_from_loopback_are_refused(embedder):
    with running(create_app(embedder, ServeOptions(remote_images=RemoteImages(("*",))))) as server:
        part = {"type": "image_url", "image_url": {"url": server.url + "/health"}}
        refused(
            post(server.url, messages=user(part)), 403, "messages[0].content[0].image_url", "image_host_not_allowed"
        )


def test_remote_images(embedder):
    """Fetched for each conversation that wants them, beside data URIs and texts."""

    class Fetcher(ImageFetcher):
        async def fetch(self, url, param):
            await asyncio.sleep(0.01)
            return base64.b64decode(data_uri(picture(60, 60, int(url[-1]))).partition(",")[2])

    def part(n):
        return {"type": "image_url", "image_url": {"url": f"http://pictures.test/{n}"}}

    hosts = RemoteImages(("pictures.test",))
    service = EmbeddingService(embedder, ServeOptions(remote_images=hosts), fetcher=Fetcher(hosts))
    with running(app_of(service)) as server:
        messages = [user("t"), user(part(1), "t"), user(picture(60, 60, 2), "t"), user(part(3), part(4))]
        got = post(server.url, messages=messages).vectors
    images = [picture(60, 60, n) for n in range(5)]
    items = ["t", *({"text": "<|image_1|> t", "image": images[n]} for n in (1, 2))]
    close(got, embedder.encode([*items, {"text": "<|image_1|> <|image_2|>", "images": images[3:]}]))


# Lengths


def test_too_long_and_truncated(url, embedder):
    text = "word " * 1000  # 5002 tokens of 4096
    error = refused(post(url, input=["a", text]), 400, "input[1]", "context_length_exceeded")
    assert "4096" in error["message"] and "5002" in error["message"]
    for n in (1, 2, 100, 4096):
        answer = post(url, input=text, truncate_prompt_tokens=n)
        close(answer.vectors, embedder.encode([text], max_length=n))
        assert answer.json["usage"]["prompt_tokens"] == n
    close(post(url, input=text, truncate_prompt_tokens=-1).vectors, embedder.encode([text], max_length=4096))
    close(post(url, input=text, truncate_prompt_tokens=9999).vectors, embedder.encode([text], max_length=4096))
    close(post(url, messages=user(text), truncate_prompt_tokens=5).vectors, embedder.encode([text], max_length=5))
    image = picture(60, 60)  # never cut, as in the original
    close(
        post(url, messages=user(image, "t"), truncate_prompt_tokens=5).vectors,
        post(url, messages=user(image, "t")).vectors,
    )


def test_megabytes_of_text_are_not_tokenised(url, embedder):
    text = "a" * (3 << 20)
    error = refused(post(url, input=text), 400, "input", "context_length_exceeded")
    assert "characters" in error["message"]
    refused(post(url, messages=user(picture(20, 20), text)), 400, "messages[0].content", "context_length_exceeded")
    close(post(url, input=text, truncate_prompt_tokens=10).vectors, embedder.encode(["a" * 100], max_length=10))


@pytest.fixture(scope="module")
def planner():
    processor = Embedder.from_pretrained("mini", device="cpu", show_progress=False).processor
    return Planner(processor, max_input_tokens=4096, max_request_tokens=1 << 18)


TEXTS = {
    "words": "the quick brown fox jumps over the lazy dog " * 2000,
    "one character": "a" * 90_000,
    "spaces": " " * 90_000,
    "special tokens": "<|user|>hi</s><|end|> " * 5000,
    "other scripts": "Größe 猫が好き 🐈‍⬛ привет " * 4000,
    "numbers": "".join(map(str, range(20_000))),
    "random": "".join(random.Random(0).choices("aehinorst <|>/s.", k=90_000)),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_is_cut_before_it_is_tokenised(planner, kind):
    """The first tokens are those of the whole text, though little of it is read."""
    tokenize, read = planner.processor.tokenizer, []
    text = TEXTS[kind]
    whole = tokenize(text)

    class Watched:
        def __call__(self, text):
            read.append(len(text))
            return tokenize(text)

    watched = copy.copy(planner)
    watched.processor = copy.copy(planner.processor)
    watched.processor.tokenizer = Watched()
    for n in (1, 2, 3, 10, 77, 500):
        (planned,) = watched.plan([TextInput("input", text)], n, None)
        assert planned.input_ids == whole[:n]
        assert read.pop() <= planner.longest_token * (n + 16)


def test_long_texts_that_are_cut_cost_little(url):
    start = time.monotonic()
    assert post(url, input=["a" * 30_000] * 100, truncate_prompt_tokens=1).status == 200
    assert time.monotonic() - start < 30  # 3 million characters take minutes


def test_an_app_of_a_name(tmp_path):
    folder = new_checkpoint(tmp_path / "tiny")
    for name in (folder, str(folder)):
        assert create_app(name).state.service.embedder.dimension == 64
    with pytest.raises(TypeError, match="an Embedder, or a folder or name of one; got int"):
        create_app(3)


def test_limits(embedder):
    limits = Limits(max_inputs=3, max_input_tokens=50, queue_tokens=100, max_image_pixels=5000, max_num_crops=2,
                    max_body_bytes=50_000)  # fmt: skip
    with running(create_app(embedder, ServeOptions(limits=limits))) as server:
        refused(post(server.url, input=["a"] * 4), 400, "input")
        refused(post(server.url, input="a" * 50), 400, "input", "context_length_exceeded")
        refused(post(server.url, input=["a" * 40] * 3), 400, "input", "too_many_tokens")
        assert post(server.url, input=["a" * 25] * 3).status == 200
        name = "messages[0].content[0].image_url"
        error = refused(post(server.url, messages=user(picture(101, 50))), 400, name, "invalid_image")
        assert "5,050 pixels are more than the 5,000" in error["message"]
        refused(post(server.url, input="a", mm_processor_kwargs={"num_crops": 3}), 400, "mm_processor_kwargs.num_crops")
        answer = post(server.url, input="a" * 50_001)
        refused(answer, 413, code="request_too_large")
        assert answer.headers["connection"] == "close"
        assert post(server.url, input="a").status == 200


# Access


def test_api_keys(embedder):
    with running(create_app(embedder, ServeOptions(access=Access(("secret", "schlüssel"))))) as server:
        for given in (None, "secret", "Bearer secre", "Basic secret", "Bearer \xff", "Bearer ", "Bearer secret secret"):
            for path, body in (("/v1/embeddings", {"input": "a"}), ("/v1/models", None), ("/v1/models/x", None)):
                answer = call(server.url, path, body, headers={"authorization": given} if given else {})
                refused(answer, 401, code="invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
        key = {"authorization": "Bearer secret"}
        assert call(server.url, body={"input": "a"}, headers=key).status == 200
        second = {"authorization": "Bearer schlüssel".encode().decode("latin-1")}
        assert call(server.url, "/v1/models", headers=second).status == 200
        for path in ("/health", "/ready", "/metrics", "/openapi.json"):
            assert call(server.url, path).status == 200


@pytest.mark.parametrize("keys", [("",), ("a", " \t\n"), ("a\nb",), ("a\0",)])
def test_keys_that_nobody_could_send_are_refused(keys):
    with pytest.raises(ValueError, match=rf"api_keys\[{len(keys) - 1}\] (is empty|has control characters)"):
        Access(keys)


def test_white_space_around_a_key_is_dropped(embedder):
    """A Kubernetes secret made with echo ends in a newline."""
    with running(create_app(embedder, ServeOptions(access=Access((" secret\r\n",))))) as server:
        assert call(server.url, "/v1/models", headers={"authorization": "Bearer secret"}).status == 200
        for given in ("", "Bearer ", "Bearer x"):
            refused(call(server.url, "/v1/models", headers={"authorization": given}), 401, code="invalid_api_key")


# Small things of HTTP


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/v1/models/tiny", "/openapi.json"])
def test_head_is_get_without_the_body(url, path):
    head, get = call(url, path, method="HEAD"), call(url, path)
    assert (head.status, head.body, get.status) == (200, b"", 200)
    assert head.headers["content-type"] == get.headers["content-type"]
    assert "x-request-id" in head.headers


def test_head_of_what_is_posted_or_not_there(url):
    assert call(url, "/v1/embeddings", method="HEAD").status == 405
    assert call(url, "/nothing", method="HEAD").status == 404


PAGE = "http://localhost:3000"
PREFLIGHT = {"origin": PAGE, "access-control-request-method": "POST",
             "access-control-request-headers": "content-type,authorization"}  # fmt: skip


@pytest.mark.parametrize("origins", [(PAGE, "https://app.test"), ("*",)])
def test_pages_of_named_origins_may_call(embedder, origins):
    options = ServeOptions(access=Access(api_keys=("k",), cors_origins=origins))
    with running(create_app(embedder, options)) as server:
        preflight = call(server.url, "/v1/embeddings", method="OPTIONS", headers=PREFLIGHT)
        assert preflight.status == 200 and preflight.headers["access-control-allow-origin"] in (PAGE, "*")
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        for key, status in (("k", 200), ("x", 401)):
            headers = {"origin": PAGE, "authorization": f"Bearer {key}"}
            answer = call(server.url, body={"input": "a"}, headers=headers)
            assert answer.status == status
            assert answer.headers["access-control-allow-origin"] in (PAGE, "*")
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
        if origins != ("*",):
            other = call(
                server.url, body={"input": "a"}, headers={"origin": "http://evil.test", "authorization": "Bearer k"}
            )
            assert "access-control-allow-origin" not in other.headers


def test_no_origin_is_allowed_by_default(url):
    refused(call(url, "/v1/embeddings", method="OPTIONS", headers=PREFLIGHT), 405, code="method_not_allowed")
    answer = call(url, body={"input": "a"}, headers={"origin": PAGE})
    assert answer.status == 200 and "access-control-allow-origin" not in answer.headers


def test_a_byte_order_mark(url, embedder):
    answer = call(url, body=b"\xef\xbb\xbf" + json.dumps({"input": "A cat"}).encode())
    close(answer.vectors, embedder.encode(["A cat"]))
    refused(call(url, body=json.dumps({"input": "A cat"}).encode("utf-16")), 400, code="invalid_json")


@pytest.mark.parametrize("encoding", ["gzip", "br", "gzip, identity"])
def test_compressed_bodies_are_refused(url, encoding):
    body = gzip.compress(json.dumps({"input": "a"}).encode())
    error = refused(call(url, body=body, headers={"content-encoding": encoding}), 415)
    assert "compressed" in error["message"]
    assert call(url, body={"input": "a"}, headers={"content-encoding": "Identity"}).status == 200


def test_spellings_of_base64_in_an_image(url):
    image = picture(64, 64)
    expected = post(url, messages=user(image, "t")).vectors
    head, _, body = data_uri(image).partition(",")
    wrapped = base64.encodebytes(base64.b64decode(body)).decode()
    for spelled in (wrapped, wrapped.replace("\n", "\r\n"), body.rstrip("="), body.replace("+", "-").replace("/", "_")):
        part = {"type": "image_url", "image_url": {"url": f"{head},{spelled}"}}
        close(post(url, messages=user(part, "t")).vectors, expected)


# Many at a time


def mixed_item(rng: random.Random):
    """(a body's fields, the Embedder's items)"""
    kind, n = rng.randrange(5), rng.randrange(1000)
    text, image = "word " * rng.randrange(1, 60) + str(n), picture(rng.randrange(20, 120), rng.randrange(20, 120), n)
    if kind == 0:
        return {"input": text}, [text]
    if kind == 1:
        texts = [f"{text} {i}" for i in range(rng.randrange(1, 20))]
        return {"input": texts}, texts
    if kind == 2:
        return {"messages": user(image, text)}, [{"text": f"<|image_1|> {text}", "image": image}]
    if kind == 3:
        return {"messages": user(text, image)}, [{"text": f"{text} <|image_1|>", "image": image}]
    return {"messages": [user(text), user(image)]}, [text, {"text": "<|image_1|>", "image": image}]


def post_until_taken(url: str, **body) -> Answer:
    """As clients do: again after a second where a full queue sends them away, as a slow machine's is."""
    for _ in range(60):
        answer = post(url, **body)
        if answer.status != 429:
            break
        time.sleep(float(answer.headers["retry-after"]))
    return answer


def test_64_concurrent_mixed_requests_equal_encode(url, embedder):
    rng = random.Random(0)
    pairs = [mixed_item(rng) for _ in range(128)]
    bad = [{"input": ""}, {"messages": user({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}})},
           {"input": "word " * 2000}]  # fmt: skip
    expected = [embedder.encode(items) for _, items in pairs]
    with ThreadPoolExecutor(64) as pool:
        answers = [pool.submit(post_until_taken, url, **body) for body, _ in pairs]
        wrong = [pool.submit(post, url, **bad[i % 3]) for i in range(30)]
        errors = [np.abs(a.result().vectors - e).max() for a, e in zip(answers, expected, strict=True)]
        assert {w.result().status for w in wrong} == {400}
    print(f"largest difference to encode: {max(errors):.1e}")
    assert max(errors) <= TOLERANCE


def test_a_model_error_fails_one_request_alone(embedder):
    """A model that cannot compute inputs of exactly 13 tokens: neither alone nor in a pack."""

    def launch(items):
        vectors = embedder.embed(items).numpy()
        vectors[[len(x) == 13 for x in items]] = np.nan
        return vectors

    with running(app_of(EmbeddingService(embedder, launch=launch))) as server, ThreadPoolExecutor(16) as pool:
        texts = ["a" * n for n in range(1, 17)]
        answers = list(pool.map(lambda text: post(server.url, input=text), texts))
        for text, answer in zip(texts, answers, strict=True):
            if len(text) == 11:  # and "▁" and BOS
                refused(answer, 500, code="model_error")
                assert answer.headers["x-should-retry"] == "false"
            else:
                close(answer.vectors, embedder.encode([text]))
        assert call(server.url, "/health").status == 200


def test_a_broken_model_is_told_to_the_orchestrator(embedder):
    broken = False

    def launch(items):
        if broken:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return embedder.embed(items).numpy()

    with running(app_of(EmbeddingService(embedder, launch=launch))) as server:
        assert post(server.url, input="a").status == 200
        broken = True
        refused(post(server.url, input="a"), 503, code="model_failed")
        refused(post(server.url, input="a"), 503, code="model_failed")
        refused(call(server.url, "/health"), 503)
        refused(call(server.url, "/ready"), 503)


def test_an_error_of_the_server_itself_is_openais_shape_too(embedder, monkeypatch):
    service = EmbeddingService(embedder)
    with running(app_of(service)) as server:
        with monkeypatch.context() as patch:
            patch.setattr(service.reader, "inputs", lambda request: 1 / 0)
            error = refused(post(server.url, input="a"), 500, code="internal_error")
            assert "division" not in error["message"]  # for the log alone
        assert post(server.url, input="a").status == 200


# Real clients


def test_openai_client(url, embedder):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0)
    with client:
        expected = embedder.encode(["A cat", "A dog"])
        answer = client.embeddings.create(model="tiny", input=["A cat", "A dog"])  # base64 on the wire
        close([row.embedding for row in answer.data], expected)
        assert answer.usage.prompt_tokens == sum(len(embedder.plan(t)) for t in ("A cat", "A dog"))
        answer = client.embeddings.create(model="tiny", input="A cat", encoding_format="float", user="u")
        close(answer.data[0].embedding, expected[0])
        answer = client.embeddings.create(model="tiny", input="A cat", encoding_format="base64")
        close(floats(answer.data[0].embedding), expected[0])
        image = picture(90, 60)
        answer = client.embeddings.create(model="tiny", input=[], extra_body={"messages": user(image, "t")})
        close(answer.data[0].embedding, embedder.encode([{"text": "<|image_1|> t", "image": image}])[0])
        body = {"model": "tiny", "messages": user(image, "t"), "encoding_format": "float"}  # vLLM's example
        answer = client.post("/embeddings", cast_to=openai.types.CreateEmbeddingResponse, body=body)
        close(answer.data[0].embedding, embedder.encode([{"text": "<|image_1|> t", "image": image}])[0])
        ids = embedder.processor.tokenizer("A cat")
        answer = client.embeddings.create(model="tiny", input=ids, extra_body={"tokenizer": "tiny"})
        close(answer.data[0].embedding, expected[0])
        assert [m.id for m in client.models.list()] == ["tiny", "text-embedding-3-large"]
        assert client.models.retrieve("tiny").id == "tiny"
        with pytest.raises(openai.BadRequestError, match="Matryoshka") as e:
            client.embeddings.create(model="tiny", input="a", dimensions=8)
        assert (e.value.param, e.value.code) == ("dimensions", "invalid_value") and e.value.request_id
        with pytest.raises(openai.NotFoundError, match="not served here"):
            client.embeddings.create(model="other", input="a")


def test_openai_async_client_64_at_a_time(url, embedder):
    openai = pytest.importorskip("openai")
    texts = [f"text number {i} " + "x" * i for i in range(64)]

    async def body():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0) as client:
            return await asyncio.gather(*(client.embeddings.create(model="tiny", input=t) for t in texts))

    close([a.data[0].embedding for a in asyncio.run(body())], embedder.encode(texts))


def test_openai_client_and_keys(embedder):
    openai = pytest.importorskip("openai")
    with running(create_app(embedder, ServeOptions(names=("tiny",), access=Access(("k",))))) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as client:
            assert len(client.embeddings.create(model="tiny", input="a").data[0].embedding) == 64
        wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
        with wrong, pytest.raises(openai.AuthenticationError):
            wrong.embeddings.create(model="tiny", input="a")


def test_langchain(url, embedder, monkeypatch):
    langchain = pytest.importorskip("langchain_openai")
    tiktoken = pytest.importorskip("tiktoken")
    options = {"model": "tiny", "base_url": f"{url}/v1", "api_key": "EMPTY", "max_retries": 0}
    client = langchain.OpenAIEmbeddings(**options, check_embedding_ctx_length=False)
    close(client.embed_documents(["A cat", "A dog"]), embedder.encode(["A cat", "A dog"]))
    close(client.embed_query("A cat"), embedder.encode(["A cat"])[0])
    close(asyncio.run(client.aembed_query("A cat")), embedder.encode(["A cat"])[0])
    # By default it sends tiktoken's ids. The vocabulary would come from the network, so this one is made here.
    bytes_only = tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)},
                                   special_tokens={})  # fmt: skip
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: bytes_only)
    with pytest.raises(pytest.importorskip("openai").BadRequestError, match="check_embedding_ctx_length=False"):
        langchain.OpenAIEmbeddings(**options).embed_query("A cat")


def test_nothing_is_left_behind(embedder):
    """After all kinds of requests the counters are where they were."""
    service = EmbeddingService(embedder)
    with running(app_of(service)) as server, ThreadPoolExecutor(8) as pool:
        rng = random.Random(1)
        bodies = [mixed_item(rng)[0] for _ in range(16)] + [{"input": ""}, {"input": "a" * 5000}]
        list(pool.map(lambda body: post(server.url, **body), bodies))
        wait_for(lambda: service.batcher._in_flight == 0)
        assert service.limiter.tokens == 0 and service.batcher.waiting == (0, 0)
        assert torch.is_inference_mode_enabled() is False
