"""The end-to-end bench's workloads, arithmetic and gate; its cases run on the CPU at small sizes."""

import pytest
import torch
import torch.nn.functional as F

from bench import bench_model, common, run
from bench.bench_model import COMMON, FULL, batch_of, bytes_of, check_vectors, flops_of
from bench.common import Case, Work
from minivlm2vec.config import VLM2VecConfig
from minivlm2vec.new_checkpoint import base_config
from minivlm2vec.weights import empty_model
from tests.support.helpers import close

CPU = torch.device("cpu")
CONFIG = VLM2VecConfig.from_dict(base_config("full"))


@pytest.mark.parametrize("name, tokens, crops, tflop", [
    ("a", 1920, 0, 13.6), ("a1", 30, 0, 0.212), ("b", 24864, 160, 238.8), ("b1", 777, 5, 7.46),
    ("d", 26598, 144, 244.9),
])  # fmt: skip
def test_workloads(name, tokens, crops, tflop):
    batch = batch_of(CONFIG, FULL[name], CPU)
    assert batch.num_tokens == tokens == len(batch.input_ids)
    assert sum(h * w + 1 for h, w in batch.grids) == crops
    assert flops_of(CONFIG, batch, 0) / 1e12 == pytest.approx(tflop, rel=0.01)


def test_weights_that_are_read():
    model = empty_model(CONFIG).to(torch.bfloat16)
    assert bytes_of(model, images=False) == pytest.approx(7.25e9, rel=0.001)
    assert bytes_of(model, images=True) - bytes_of(model, images=False) == pytest.approx(0.62e9, rel=0.05)


def test_the_hosts_time_counts():
    """Else what a graph saves would not show."""
    assert all(case.host_counts and not case.memory_bound for case in bench_model.cases(CPU))


def test_common_beginnings_count_once():
    batch = batch_of(CONFIG, COMMON, CPU)
    assert (batch.input_ids.view(64, 30)[:, :12] == torch.arange(1, 13)).all()
    assert flops_of(CONFIG, batch, 12) / flops_of(CONFIG, batch, 0) == pytest.approx(1164 / 1920, rel=0.02)


def gate(least=None, **vectors):
    exact = torch.eye(4)[:2]
    off = lambda x: lambda: exact + x * torch.eye(4)[2]  # noqa: E731
    work = Work({name: off(x) for name, x in vectors.items()}, lambda: exact)
    case = Case("model", "x", torch.float32, 1, 1, lambda: work)
    return {name: ok for name, (_, ok) in check_vectors(work, case, least=least).items()}


def test_gate(capsys):
    assert gate(torch=0.01, triton=0.019, peer=0.03) == {"torch": True, "triton": True, "peer": False}
    assert gate(torch=0.01, triton=float("nan")) == {"torch": True, "triton": False}
    assert gate(0.9, torch=0.01, fp8=0.3, bf16=0.3) == {"torch": True, "fp8": True, "bf16": False}
    assert "not timed" in capsys.readouterr().out


def test_cases_run_without_a_gpu(monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(common, "REPETITIONS", 1)
    session = common.Session(CPU)
    with torch.no_grad():
        session.run(bench_model.cases(CPU))
    timed = {(r.kernel, r.case, r.provider) for r in session.finish()}
    assert {p for k, c, p in timed if (k, c) == ("model", "d")} == {
        "reference",
        "transformers eager",
        "transformers sdpa",
    }
    assert {p for k, c, p in timed if k == "model_prefixes"} == {"reference", "shared", "not shared"}
    assert {p for k, c, p in timed if k == "model_fp8"} == {"reference", "fp8", "bf16"}
    assert {p for k, c, p in timed if k == "model_graphs"} == {"reference", "padded"}
    assert {p for k, c, p in timed if k == "tower_graphs"} == {"reference", "by programs", "no graph"}
    assert all(r.tokens_s or r.crops_s for r in session.rows)
    out = capsys.readouterr().out
    assert "cosine of fp8 to bf16" in out and "not timed" not in out


def in_one_call(q, k, v, cu_seqlens, max_seqlen, *, causal, cu_seqlens_q=None, **_):
    """The pack's attention as one masked product, which torch.compile takes as a part of its graph."""
    row, key = torch.arange(len(q), device=q.device), torch.arange(len(k), device=k.device)
    cu_q = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
    of_row, of_key = torch.searchsorted(cu_q[1:], row, right=True), torch.searchsorted(cu_seqlens[1:], key, right=True)
    mask = of_row[:, None] == of_key[None]
    if causal:
        left = lambda cu, of, i: cu[1:][of] - i  # noqa: E731  (tokens to the end of its sequence)
        mask = mask & (left(cu_q, of_row, row)[:, None] <= left(cu_seqlens, of_key, key)[None])
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(0, 1)


@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_the_compiled_peer_is_the_same_network(whole):
    """A graph each of the tower's layer and the decoder's; or of the tower and of the decoder."""
    made = []

    def compiler(graph, inputs):
        made.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    config = VLM2VecConfig.from_dict(base_config("tiny"))
    model = bench_model.random_model(config, torch.float32, CPU)
    batch = batch_of(config, bench_model.SMALL["d"], CPU)
    peer = bench_model.PackedCompiled(model, whole=whole, attention=in_one_call, backend=compiler)
    for _ in range(2):
        close("vectors", peer(batch), model(batch), 1e-5)
    assert len(made) == 2


def test_is_registered():
    assert "model" in run.bench_names()
