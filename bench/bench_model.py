"""The whole model, and the tower alone, at the published sizes with random weights: ours against every way of running
the same network that is known to us.

    model           ours, kernel by kernel             model_graphs    replayed as a CUDA graph
    model_prefixes  12 of 30 tokens in common          model_fp8       precision="fp8"
    tower           the image tower on crops           model_compiled  against one compiled graph of the decoder
    tower_graphs    the same, its layers replayed as a CUDA graph

Workloads: a 64 queries of 30 tokens; a1 one of them; b 32 images at 4 crops, with 20 tokens each; b1 one of them;
c 16 images at 16 crops; d a mixed list of queries, images of two shapes and long texts.

Providers: "triton" is ours; "torch" our torch path; "transformers eager" and "sdpa" are transformers' modules on the
right-padded batch, as the original runs them; "packed + compile" is our packed and pruned network with each layer
compiled and torch's varlen attention, the strongest peer that can be had without writing a kernel; "packed + whole
compile" has the tower and the decoder with its pooling compiled as one graph each, which takes minutes, so its cases
come last. No provider is timed whose vectors are not right: see `check_vectors`. An error is 1 - the smallest cosine
to float32.

FLOPs are those of `minivlm2vec.info`, bytes those of the weights: the floor is the larger of the two at the measured
peaks, and its share is the larger of pct_matmul and pct_copy.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.bench_attention import causal_option
from bench.common import OURS, REFERENCE, Case, Provider, Work, first_line, when_called
from minivlm2vec.batch import Grid, PackedBatch, cumulative, num_image_tokens
from minivlm2vec.config import VLM2VecConfig
from minivlm2vec.inference import FusedVLM2Vec, optimize
from minivlm2vec.inference.fp8 import KEEP, Fp8Linear
from minivlm2vec.inference.graphs import MAX_TOKENS, GraphedModel, GraphedTower, PaddedModel, TowerPrograms
from minivlm2vec.inference.prefix import SharedBatch, share_prefixes
from minivlm2vec.info import image_flops, text_flops, tower_flops
from minivlm2vec.model import VLM2Vec
from minivlm2vec.new_checkpoint import base_config
from minivlm2vec.weights import empty_model
from minivlm2vec_kernels import ops

FP8_COSINE = 0.9  # random weights are the hard case; what is asked of a trained model is another matter
WARM_UPS = 3  # of calls that take up to two seconds

# ------------------------------------------------------------------------------------------------- workloads


@dataclass(frozen=True)
class Workload:
    """Tokens of text of each sequence, the grid of its image where it has one, and the crops the original pads to."""

    texts: tuple[int, ...]
    grids: tuple[Grid | None, ...] = ()
    num_crops: int = 4
    in_common: int = 0  # the first tokens of every text


def with_image(texts: list[int], grid: Grid) -> tuple[tuple[int, Grid], ...]:
    return tuple((n, grid) for n in texts)


def mixed() -> Workload:
    """24 queries of 15 to 60 tokens, 24 square images with 30 to 80, 8 wide ones with 25, 8 texts of 300."""
    items = [(15 + i * 7 % 46, None) for i in range(24)]
    items += [*with_image([30 + i * 11 % 51 for i in range(24)], (2, 2)), *with_image([25] * 8, (1, 2))]
    items += [(300, None)] * 8
    return Workload(*map(tuple, zip(*items, strict=True)))


FULL = {
    "a1": Workload((30,)),
    "a": Workload((30,) * 64),
    "b": Workload((20,) * 32, ((2, 2),) * 32),
    "d": mixed(),
    "b1": Workload((20,), ((2, 2),)),
    "c": Workload((20,) * 16, ((4, 4),) * 16, num_crops=16),
}
SMALL = {  # for a CPU, at the `tiny` sizes
    "a1": Workload((30,)),
    "d": Workload((15, 20, 5, 100), (None, (2, 2), (1, 2), None)),
}
COMMON = Workload((30,) * 64, in_common=12)
MOSTLY_COMMON = Workload((30,) * 60, in_common=27)  # 1,800 tokens in 207 rows


def batch_of(config: VLM2VecConfig, work: Workload, device: torch.device) -> PackedBatch:
    """Random tokens and crops; an image's tokens come first."""
    generator, S = torch.Generator().manual_seed(0), config.vision.image_size
    images = [0 if g is None else num_image_tokens(g, config.vision.merged_per_side) for g in grids_of(work)]
    lengths = [n + i for n, i in zip(work.texts, images, strict=True)]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    places = [torch.arange(s, s + i) for s, i in zip(starts.tolist(), images, strict=False)]
    ids = torch.randint(1, config.decoder.vocab_size, (sum(lengths),), generator=generator)
    for s in starts[:-1]:
        ids[s : s + work.in_common] = torch.arange(1, work.in_common + 1)
    grids = tuple(g for g in grids_of(work) if g is not None)
    crops = torch.randint(0, 256, (sum(h * w for h, w in grids), S, S, 3), generator=generator, dtype=torch.uint8)
    return PackedBatch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=cumulative(lengths),
        lengths=tuple(lengths),
        crops=crops,
        grids=grids,
        image_index=torch.cat(places),
        image_source=torch.arange(sum(images)),
    ).to(device)


def grids_of(work: Workload) -> tuple[Grid | None, ...]:
    return work.grids or (None,) * len(work.texts)


def flops_of(config: VLM2VecConfig, batch: PackedBatch, in_common: int) -> int:
    flops = sum(text_flops(config, n) for n in batch.lengths) + sum(image_flops(config, g) for g in batch.grids)
    return flops - (len(batch.lengths) - 1) * text_flops(config, in_common, last_only=False) if in_common else flops


def bytes_of(model: VLM2Vec, images: bool) -> int:
    """Of the weights that have to be read: all but the table of embeddings, and the tower's where there are images."""
    parts = [model.decoder.layers, *([model.vision, model.projector] if images else [])]
    return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())


# ----------------------------------------------------------------------------------------------------- cases


def cases(device: torch.device) -> Iterator[Case]:
    full = device.type == "cuda"
    config = VLM2VecConfig.from_dict(base_config("full" if full else "tiny"))
    workloads = FULL if full else SMALL
    make = functools.partial(model_case, config, device)
    for name, work in workloads.items():
        yield make("model", name, work, baselines)
        if sum(batch_of(config, work, torch.device("cpu")).lengths) <= MAX_TOKENS:
            yield make("model_graphs", name, work, graphs)
    for name, work in {"a, 12 of 30": COMMON, "60 texts, 27 of 30": MOSTLY_COMMON}.items():
        yield make("model_prefixes", name, work if full else replace(work, texts=(30,) * 16), prefixes)
    for name in ("b", "a") if full else ("a1",):
        yield make("model_fp8", name, workloads[name], fp8)
    for crops in (160, 40, 5) if full else (3,):
        yield tower_case(config, device, "tower", crops)
    for crops in (2, 5, 8) if full else (3,):
        yield tower_case(config, device, "tower_graphs", crops)
    for name in ("a1", "d", "b") if full else ():
        yield make("model_compiled", name, workloads[name], compiled_whole)


def model_case(config, device, kernel: str, name: str, work: Workload, providers: Callable) -> Case:
    images = any(g is not None for g in grids_of(work))
    model = empty_model(config).to(dtype_of(device, kernel))
    batch = batch_of(config, work, torch.device("cpu"))
    return Case(
        kernel, name, dtype_of(device, kernel),
        flops=flops_of(config, batch, work.in_common), bytes=bytes_of(model, images), memory_bound=False,
        host_counts=True,
        items={"tokens": batch.num_tokens, "images": len(batch.grids)} if images else {"tokens": batch.num_tokens},
        build=functools.partial(build, config, device, dtype_of(device, kernel), work, providers),
        check=functools.partial(check_vectors, least=FP8_COSINE if kernel == "model_fp8" else None),
        warm_ups=WARM_UPS,
    )  # fmt: skip


def build(config, device, dtype, work: Workload, providers: Callable) -> Work:
    model, batch = random_model(config, dtype, device), batch_of(config, work, device)
    backend = "triton" if device.type == "cuda" else "torch"
    ours = fast(model, backend)
    found = {REFERENCE: functools.partial(sharing_weights(model, "torch"), batch)}
    return Work(found | providers(ours, batch, work), functools.partial(in_float32, model, batch))


def baselines(model: VLM2Vec, batch: PackedBatch, work: Workload) -> dict[str, Provider]:
    found = {OURS: functools.partial(model, batch)} if model.backend == "triton" else {}
    return found | transformers_padded(model, batch, work.num_crops) | packed_compiled(model, batch)


def graphs(model: FusedVLM2Vec, batch: PackedBatch, work: Workload) -> dict[str, Provider]:
    if model.backend != "triton":  # the padding alone
        return {"padded": functools.partial(PaddedModel(model, make_at=1), batch)}
    found = {
        OURS: functools.partial(GraphedModel(with_tower_graphs(model), make_at=1), batch),
        "no graph": functools.partial(model, batch),
    }
    if batch.grids:
        found["tower without graph"] = functools.partial(GraphedModel(model, make_at=1), batch)
    if batch.cu_seqlens.is_cuda:
        peer = when_called(lambda: functools.partial(CapturedPeer(PackedCompiled(model), batch), batch))
        found["packed + compile + graph"] = peer
    return found


def with_tower_graphs(model: FusedVLM2Vec) -> FusedVLM2Vec:
    """Another fast model on the same tensors, whose tower's layers are replayed."""
    other = fast(model, model.backend)
    kind = GraphedTower if model.backend == "triton" else TowerPrograms
    other.vision.graphs = kind(other, make_at=1)
    return other


def prefixes(model: VLM2Vec, batch: PackedBatch, work: Workload) -> dict[str, Provider]:
    shared = share_prefixes(batch.to("cpu"), 10**9, weight_bound_rows=0)
    assert isinstance(shared, SharedBatch)
    name = OURS if model.backend == "triton" else "shared"
    alone = GraphedModel(model, make_at=1) if model.backend == "triton" else model  # replayed where it fits
    return {
        name: functools.partial(model, shared.to(batch.cu_seqlens.device)),
        "not shared": functools.partial(alone, batch),
    }


def fp8(model: VLM2Vec, batch: PackedBatch, work: Workload) -> dict[str, Provider]:
    make = functools.partial(fast, model, model.backend, precision="fp8")
    name = OURS if model.backend == "triton" else "fp8"
    found = {name: functools.partial(make(), batch), "bf16": functools.partial(model, batch)}
    if model.backend == "triton":
        with_o_proj, fast_accum = make(fp8_keep=[x for x in KEEP if "o_proj" not in x]), make()
        for module in fast_accum.modules():
            if isinstance(module, Fp8Linear):
                module.fast_accum = True
        found |= {"fp8, o_proj too": functools.partial(with_o_proj, batch)}
        found |= {"fp8, fast accum": functools.partial(fast_accum, batch)}
    return found


def compiled_whole(model: VLM2Vec, batch: PackedBatch, work: Workload) -> dict[str, Provider]:
    peer = when_called(lambda: functools.partial(PackedCompiled(model, whole=True), batch))
    return {OURS: functools.partial(model, batch), "packed + whole compile": peer}


def tower_case(config, device, kernel: str, crops: int) -> Case:
    """One tall image, whose crops and global view are `crops` in all."""
    dtype, grid = dtype_of(device, kernel), (crops - 1, 1)
    weights = sum(p.numel() for p in empty_model(config).vision.parameters()) * dtype.itemsize
    return Case(
        kernel, f"{crops} crops", dtype,
        flops=tower_flops(config, crops), bytes=weights, memory_bound=False,
        host_counts=True,
        items={"crops": crops},
        build=functools.partial(build_tower, config, device, dtype, grid, kernel == "tower_graphs"),
        check=check_vectors, warm_ups=WARM_UPS,
    )  # fmt: skip


def build_tower(config, device, dtype, grid: Grid, graphs: bool) -> Work:
    model = random_model(config, dtype, device)
    S, on_card = config.vision.image_size, device.type == "cuda"
    crops = torch.randint(0, 256, (grid[0] * grid[1], S, S, 3), dtype=torch.uint8, device=device)
    torchs, ours = sharing_weights(model, "torch"), fast(model, "triton" if on_card else "torch")
    found = {REFERENCE: lambda: torchs.vision(crops, (grid,))}
    if graphs:
        replayed = with_tower_graphs(ours)
        found[OURS if on_card else "by programs"] = lambda: replayed.vision(crops, (grid,))
        found["no graph"] = lambda: ours.vision(crops, (grid,))
    elif on_card:
        found[OURS] = lambda: ours.vision(crops, (grid,))
        peer = functools.cache(lambda: PackedCompiled(model))
        found["compile + varlen_attn"] = lambda: peer().tower(crops, (grid,))
    return Work(found, lambda: in_float32_copy(model).vision(crops, (grid,)))


# ---------------------------------------------------------------------------------------------- right or wrong


def check_vectors(work: Work, case: Case, *, least: float | None = None) -> dict[str, tuple[float, bool]]:
    """1 - the smallest cosine to float32 of each provider, and whether it may be timed: at most 4 times that of our
    torch path in the same dtype (an angle of twice its size), and in any case 1e-5. `least`: ours may be as far as
    this cosine, because it trades accuracy."""
    exact, vectors = work.exact().flatten(0, -2).float(), {}
    for name, provider in work.providers.items():
        try:
            vectors[name] = provider().flatten(0, -2).float()
        except Exception as error:
            if name in (OURS, REFERENCE):
                raise
            print(f"{case.kernel} {case.name}: no {name}: {type(error).__name__}: {first_line(error)}")
    cosines = {name: F.cosine_similarity(x, exact, dim=-1) for name, x in vectors.items()}
    errors = {name: 1 - c.min().item() for name, c in cosines.items()}
    usual = max(4 * errors[REFERENCE], 1e-5)
    limits = {name: 1 - least if least and (name == OURS or "fp8" in name) else usual for name in errors}
    for name, c in cosines.items():
        verdict = "" if errors[name] <= limits[name] else f", below {1 - limits[name]:.6f}: not timed"
        print(f"{case.kernel} {case.name}: {name}: cosine to float32 {c.mean():.6f}, smallest {c.min():.6f}{verdict}")
    fp8 = next((x for n, x in vectors.items() if n in (OURS, "fp8")), None)
    if least and fp8 is not None and "bf16" in vectors:
        c = F.cosine_similarity(fp8, vectors["bf16"], dim=-1)
        print(f"{case.kernel} {case.name}: cosine of fp8 to bf16 {c.mean():.6f}, smallest {c.min():.6f}")
    return {name: (error, error <= limits[name]) for name, error in errors.items()}


def in_float32(model: VLM2Vec, batch: PackedBatch) -> Tensor:
    return in_float32_copy(model)(batch)


def in_float32_copy(model: VLM2Vec) -> VLM2Vec:
    copy = empty_model(model.config, backend="torch")
    for name, p in model.named_parameters():
        _set(copy, name, p.float())
    return copy.requires_grad_(False).eval()


# --------------------------------------------------------------------------------------------------- the models


@functools.lru_cache(maxsize=1)
def random_model(config: VLM2VecConfig, dtype: torch.dtype, device: torch.device) -> VLM2Vec:
    """Made on the device: matrices of variance 1 / fan-in, norms of ones, biases of little."""
    model = empty_model(config).to(dtype).to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(0)
    for name, p in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            p.fill_(1)
        else:
            p.normal_(0, 0.02 if p.dim() == 1 else p[0].numel() ** -0.5, generator=generator)
    return model


def sharing_weights(model: VLM2Vec, backend: str) -> VLM2Vec:
    """A plain model on the same tensors."""
    other = empty_model(model.config, backend=backend)
    for name, p in model.named_parameters():
        _set(other, name, p)
    return other.requires_grad_(False).eval()


def fast(model: VLM2Vec, backend: str | None, **options) -> FusedVLM2Vec:
    """A fast model on the same tensors: without graphs and packing."""
    return optimize(sharing_weights(model, backend), cuda_graphs=False, prepack=False, **options)


def _set(model: VLM2Vec, name: str, value: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, torch.nn.Parameter(value, requires_grad=False))


def dtype_of(device: torch.device, kernel: str) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" or kernel == "model_fp8" else torch.float32


# --------------------------------------------------------------------------------------------------- the others


def transformers_padded(model: VLM2Vec, batch: PackedBatch, num_crops: int) -> dict[str, Provider]:
    if not importlib.util.find_spec("transformers"):
        print("transformers is not installed: its modules are not among the baselines")
        return {}

    def run(attention: str) -> Tensor:
        original = original_way(model)
        for part in (original.tower, original.decoder):
            part.set_attn_implementation(attention)
        return original(batch, num_crops)

    return {f"transformers {x}": functools.partial(run, x) for x in ("eager", "sdpa")}


_ORIGINAL: dict[int, torch.nn.Module] = {}  # the last one made: it copies the weights


def original_way(model: VLM2Vec) -> torch.nn.Module:
    from bench.original_way import OriginalWay

    address = model.decoder.norm.weight.data_ptr()
    if address not in _ORIGINAL:
        _ORIGINAL.clear()
        _ORIGINAL[address] = OriginalWay(model)
    return _ORIGINAL[address]


def packed_compiled(model: VLM2Vec, batch: PackedBatch) -> dict[str, Provider]:
    """On CUDA alone: torch's varlen attention has no other."""
    if not batch.cu_seqlens.is_cuda:
        return {}
    return {"packed + compile": when_called(lambda: functools.partial(PackedCompiled(model), batch))}


class PackedCompiled:
    """Our packed network without our kernels: each layer compiled for the case's shapes (one compilation serves all
    layers), attention by torch's varlen_attn.

    whole: instead, the tower is one graph, and the decoder another.
    attention, backend: other attention than varlen_attn, and another compiler, where there is no card.
    """

    def __init__(
        self,
        model: VLM2Vec,
        *,
        whole: bool = False,
        attention: Callable | None = None,
        backend: str | Callable = "inductor",
    ):
        torch._dynamo.reset()
        self.model, self._attention = sharing_weights(model, "torch"), attention or varlen_attention()
        options = {"dynamic": False, "fullgraph": whole, "backend": backend}
        vision, decoder = self.model.vision, self.model.decoder
        for module in [vision, decoder] if whole else [*vision.layers, *decoder.layers]:
            module.compile(**options)

    def __call__(self, batch: PackedBatch) -> Tensor:
        with self._torch_ops():
            return self.model(batch)

    def tower(self, crops: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        with self._torch_ops():
            return self.model.vision(crops, grids)

    @contextmanager
    def _torch_ops(self) -> Iterator[None]:
        before, ops.attention = ops.attention, self._attention
        try:
            yield
        finally:
            ops.attention = before


def varlen_attention() -> Callable[..., Tensor]:
    """torch's varlen_attn with the arguments of `ops.attention`."""
    from torch.nn.attention.varlen import varlen_attn

    mask = causal_option(varlen_attn)

    def attention(q, k, v, cu_seqlens, max_seqlen, *, causal, cu_seqlens_q=None, max_seqlen_q=None, **_) -> Tensor:
        if cu_seqlens_q is None:
            cu_seqlens_q, max_seqlen_q = cu_seqlens, max_seqlen
        options = mask if causal else {}
        return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens, max_seqlen_q, max_seqlen, **options)

    return attention


class CapturedPeer:
    """A CUDA graph of the peer's decoder and pooling, called as ours is: inputs are embedded and copied to where the
    graph reads them, and its vectors are copied out."""

    def __init__(self, peer: PackedCompiled, batch: PackedBatch):
        self.peer, self.x = peer, peer.model.embed(batch).clone()
        self.batch = replace(batch, position_ids=batch.position_ids.clone(), cu_seqlens=batch.cu_seqlens.clone())
        self._decode()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = self._decode()

    def _decode(self) -> Tensor:
        with mock.patch.object(self.peer.model, "embed", lambda batch: self.x):
            return self.peer(self.batch)

    def __call__(self, batch: PackedBatch) -> Tensor:
        with self.peer._torch_ops():
            self.x.copy_(self.peer.model.embed(batch))
        self.batch.position_ids.copy_(batch.position_ids)
        self.batch.cu_seqlens.copy_(batch.cu_seqlens)
        self.graph.replay()
        return self.out.clone()
