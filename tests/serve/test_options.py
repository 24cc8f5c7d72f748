"""What a server is started with, from Python and from the command line."""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from minivlm2vec.cli.serve import add_arguments, make_options
from minivlm2vec.serve import Access, Batching, Limits, RemoteImages, ServeOptions
from tests.support.serving import call, wait_for

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Limits(max_inputs=0), "max_inputs is 0"),
    (lambda: Limits(queue_tokens=-1), "queue_tokens is -1"),
    (lambda: Limits(request_timeout=0.0), r"request_timeout is 0\.0"),
    (lambda: Batching(batch_tokens=0), "batch_tokens is 0"),
    (lambda: Batching(max_wait=-0.1), r"max_wait is -0\.1"),
    (lambda: RemoteImages(max_bytes=0), "max_bytes is 0"),
    (lambda: ServeOptions(matryoshka_dimensions=(16, 0)), "matryoshka_dimensions holds 0"),
])  # fmt: skip
def test_an_option_out_of_range_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_options_are_frozen():
    with pytest.raises(FrozenInstanceError):
        ServeOptions().names = ("x",)


def parsed(*arguments: str) -> ServeOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return make_options(parser.parse_args(["a/model", *arguments]))


def test_the_commands_defaults_are_the_librarys():
    assert parsed() == ServeOptions(names=("a/model",))


def test_every_argument_finds_its_option():
    options = parsed(
        "--served-model-name", "x", "--served-model-name", "y", "--api-key", "k", "--cors-origin", "*",
        "--allow-remote-images", "a.test",
        "--batch-tokens", "1", "--max-batch-inputs", "2", "--max-wait-ms", "3", "--queue-tokens", "4",
        "--max-requests", "5", "--max-inputs", "6", "--max-input-tokens", "7", "--max-body-mb", "0.5",
        "--max-image-megapixels", "9", "--max-num-crops", "10", "--max-request-megapixels", "13",
        "--queue-megapixels", "14", "--decode-timeout", "15", "--request-timeout", "11",
        "--matryoshka-dimensions", "12",
    )  # fmt: skip
    assert options == ServeOptions(
        names=("x", "y"),
        matryoshka_dimensions=(12,),
        limits=Limits(6, 7, 4, 5, 1 << 19, 9_000_000, 13_000_000, 14_000_000, 15.0, 10, 11.0),
        batching=Batching(1, 2, 0.003),
        access=Access(("k",), ("*",)),
        remote_images=RemoteImages(("a.test",)),
    )


@pytest.mark.parametrize(("arguments", "environment", "name"), [
    (["--api-key", ""], None, "--api-key"),
    (["--api-key", "k", "--api-key", " "], None, "--api-key"),
    ([], "", "MINIVLM2VEC_API_KEY"),  # as docker compose does it with a variable that is not set
    (["--api-key", "k"], "\n", "MINIVLM2VEC_API_KEY"),
])  # fmt: skip
def test_an_empty_key_ends_the_command(monkeypatch, arguments, environment, name):
    if environment is not None:
        monkeypatch.setenv("MINIVLM2VEC_API_KEY", environment)
    with pytest.raises(ValueError, match=rf"^{name} is empty"):
        parsed(*arguments)


def test_the_key_of_the_environment(monkeypatch):
    monkeypatch.setenv("MINIVLM2VEC_API_KEY", "secret\n")
    assert parsed("--api-key", "k").access.api_keys == ("k", "secret")


def test_options_need_neither_torch_nor_the_extra():
    code = "import sys; from minivlm2vec.serve import ServeOptions; assert not {'torch', 'fastapi'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def test_the_example_of_the_documentation(tmp_path):
    """docs/serve.md's Python program, with the bundled model and a free port in the place of its own."""
    document = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    (example,) = [b for b in re.findall(r"```python\n(.*?)```", document, re.DOTALL) if "create_app" in b]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    assert '"TIGER-Lab/VLM2Vec-Full"' in example and "8000" in example
    script = tmp_path / "example.py"
    script.write_text(example.replace('"TIGER-Lab/VLM2Vec-Full"', '"mini"').replace("8000", str(port)))
    process = subprocess.Popen([sys.executable, str(script)], env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: process.poll() is not None or answers(url), 60)
        key = {"authorization": "Bearer secret"}
        assert call(url, body={"input": "a cat"}).status == 401
        assert call(url, body={"model": "vlm2vec", "input": "a cat"}, headers=key).status == 200
        assert call(url, body={"input": ["a"] * 257}, headers=key).status == 400
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors


def answers(url: str) -> bool:
    try:
        return call(url, "/ready").status == 200
    except OSError:
        return False


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("arguments", "message"), [
    (["--request-timeout", "nan"], "request_timeout is nan"),
    (["--decode-timeout", "inf"], "decode_timeout is inf"),
    (["--max-body-mb", "0.0000001"], "max_body_mb is 1e-07"),
    (["--queue-megapixels", "inf"], "queue_megapixels is inf"),
    (["--max-wait-ms", "-1"], "--max-wait-ms is -1"),
])  # fmt: skip
def test_an_argument_out_of_range_is_named_as_it_was_given(arguments, message):
    with pytest.raises(ValueError, match=message):
        parsed(*arguments)


@pytest.mark.parametrize(("given", "origin"), [
    ("http://localhost:3000/", "http://localhost:3000"), (" HTTPS://App.Test ", "https://app.test"), ("*", "*"),
    ("https://app.test:443/", "https://app.test"), ("http://app.test:443", "http://app.test:443"), ("null", "null"),
    ("http://app.test:80", "http://app.test"), ("http://[::1]:3000/", "http://[::1]:3000"),
    ("http://app.test:8080", "http://app.test:8080"), ("chrome-extension://abc/", "chrome-extension://abc"),
])  # fmt: skip
def test_origins_are_spelled_as_browsers_send_them(given, origin):
    assert Access(cors_origins=(given,)).cors_origins == (origin,)


@pytest.mark.parametrize("origin", [
    "", "localhost:3000", "http://", "http://a.test/page", "http://a.test?x", "//a.test", "http://u@a.test",
    "http://a.test:x", "http://[::1", "https://*.a.test",
])  # fmt: skip
def test_what_is_no_origin_is_refused(origin):
    with pytest.raises(ValueError, match="is no origin"):
        Access(cors_origins=(origin,))
