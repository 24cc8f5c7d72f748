"""The varlen attention kernel against its reference: in the interpreter, and on a card with -m gpu."""

import pytest
import torch

from minivlm2vec_kernels import attention, attention_triton, reference
from minivlm2vec_kernels.attention_triton import NO_TENSOR_CORES_TILE, SMALL_TILES, TILES, Tile
from tests.kernels.kernel_cases import cumulated

HEAD_DIMS = (32, 48, 64, 80, 96, 128)
LOOPS = Tile(64, 64, 4, 2)  # one that walks over several blocks of keys
TABLES = (*TILES.values(), *SMALL_TILES.values())
EVERY_TILE = list(dict.fromkeys([*(t for table in TABLES for t in table.values()), NO_TENSOR_CORES_TILE]))

pytestmark = pytest.mark.usefixtures("poison_empty")


def packed(lengths, N, Nkv, H, dtype, generator, q_lengths=None):
    """Random q, k, v as views of one qkv buffer (where queries are as many as keys), and both cu_seqlens."""
    q_lengths = q_lengths or lengths
    device = generator.device
    width = {"device": device, "generator": generator}
    qkv = torch.randn(sum(lengths), (N + 2 * Nkv) * H, **width).to(dtype)
    q, k, v = (x.unflatten(1, (-1, H)) for x in qkv.split([N * H, Nkv * H, Nkv * H], dim=1))
    if q_lengths != lengths:
        q = torch.randn(sum(q_lengths), N, H, **width).to(dtype)
    return q, k, v, cumulated(q_lengths, device), cumulated(lengths, device)


def kernel(q, k, v, cu_q, cu_k, causal, tile=None, scale=None):
    """The kernel with `tile`, or with the one that its launcher chooses."""
    max_q, max_k = cu_q.diff().max().item(), cu_k.diff().max().item()
    if tile is not None:
        return attention_triton.launch(q, k, v, cu_k, max_k, cu_q, max_q, causal, scale, tile)
    return attention(
        q,
        k,
        v,
        cu_k,
        max_k,
        causal=causal,
        scale=scale,
        cu_seqlens_q=cu_q,
        max_seqlen_q=max_q,
        backend="triton",
    )


def torch_reference(q, k, v, cu_q, cu_k, causal, dtype, scale=None):
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return reference.attention(q, k, v, cu_k, causal=causal, scale=scale, cu_seqlens_q=cu_q)


def check(assert_error_at_most, q, k, v, cu_q, cu_k, causal, tile=None, scale=None):
    out = kernel(q, k, v, cu_q, cu_k, causal, tile, scale)
    same = torch_reference(q, k, v, cu_q, cu_k, causal, q.dtype, scale)
    exact = torch_reference(
        q, k, v, cu_q, cu_k, causal, torch.float64 if q.dtype == torch.float32 else torch.float32, scale
    )
    assert out.is_contiguous()
    assert_error_at_most(out, same, exact)
    return out


# ---------------------------------------------------------------------------- correctness, in the interpreter


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 17, 30, 63, 577, 777, 1000])
def test_one_sequence_of_awkward_length(length, causal, generator, assert_error_at_most):
    H = 96 if causal else 64
    check(assert_error_at_most, *packed([length], 1, 1, H, torch.float16, generator), causal)


@pytest.mark.parametrize("H", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_head_dim(H, dtype, generator, assert_error_at_most):
    check(assert_error_at_most, *packed([70, 1, 33], 2, 2, H, dtype, generator), True)


@pytest.mark.parametrize("tile", EVERY_TILE, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_every_tile_with_pointers_and_with_descriptors(tile, causal, generator, assert_error_at_most):
    n = max(tile.BM, tile.BN)
    inputs = packed([n + 1, 1, 2 * n + 2, n], 2, 1, 96, torch.float16, generator)
    for tma in (False, True):
        check(assert_error_at_most, *inputs, causal, tile._replace(tma=tma))


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rest", [0, 1, 15, 16, 17, 62, 63])
def test_rests_beside_whole_blocks(rest, causal, tma, generator, assert_error_at_most):
    """Both sides of each choice: a block of TAIL or a whole one, a masked block or an unmasked one."""
    inputs = packed([128 + rest], 1, 1, 64, torch.float16, generator)
    check(assert_error_at_most, *inputs, causal, LOOPS._replace(tma=tma))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("k_length", [63, 64, 65, 127, 129, 200])
def test_last_block_of_a_descriptor_ends_with_its_sequence(k_length, causal, generator, assert_error_at_most):
    """Between neighbours of NaN, fewer queries than keys and as many: no key is seen twice, and no other sequence's."""
    tile = Tile(32, 64, 4, 2, True)
    for queries in (k_length, 40, 3):
        lengths, q_lengths = [70, k_length, 90], [1, queries, 2]
        q, k, v, cu_q, cu_k = packed(lengths, 2, 1, 96, torch.float16, generator, q_lengths)
        exact = torch_reference(q, k, v, cu_q, cu_k, causal, torch.float32)[1 : 1 + queries]
        same = torch_reference(q, k, v, cu_q, cu_k, causal, q.dtype)[1 : 1 + queries]
        for x in (k, v):
            x[:70], x[70 + k_length :] = float("nan"), float("nan")
        assert_error_at_most(kernel(q, k, v, cu_q, cu_k, causal, tile)[1 : 1 + queries], same, exact)


@pytest.mark.parametrize("N, Nkv", [(4, 1), (4, 2), (3, 3)])
def test_grouped_query_heads(N, Nkv, generator, assert_error_at_most):
    check(assert_error_at_most, *packed([40, 1, 70], N, Nkv, 32, torch.float16, generator), True)


@pytest.mark.parametrize("tile", [None, LOOPS, LOOPS._replace(tma=True), Tile(16, 64, 4, 2)], ids=str)
@pytest.mark.parametrize("q_lengths", [[1, 1, 1, 1], [5, 1, 30, 100], [20, 1, 7, 0]])
@pytest.mark.parametrize("causal", [True, False])
def test_fewer_queries_than_keys(causal, q_lengths, tile, generator, assert_error_at_most):
    """The last tokens of each sequence see all that precedes them: pruned last layer, shared prefixes."""
    inputs = packed([130, 1, 64, 200], 2, 1, 48, torch.float16, generator, q_lengths)
    check(assert_error_at_most, *inputs, causal, tile)


def test_last_tokens_are_the_last_rows_of_the_whole(generator):
    q, k, v, cu, _ = packed([70, 1, 16], 1, 1, 48, torch.float32, generator)
    whole = kernel(q, k, v, cu, cu, True)
    last = kernel(q[cu[1:].long() - 1], k, v, cumulated([1, 1, 1], q.device), cu, True)
    torch.testing.assert_close(last, whole[cu[1:].long() - 1], rtol=0, atol=1e-6)


def test_a_sequence_is_the_same_alone_and_in_any_pack(generator):
    """Bit for bit, with one tile: neighbours, even NaN ones, do not reach it."""
    q, k, v, cu, _ = packed([70, 90, 50], 2, 2, 96, torch.float16, generator)
    for tile in (LOOPS, LOOPS._replace(tma=True)):
        for causal in (True, False):
            alone_cu = cumulated([90], q.device)
            alone = kernel(q[70:160], k[70:160], v[70:160], alone_cu, alone_cu, causal, tile)
            for x in (q, k, v):
                x[:70], x[160:] = float("nan"), float("nan")
            assert torch.equal(kernel(q, k, v, cu, cu, causal, tile)[70:160], alone)


def test_strided_views_need_no_copy(generator, assert_error_at_most):
    """Heads before tokens, a slice of a wider head, a storage offset that no descriptor could take."""
    cu = cumulated([50, 41], generator.device)
    make = {"generator": generator, "device": generator.device}
    q = torch.randn(2, 91, 64, **make).half().transpose(0, 1)
    k = torch.randn(91, 2, 80, **make).half()[..., 3:67]
    v = torch.randn(91 * 2 * 64 + 1, **make).half()[1:].view(91, 2, 64)
    assert not attention_triton.is_aligned(k) and not attention_triton.is_aligned(v)
    assert attention_triton.is_aligned(q)
    check(assert_error_at_most, q, k, v, cu, cu, True)


def test_large_scores_do_not_overflow(generator, assert_error_at_most):
    q, k, v, cu, _ = packed([100], 1, 1, 64, torch.float32, generator)
    check(assert_error_at_most, 100 * q, 100 * k, v, cu, cu, True)


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_scale(scale, generator, assert_error_at_most):
    check(assert_error_at_most, *packed([70], 1, 1, 32, torch.float32, generator), True, scale=scale)


def test_queries_before_the_first_key_get_zeros(generator):
    q, k, v, cu_q, cu_k = packed([3, 0], 1, 1, 32, torch.float32, generator, q_lengths=[5, 2])
    out = kernel(q, k, v, cu_q, cu_k, True)
    assert (out[:2] == 0).all() and (out[5:] == 0).all() and (out[2:5] != 0).any(dim=(1, 2)).all()


@pytest.mark.parametrize("tma", [False, True])
def test_no_keys_at_all(tma, generator, monkeypatch):
    """No descriptor can be made of none: the driver refuses a dimension of 0."""
    described = []
    monkeypatch.setattr(attention_triton, "TensorDescriptor", lambda x, shape, *a: described.append(shape))
    q, k, v, cu_q, cu_k = packed([0, 0], 1, 1, 32, torch.float32, generator, q_lengths=[5, 2])
    lse = torch.zeros(1, 7, device=q.device)
    out = attention_triton.launch(q, k, v, cu_k, 100, cu_q, 5, True, None, Tile(16, 16, 4, 1, tma), lse)
    assert (out == 0).all() and out.shape == q.shape and (lse == float("inf")).all() and not described


def test_no_tokens(generator):
    q, k, v, cu_q, cu_k = packed([0, 0], 2, 2, 64, torch.float32, generator)
    assert kernel(q, k, v, cu_q, cu_k, True).shape == (0, 2, 64)


def test_compiles_without_a_graph_break(generator):
    q, k, v, cu, _ = packed([30, 1, 50], 2, 2, 96, torch.float32, generator)

    def doubled(q, k, v, cu):
        return 2 * attention(q, k, v, cu, 50, causal=True, backend="triton")

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, cu), doubled(q, k, v, cu))


def test_op_passes_torchs_own_checks(generator):
    q, k, v, cu, _ = packed([30, 1], 2, 1, 32, torch.float32, generator)
    torch.library.opcheck(attention_triton.attention.op, (q, k, v, cu, 30, True, None, None, None))


# --------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "H, parts",
    [(16, (16, 0)), (32, (32, 0)), (48, (32, 16)), (80, (64, 16)), (96, (64, 32)), (128, (128, 0))],
)
def test_head_dim_is_split_into_powers_of_two(H, parts):
    assert attention_triton.split_head_dim(H) == parts


@pytest.mark.parametrize("H", [8, 40, 72, 112, 256])
def test_other_head_dims_are_refused(H):
    with pytest.raises(ValueError, match=f"head dim {H}"):
        attention_triton.split_head_dim(H)


def test_every_length_has_a_tile():
    for causal, tma in TILES:
        for q in (1, 16, 17, 32, 33, 64, 65, 1024, 1025, 131072):
            for k in (q, 131072):
                tile = attention_triton.choose_tile(96, q, k, causal, tma, torch.bfloat16)
                assert tma or not tile.tma
                wide = attention_triton.choose_tile(192, q, k, causal, tma, torch.bfloat16)
                assert wide == tile if tile.tma else wide in SMALL_TILES[192].values()
    assert attention_triton.choose_tile(96, 777, 777, True, True, torch.float32) == NO_TENSOR_CORES_TILE


def test_user_errors_name_the_input(generator):
    """At the first call and at later ones, whatever was right in between."""
    q, k, v, cu, _ = packed([8, 8], 2, 2, 32, torch.float16, generator)
    right = {"q": q, "k": k, "v": v, "cu_seqlens": cu, "max_seqlen": 8, "scale": None}
    for named, changed in 2 * [
        ("k: the last dimension", {"k": k.transpose(0, 2).contiguous().transpose(0, 2)}),
        ("v is torch.float32", {"v": v.float()}),
        ("cu_seqlens must be dense int32", {"cu_seqlens": cu.long()}),
        ("cu_seqlens must be dense int32", {"cu_seqlens": cu.repeat_interleave(2)[::2]}),
        ("cu_seqlens_q must be dense int32", {"cu_seqlens_q": cu.long(), "max_seqlen_q": 8}),
        ("cu_seqlens has 3 entries, cu_seqlens_q 2", {"cu_seqlens_q": cu[::2].contiguous(), "max_seqlen_q": 16}),
        ("do not go together", {"v": v[:7]}),
        ("q must be float16", {"q": q.double(), "k": k.double(), "v": v.double()}),
        ("scale must be positive, got -1", {"scale": -1.0}),
    ]:
        with pytest.raises(ValueError, match=named):
            attention(**(right | changed), causal=True, backend="triton")
        attention(**right, causal=True, backend="triton")


def test_descriptors_want_rows_of_heads_on_multiples_of_16_bytes():
    x = torch.empty(4 * 3 * 64 + 8, dtype=torch.bfloat16)
    for strides, offset, aligned in [
        ((192, 64), 0, True), ((192, 64), 8, True), ((192, 64), 4, False),
        ((188, 64), 0, False), ((192, 60), 0, False), ((0, 64), 0, False), ((192, 0), 0, False),
    ]:  # fmt: skip
        view = x.as_strided((4, 3, 32), (*strides, 1), offset)
        assert attention_triton.is_aligned(view) is aligned, (strides, offset)


# -------------------------------------------------------------------------------------------------- on a card


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("H", HEAD_DIMS)
def test_gpu_head_dims(H, causal, dtype, generator, assert_error_at_most):
    check(assert_error_at_most, *packed([777, 1, 30, 577, 64], 8, 8, H, dtype, generator), causal)
    check(assert_error_at_most, *packed([2529, 17, 1000], 8, 2, H, dtype, generator), causal)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", EVERY_TILE, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_gpu_every_tile(tile, causal, generator, assert_error_at_most):
    if tile.tma and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("descriptors are used on sm_90 only")
    H = 96 if causal else 64
    check(assert_error_at_most, *packed([1300, 1, 64, 577], 4, 4, H, torch.bfloat16, generator), causal, tile)


@pytest.mark.gpu
def test_gpu_long_packs(generator, assert_error_at_most):
    check(assert_error_at_most, *packed([16384, 1, 4096], 2, 2, 96, torch.bfloat16, generator), True)
    check(assert_error_at_most, *packed([577] * 160, 16, 16, 64, torch.bfloat16, generator), False)
    check(assert_error_at_most, *packed([30] * 64, 32, 32, 96, torch.bfloat16, generator), True)


@pytest.mark.gpu
@pytest.mark.parametrize("q_lengths", [[1, 1, 1], [500, 1, 20]])
def test_gpu_fewer_queries_than_keys(q_lengths, generator, assert_error_at_most):
    inputs = packed([2529, 1, 777], 8, 8, 96, torch.bfloat16, generator, q_lengths)
    check(assert_error_at_most, *inputs, True)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[30, 1, 17], [777, 30]])
def test_gpu_graph_replays_on_new_values(lengths, generator):
    q, k, v, cu, _ = packed(lengths, 8, 8, 96, torch.bfloat16, generator)

    def run():
        return attention(q, k, v, cu, max(lengths), causal=True, backend="triton")

    run()  # compiles; inside a capture it could not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape, device=x.device, generator=generator))
    cu.copy_(cumulated([lengths[0] - 1, *lengths[1:-1], lengths[-1] + 1], q.device))  # same total
    graph.replay()
    assert torch.equal(captured, run())


@pytest.mark.gpu
def test_gpu_torch_compile_fullgraph(generator):
    q, k, v, cu, _ = packed([777, 30], 8, 8, 96, torch.bfloat16, generator)

    def doubled(q, k, v, cu):
        return 2 * attention(q, k, v, cu, 777, causal=True, backend="triton")

    compiled = torch.compile(doubled, fullgraph=True)
    assert torch.equal(compiled(q, k, v, cu), doubled(q, k, v, cu))


@pytest.mark.gpu
def test_gpu_second_device(assert_error_at_most):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    generator = torch.Generator("cuda:1").manual_seed(0)  # the current device stays cuda:0
    check(assert_error_at_most, *packed([777, 30], 4, 4, 96, torch.bfloat16, generator), True)


@pytest.mark.gpu
@pytest.mark.parametrize("tma", [True, False])
def test_gpu_beyond_2_to_the_31_elements(tma, generator, assert_error_at_most):
    """The last sequence of a qkv buffer of 2^31 elements and more (4.3 GB), compared with itself alone."""
    if tma and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("descriptors are used on sm_90 only")
    N, H, lengths = 32, 96, [1024] * 228 + [777]
    T = sum(lengths)
    assert T * 3 * N * H > 2**31
    qkv = torch.zeros(T, 3 * N * H, dtype=torch.bfloat16, device=generator.device)
    qkv[-777:] = torch.randn(777, 3 * N * H, device=generator.device, generator=generator).bfloat16()
    tile = Tile(64, 64, 4, 2, tma)

    def run(qkv, lengths):
        q, k, v = (x.unflatten(1, (N, H)) for x in qkv.chunk(3, dim=1))
        cu = cumulated(lengths, qkv.device)
        return attention_triton.launch(q, k, v, cu, max(lengths), cu, max(lengths), True, None, tile)

    assert torch.equal(run(qkv, lengths)[-777:], run(qkv[-777:], [777]))
    q, k, v = (x.unflatten(1, (N, H)) for x in qkv[-777:].chunk(3, dim=1))
    check(assert_error_at_most, q, k, v, *[cumulated([777], qkv.device)] * 2, True, tile)


class OnCard:
    """A tensor's shape, for what is decided before a launch."""

    def __init__(self, *shape):
        self.shape, self.dtype = shape, torch.bfloat16


@pytest.mark.parametrize("sequences", [2047, 2049, 10_000])
def test_descriptors_are_made_by_the_host_however_many_programs_there_are(sequences, monkeypatch):
    """Made by each program they lay in memory that Triton addresses in 32 bits, 512 bytes each."""
    launched = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.update(grid=grid, descriptors=args[3:7], TMA=options["TMA"])

    def allocate(allocator):
        raise AssertionError("a launch wants memory for descriptors")

    monkeypatch.setattr(attention_triton, "attention_kernel", Kernel())
    monkeypatch.setattr(attention_triton.triton, "set_allocator", allocate)
    monkeypatch.setattr(attention_triton, "supports_tma", lambda *tensors: True)
    x = torch.empty(1, 1, 96, dtype=torch.bfloat16).expand(8, 32, 96)
    cu = torch.zeros(sequences + 1, dtype=torch.int32)
    attention_triton.attention(x, x, x, cu, 8192, True, None, None, None)
    assert launched["TMA"] and launched["grid"][0] == sequences * 32 * 64
    assert [d.block_shape for d in launched["descriptors"]] == [[1, 64, 64], [1, 64, 32]] * 2
