"""Attention of the decoder (causal, 32 heads of 96) and of the image tower (full, 16 heads of 64).

Every provider gets the same values: packed views of one qkv buffer, or, where it cannot take packed
sequences, a batch padded at the end (made outside the timing; taking the padding out again is inside). FLOPs
are useful ones: the causal half, no padding. --sweep times the kernel with every tile that fits.
"""

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.common import Case, Provider, Work, compiled, when_called
from bench.shapes import CROP, H, N, dtype_of
from minivlm2vec_kernels import attention, cards, torch_ops
from minivlm2vec_kernels.tile_schedule import TileSchedule


class Problem(NamedTuple):
    name: str
    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    causal: bool
    last_only: bool = False  # one query a sequence: the pruned last layer


# 24 short texts, 24 images of 4 crops with a text, 8 wide ones, 8 long texts
MIXED = (
    *(15 + i * 7 % 46 for i in range(24)),
    *(757 + 30 + i * 11 % 51 for i in range(24)),
    *(457 + 25,) * 8,
    *(300,) * 8,
)
DECODER = {
    "64x30": (30,) * 64,
    "64x60": (60,) * 64,
    "32x777": (777,) * 32,
    "16x2529": (2529,) * 16,
    "mixed": MIXED,
    "4x4096": (4096,) * 4,
}
GPU_PROBLEMS = (
    *(Problem(name, lengths, N, H, causal=True) for name, lengths in DECODER.items()),
    Problem("last tokens of 32x777", (777,) * 32, N, H, causal=True, last_only=True),
    *(Problem(f"{crops} crops x {CROP}", (CROP,) * crops, 16, 64, causal=False) for crops in (5, 40, 160, 272)),
)
CPU_PROBLEMS = (
    Problem("4x30", (30,) * 4, 2, H, causal=True),
    Problem("4 lengths", (15, 60, 300, 1), 2, H, causal=True),
    Problem(f"2 crops x {CROP}", (CROP,) * 2, 2, 64, causal=False),
)


class Inputs(NamedTuple):
    q: Tensor  # [Tq, N, H]
    k: Tensor  # [Tk, N, H]
    v: Tensor  # [Tk, N, H]
    cu_q: Tensor  # [B + 1] int32
    cu_k: Tensor  # [B + 1] int32
    max_q: int
    max_k: int


def cases(device: torch.device, providers: Callable | None = None, suffix: str = "") -> Iterator[Case]:
    providers = providers or all_providers
    for p in GPU_PROBLEMS if device.type == "cuda" else CPU_PROBLEMS:
        yield Case(
            kernel=f"attention {'causal' if p.causal else 'full'} {p.head_dim}{suffix}",
            name=p.name,
            dtype=dtype_of(device),
            flops=useful_flops(p),
            bytes=moved_elements(p) * dtype_of(device).itemsize,
            build=partial(build, p, device, providers),
            memory_bound=p.last_only,
        )


def sweep(device: torch.device) -> Iterator[Case]:
    if cards.card(torch.cuda.current_device()).tensor_cores:  # else one tile is for all
        yield from cases(device, tile_providers, f" {table()}")


def table() -> str:
    """Which of the kernel's tables this card takes its tiles from: "tma" and "pointers" of TILES, "small" of 64 KB."""
    card = cards.card(torch.cuda.current_device())
    return "small" if card.small else "tma" if card.name == "sm_90" else "pointers"


def row(p: Problem, table: str) -> tuple[str, tuple[int, int]]:
    """Part of a table, as the kernel's file has it, and the row (queries, keys) that a problem takes its tile from."""
    from minivlm2vec_kernels.attention_triton import SMALL_TILES, TILES

    if table == "small":
        widest = next(widest for widest in SMALL_TILES if widest >= p.head_dim)
        name, rows = f"SMALL_TILES[{widest}]", SMALL_TILES[widest]
    else:
        name, rows = f"TILES[{p.causal}, {table == 'tma'}]", TILES[p.causal, table == "tma"]
    queries, keys = 1 if p.last_only else max(p.lengths), max(p.lengths)
    return name, next(limits for limits in rows if queries <= limits[0] and keys <= limits[1])


def build(p: Problem, device: torch.device, providers: Callable) -> Work:
    x = make_inputs(p, device)
    exact = x._replace(q=x.q.float(), k=x.k.float(), v=x.v.float())
    return Work(providers(p, x), partial(by_torch, p, exact))


# ------------------------------------------------------------------------------------------------- the inputs


def make_inputs(p: Problem, device: torch.device) -> Inputs:
    """Normal random values; q, k, v are views of one buffer, as in the model."""
    generator = torch.Generator(device).manual_seed(0)
    size = (sum(p.lengths), 3, p.heads, p.head_dim)
    q, k, v = torch.randn(size, device=device, dtype=dtype_of(device), generator=generator).unbind(1)
    cu = cumulated(p.lengths, device)
    longest = max(p.lengths)
    if not p.last_only:
        return Inputs(q, k, v, cu, cu, longest, longest)
    return Inputs(q[cu[1:].long() - 1], k, v, cumulated([1] * len(p.lengths), device), cu, 1, longest)


def cumulated(lengths, device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def useful_flops(p: Problem) -> int:
    """Two matmuls of 2 H FLOPs for each pair of a query and a key that it sees."""
    if p.last_only:
        pairs = sum(p.lengths)
    elif p.causal:
        pairs = sum(L * (L + 1) // 2 for L in p.lengths)
    else:
        pairs = sum(L * L for L in p.lengths)
    return 4 * p.head_dim * p.heads * pairs


def moved_elements(p: Problem) -> int:
    """k and v read once, q read and the output written once."""
    queries = len(p.lengths) if p.last_only else sum(p.lengths)
    return 2 * (sum(p.lengths) + queries) * p.heads * p.head_dim


# ---------------------------------------------------------------------------------------------- the providers


def all_providers(p: Problem, x: Inputs) -> dict[str, Provider]:
    found: dict[str, Provider] = {"torch": partial(by_torch, p, x)}
    if not x.q.is_cuda:
        return found
    found["triton"] = partial(by_triton, p, x)
    if len(set(p.lengths)) > 1 and not p.last_only:
        found["triton, scheduled"] = partial(by_triton, p, x, TileSchedule(p.lengths))
    found |= sdpa_providers(p, x)
    found["varlen_attn (FA2)"] = when_called(partial(varlen_provider, p, x))
    if importlib.util.find_spec("fa3_fwd_interface"):
        found["FA3"] = when_called(partial(fa3_provider, p, x))
    if not p.last_only:
        found["FlexAttention"] = when_called(partial(flex_provider, p, x))
    return found


def by_triton(p: Problem, x: Inputs, schedule: TileSchedule | None = None) -> Tensor:
    return attention(
        x.q, x.k, x.v, x.cu_k, x.max_k,
        causal=p.causal, cu_seqlens_q=x.cu_q, max_seqlen_q=x.max_q, schedule=schedule, backend="triton",
    )  # fmt: skip


def by_torch(p: Problem, x: Inputs) -> Tensor:
    return torch_ops.attention(x.q, x.k, x.v, x.cu_k, causal=p.causal, cu_seqlens_q=x.cu_q)


def sdpa_providers(p: Problem, x: Inputs) -> dict[str, Provider]:
    """torch's SDPA on a batch padded at the end: under a causal mask no real token sees the padding."""
    equal = len(set(p.lengths)) == 1
    assert equal or (p.causal and not p.last_only), "would need a mask"
    own = (1,) * len(p.lengths) if p.last_only else p.lengths
    q, k, v = padded(x.q, own), padded(x.k, p.lengths), padded(x.v, p.lengths)  # [B, N, L, H]
    keep = None if equal else positions(own).to(x.q.device)

    def call() -> Tensor:
        out = sdpa(q, k, v, is_causal=p.causal and not p.last_only).transpose(1, 2).flatten(0, 1)
        return out if keep is None else out[keep]

    def forced(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return call()

    return {
        "SDPA default": call,
        "SDPA flash": partial(forced, SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": partial(forced, SDPBackend.CUDNN_ATTENTION),
        "SDPA efficient": partial(forced, SDPBackend.EFFICIENT_ATTENTION),
    }


def varlen_provider(p: Problem, x: Inputs) -> Provider:
    """FlashAttention 2 inside torch."""
    from torch.nn.attention.varlen import varlen_attn

    options = causal_option(varlen_attn) if p.causal else {}
    return partial(varlen_attn, x.q, x.k, x.v, x.cu_q, x.cu_k, x.max_q, x.max_k, **options)


def causal_option(varlen_attn) -> dict:
    """How one asks for a causal mask changed after torch 2.10."""
    windows = "window_size" in inspect.signature(varlen_attn).parameters
    return {"window_size": (-1, 0)} if windows else {"is_causal": True}


def fa3_provider(p: Problem, x: Inputs) -> Provider:
    """FlashAttention 3: `pip install fa3-fwd`."""
    from fa3_fwd_interface import flash_attn_varlen_func

    def call() -> Tensor:
        out = flash_attn_varlen_func(
            x.q, x.k, x.v, x.cu_q, x.cu_k, max_seqlen_q=x.max_q, max_seqlen_k=x.max_k, causal=p.causal
        )
        return out[0] if isinstance(out, tuple) else out

    return call


def flex_provider(p: Problem, x: Inputs) -> Provider:
    """FlexAttention, compiled, on the whole pack as one sequence with a block mask of documents."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = x.q.shape[0]
    numbers = torch.arange(len(p.lengths), device=x.q.device)
    document = torch.repeat_interleave(numbers, x.cu_k.diff().long(), output_size=T)

    def mask(b, h, i, j):
        same = document[i] == document[j]
        return same & (i >= j) if p.causal else same

    block_mask = create_block_mask(mask, None, None, T, T, device=x.q.device, _compile=True)
    call = compiled(flex_attention)
    q, k, v = (t.transpose(0, 1)[None] for t in (x.q, x.k, x.v))  # [1, N, T, H]
    return lambda: call(q, k, v, block_mask=block_mask)[0].transpose(0, 1)


def padded(t: Tensor, lengths: Sequence[int]) -> Tensor:
    """[T, N, H] to [B, N, L, H]: a view where lengths are equal, zeros after short sequences otherwise."""
    if len(set(lengths)) == 1:
        return t.unflatten(0, (len(lengths), -1)).transpose(1, 2)
    return torch.nn.utils.rnn.pad_sequence(t.split(lengths), batch_first=True).transpose(1, 2)


def positions(lengths: Sequence[int]) -> Tensor:
    """Where each packed row lies in the padded batch, as rows of [B * L, ...]."""
    return torch.cat([torch.arange(n) + b * max(lengths) for b, n in enumerate(lengths)])


# -------------------------------------------------------------------------------------------------- the sweep


def tile_providers(p: Problem, x: Inputs) -> dict[str, Provider]:
    """The kernel with every tile of a grid; "triton" is the one that its table chooses."""
    from minivlm2vec_kernels import attention_triton as kernel

    tma = kernel.supports_tma(x.q, x.k, x.v)
    chosen = kernel.tile_for(x.q, x.k, x.v, x.max_q, x.max_k, p.causal)
    shapes = [(16, 32, 2), (16, 64, 4), (16, 128, 4), (32, 32, 2), (32, 32, 4), (32, 64, 4), (64, 32, 4)]
    shapes += [(64, 64, 4), (64, 128, 4), (128, 32, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8)]
    _, (_, keys) = row(p, table())
    tiles = [
        kernel.Tile(*shape, stages, descriptors)
        for shape in shapes
        for stages in ((1, 2, 3, 4) if keys > shape[1] else (1,))  # of one block there is no loop
        for descriptors in ((False, True) if tma and keys > shape[1] else (False,))
    ]
    calls: dict[str, Provider] = {"torch": partial(by_torch, p, x), "triton": partial(by_triton, p, x)}
    for tile in tiles:
        name = f"{tile.BM}x{tile.BN} w{tile.warps} s{tile.stages} {'tma' if tile.tma else 'pointers'}"
        name += " (as triton)" if tile == chosen else ""
        calls[name] = partial(kernel.launch, x.q, x.k, x.v, x.cu_k, x.max_k, x.cu_q, x.max_q, p.causal, None, tile)
    return calls
