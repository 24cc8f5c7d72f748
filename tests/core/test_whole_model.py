"""The whole model on Triton kernels: against float32, and against the original's recorded vectors.

In the interpreter at the smallest sizes; on a card at all of them, in bfloat16 too, replayed and with shared prefixes.
"""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.bench_model import Workload, batch_of, fast, in_float32_copy, random_model, sharing_weights
from minivlm2vec import Embedder
from minivlm2vec.config import VLM2VecConfig
from minivlm2vec.inference.graphs import GraphedModel, PaddedModel
from minivlm2vec.inference.prefix import share_prefixes
from minivlm2vec.new_checkpoint import base_config
from tests.kernels.kernel_cases import DTYPES
from tests.support.golden import BUNDLED, Case, golden_checkpoint

FEW = Workload((7, 5, 1, 3), (None, (1, 2), None, None))
MANY = Workload((30, 1, 300, 20, 20, 20), (None, None, None, (2, 2), (1, 3), (4, 4)))
WORK = {"tiny": FEW, "small": MANY, "full": MANY}
PRESETS = ["tiny", *(pytest.param(x, marks=pytest.mark.gpu) for x in ("small", "full"))]


def worst(vectors: Tensor, exact: Tensor) -> float:
    """1 - the smallest cosine."""
    return 1 - torch.cosine_similarity(vectors.double(), exact.double(), dim=-1).min().item()


def check(vectors: dict[str, Tensor], torchs: Tensor, exact: Tensor) -> None:
    """Twice the angle of torch's own kernels in the same dtype, and 1e-6 where those are exact."""
    limit = max(4 * worst(torchs, exact), 1e-6)
    for name, ours in vectors.items():
        error = worst(ours, exact)
        print(f"{name}: 1 - cosine {error:.2e}, allowed {limit:.2e}")
        assert ours.isfinite().all() and error <= limit, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_against_float32(device, large_tiles, preset, dtype):
    config = VLM2VecConfig.from_dict(base_config(preset))
    on_device = torch.device(device)
    model, batch = random_model(config, dtype, on_device), batch_of(config, WORK[preset], on_device)
    exact, torchs = in_float32_copy(model)(batch), sharing_weights(model, "torch")(batch)
    plain, ours = sharing_weights(model, "triton"), fast(model, "triton")
    vectors = {"plain": plain(batch), "fast": ours(batch), "padded": PaddedModel(ours, make_at=1)(batch)}
    check(vectors, torchs, exact)
    assert worst(exact[:-1], exact[1:]) > 0.01  # inputs are told apart


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["small", "full"])
@torch.inference_mode()
def test_gpu_short_texts(preset):
    """Replayed, and with a beginning in common computed once."""
    config, cpu = VLM2VecConfig.from_dict(base_config(preset)), torch.device("cpu")
    model = random_model(config, torch.bfloat16, torch.device("cuda"))
    ours, torchs, exact = fast(model, "triton"), sharing_weights(model, "torch"), in_float32_copy(model)
    for work in (Workload((30,)), Workload((30, 40, 12, 12, 50), in_common=10)):
        on_host = batch_of(config, work, cpu)
        batch, shared = on_host.to("cuda"), share_prefixes(on_host, 4096, weight_bound_rows=0).to("cuda")
        assert len(work.texts) == 1 or len(shared.input_ids) < len(batch.input_ids)
        graphed = GraphedModel(ours, make_at=1)
        first = graphed(batch)
        batch = replace(batch, input_ids=batch.input_ids.flip(0))
        graphed(batch)
        batch = replace(batch, input_ids=batch.input_ids.flip(0))
        vectors = {"replayed": graphed(batch), "captured": first, "shared": ours(shared)}
        check(vectors, torchs(batch), exact(batch))
        assert torch.equal(vectors["replayed"], first) and len(graphed.programs) == 1


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    """(variant, dtype, backend) -> Embedder on the card, with the weights of the golden runs, made from their seed."""

    @functools.cache
    def folder(variant: str) -> Path:
        return golden_checkpoint(tmp_path_factory.mktemp(variant), variant)

    @functools.cache
    def get(variant: str, dtype: torch.dtype, backend: str) -> Embedder:
        options = {"dtype": dtype, "backend": backend, "show_progress": False}
        return Embedder.from_pretrained(folder(variant), device="cuda", **options)

    return get


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant, name", [(v, n) for v in BUNDLED for n in BUNDLED[v]])
def test_gpu_against_the_original(embedder, variant, name, dtype):
    case = Case(variant, name)
    options = {"num_crops": case.num_crops, "max_length": case.max_length, "convert_to": "torch"}
    vectors = {b: embedder(variant, dtype, b).encode(case.inputs, **options) for b in ("triton", "torch")}
    golden = case.tensors.get("pooled_each_row_alone", case.tensors["pooled"]).to("cuda")
    check({"kernels": vectors["triton"]}, vectors["torch"], golden)
    if dtype == torch.float32:
        assert (vectors["triton"] - golden).abs().max() <= 1e-4
