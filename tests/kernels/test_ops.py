"""The public ops: what chooses between Triton and torch, and what every op promises whichever is taken."""

import functools
from types import SimpleNamespace

import pytest
import torch

import minivlm2vec_kernels
from minivlm2vec_kernels import cards, ops, reference
from tests.kernels.kernel_cases import gradients

# -------------------------------------------------------------------------------------------------------- the dispatch


def tensor(cuda=True, requires_grad=False):
    """All that the choice looks at: CPU tests cannot make a CUDA tensor."""
    return SimpleNamespace(
        is_cuda=cuda,
        requires_grad=requires_grad,
        dtype=torch.float16,
        device="cuda" if cuda else "cpu",
        get_device=lambda: 0 if cuda else -1,
    )


@pytest.fixture
def an_h100(monkeypatch):
    monkeypatch.setattr(cards.torch.cuda, "get_device_capability", lambda device: (9, 0))
    cards.card.cache_clear()
    yield
    cards.card.cache_clear()


@pytest.mark.parametrize("backward", [False, True])
def test_auto_takes_triton_on_cuda_unless_a_gradient_is_needed(backward, an_h100, monkeypatch):
    monkeypatch.setattr(ops, "BACKEND", "auto")
    for argument in (None, "auto"):
        choose = functools.partial(ops.choose_backend, argument, backward=backward)
        assert choose(tensor(), tensor()) == "triton"
        assert choose(tensor(), tensor(requires_grad=True)) == "torch"
        assert choose(tensor(cuda=False)) == "torch"
        with torch.no_grad():
            assert choose(tensor(), tensor(requires_grad=True)) == "triton"


def test_triton_on_request_carries_gradients_or_raises(an_h100):
    assert ops.choose_backend("triton", tensor(requires_grad=True), backward=True) == "triton"
    with pytest.raises(RuntimeError, match=r"no backward pass; use torch\.no_grad"):
        ops.choose_backend("triton", tensor(requires_grad=True))
    with torch.no_grad():
        assert ops.choose_backend("triton", tensor(requires_grad=True)) == "triton"


def test_the_argument_beats_the_environment(an_h100, monkeypatch):
    monkeypatch.setattr(ops, "BACKEND", "triton")
    assert ops.choose_backend(None, tensor(requires_grad=True), backward=True) == "triton"
    assert ops.choose_backend("torch", tensor()) == "torch"
    assert ops.choose_backend("auto", tensor(requires_grad=True), backward=True) == "torch"


def test_wrong_requests_say_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"needs CUDA tensors .* got one on cpu"):
        ops.choose_backend("triton", tensor(cuda=False), backward=True)
    with pytest.raises(ValueError, match="one of auto, triton, torch, got 'cuda'"):
        ops.choose_backend("cuda", tensor())


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("other, named", [(1, "cuda:0, cuda:0, cuda:1"), (-1, "cuda:0, cuda:0, cpu")])
def test_kernels_take_no_tensors_on_several_devices(backend, other, named, an_h100):
    """Triton launches on the first one's, and its kernels would read the other's memory."""
    first, elsewhere = tensor(), tensor(cuda=other >= 0)
    first.device, elsewhere.device = "cuda:0", f"cuda:{other}" if other >= 0 else "cpu"
    elsewhere.get_device = lambda: other
    with pytest.raises(ValueError, match=f"must be on one device, got {named}"):
        ops.choose_backend(backend, first, first, elsewhere)
    assert ops.choose_backend("torch", first, elsewhere) == "torch"  # which says so itself


def test_the_environment_asks_for_backward_kernels(device, monkeypatch):
    """MINIVLM2VEC_BACKEND=triton: the graph holds our functions, not autograd's of plain torch."""
    monkeypatch.setattr(ops, "BACKEND", "triton")
    x, weight = torch.randn(4, 64, device=device, requires_grad=True), torch.ones(64, device=device)
    q, k = x.view(4, 2, 32), x.view(4, 2, 32) * 2
    cos, sin = torch.ones(2, 4, 16, device=device)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32, device=device)
    outs = {
        "RMSNormBackward": ops.rms_norm(x, weight, 1e-5),
        "AddRMSNormBackward": ops.add_rms_norm(x, x * 2, weight, 1e-5)[0],
        "SiluMulBackward": ops.silu_mul(x),
        "RopeBackward": ops.rope(q, k, cos, sin)[1],
        "AttentionBackward": ops.attention(q, k, k, cu_seqlens, 4, causal=True),
    }
    assert {name: y.grad_fn.name() for name, y in outs.items()} == {name: name for name in outs}


# --------------------------------------------------------------------------------------------- what every op promises


def calls(device="cpu"):
    """Name of each op -> its positional arguments, and those by keyword."""
    random = torch.Generator(device).manual_seed(0)
    make = lambda *shape: torch.randn(*shape, device=device, generator=random)  # noqa: E731
    x, residual, w, b = make(6, 64), make(6, 64), make(64), make(64)
    q, k, v = make(6, 8, 32).split([4, 2, 2], dim=1)
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)
    crops = torch.randint(0, 256, (2, 8, 8, 3), device=device, generator=random).byte()
    return {
        "add_layer_norm": ((x, residual, w, b, 1e-5), {}),
        "add_rms_norm": ((x, residual, w, 1e-5), {}),
        "attention": ((q, k, v, cu_seqlens, 4), {"causal": True}),
        "image_patches": ((crops, [(1, 2)], make(3), make(3).abs() + 0.1, 4, torch.float32), {}),
        "layer_norm": ((x, w, b, 1e-5), {}),
        "layer_norm_shift_": ((x, b, w, b, 1e-5), {}),
        "linear_add_": ((residual, x, make(64, 64), b), {}),
        "linear_quick_gelu": ((x, make(96, 64), make(96)), {}),
        "linear_silu_mul": ((x, make(96, 64)), {}),
        "merge_crops": ((make(3, 16, 8), [(1, 2)], make(1, 1, 1, 32), make(1, 1, 32)), {}),
        "pool_last_token": ((x, cu_seqlens, w, 1e-5), {}),
        "quantize_rows": ((x,), {}),
        "quick_gelu": ((x, b), {}),
        "rms_norm": ((x, w, 1e-5), {}),
        "rms_norm_quantize": ((x, w, 1e-5), {}),
        "rope": ((q, k, make(6, 16), make(6, 16)), {}),
        "rope_": ((q, k, make(6, 16), make(6, 16)), {}),
        "silu_mul": ((x,), {}),
    }


NAMES = list(calls())
IN_PLACE = {  # op -> how many of its first arguments it writes over, what it is to return
    "layer_norm_shift_": (1, reference.layer_norm_shift),
    "linear_add_": (1, reference.linear_add),
    "rope_": (2, reference.rope),
}
by_name = pytest.mark.parametrize("name", NAMES)
by_backend = pytest.mark.parametrize("backend", ["torch", "triton"])


def call(name, args, kwargs, backend=None):
    outs = getattr(minivlm2vec_kernels, name)(*args, **kwargs, backend=backend)
    return outs if isinstance(outs, tuple) else (outs,)


def tensors_of(args):
    return [x for x in args if isinstance(x, torch.Tensor)]


def test_every_op_is_among_these():
    assert {"choose_backend", *NAMES} == set(minivlm2vec_kernels.__all__)
    assert [name for name in NAMES if name.endswith("_")] == list(IN_PLACE)


@by_name
def test_the_choice_is_shown_every_tensor(name, monkeypatch):
    """So that none on another device gets past it. Attention looks at lengths itself."""
    shown, choose = [], ops.choose_backend
    monkeypatch.setattr(
        ops, "choose_backend", lambda backend, *given, **k: shown.extend(given) or choose(backend, *given, **k)
    )
    args, kwargs = calls()[name]
    call(name, args, kwargs, "torch")
    hidden = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and not any(x is s for s in shown)]
    assert hidden == ([3] if name == "attention" else [])


@by_name
def test_a_backend_that_there_is_not_is_refused(name):
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, got 'nonsense'"):
        call(name, *calls()[name], backend="nonsense")


@by_name
def test_triton_that_cannot_run_is_refused(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"backend='triton' needs CUDA tensors .* got one on cpu"):
        call(name, *calls()[name], backend="triton")


@by_backend
@pytest.mark.parametrize("name", [name for name in NAMES if name not in IN_PLACE])
def test_no_argument_is_written_over_and_none_is_returned(name, backend, device):
    """With gradients disabled too: a hook keeps what it saw."""
    args, kwargs = calls(device)[name]
    given, before = tensors_of(args), [x.clone() for x in tensors_of(args)]
    with torch.no_grad():
        outs = call(name, args, kwargs, backend)
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))
    memory = {x.untyped_storage().data_ptr() for x in given}
    assert not memory & {y.untyped_storage().data_ptr() for y in outs}


@by_backend
@pytest.mark.parametrize("name", IN_PLACE)
def test_an_underscore_writes_over_its_argument(name, backend, device):
    args, kwargs = calls(device)[name]
    count, specification = IN_PLACE[name]
    rest = [x.clone() if isinstance(x, torch.Tensor) else x for x in args[count:]]
    expected = specification(*args, **kwargs)
    outs = call(name, args, kwargs, backend)
    assert all(any(y is x for y in outs) for x in args[:count])
    torch.testing.assert_close(outs, expected if isinstance(expected, tuple) else (expected,))
    torch.testing.assert_close(list(args[count:]), rest, rtol=0, atol=0)


@by_backend
@pytest.mark.parametrize("name", IN_PLACE)
def test_an_underscore_has_no_gradient(name, backend, device):
    args, kwargs = calls(device)[name]
    for at, x in enumerate(args):
        if isinstance(x, torch.Tensor):
            one_needs_it = [*args[:at], x.clone().requires_grad_(), *args[at + 1 :]]
            with pytest.raises(RuntimeError, match=r"use torch\.no_grad\(\)"):
                call(name, one_needs_it, kwargs, backend)
    with torch.no_grad():
        call(name, one_needs_it, kwargs, backend)


# ------------------------------------------------------------------------------------------------- under torch.compile


@by_name
def test_every_op_is_traced_without_a_break(name):
    args, kwargs = calls()[name]
    copy = lambda: [x.clone() if isinstance(x, torch.Tensor) else x for x in args]  # noqa: E731
    torch._dynamo.reset()
    op = torch.compile(lambda *args: call(name, args, kwargs), fullgraph=True, backend="aot_eager")
    for ours, eager in zip(op(*copy()), call(name, copy(), kwargs), strict=True):
        torch.testing.assert_close(ours.float(), eager.float(), rtol=1e-6, atol=2e-6)


NO_GRADIENT = {*IN_PLACE, "image_patches", "quantize_rows", "rms_norm_quantize"}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_GRADIENT])
def test_gradients_are_traced_without_a_break(name):
    args, kwargs = calls()[name]
    places = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    leaves = [args[i] for i in places]

    def op(*leaves):
        changed = dict(zip(places, leaves, strict=True))
        return call(name, [changed.get(i, x) for i, x in enumerate(args)], kwargs)

    seeds = [torch.randn_like(y) for y in op(*leaves)]
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, leaves, seeds), gradients(op, leaves, seeds), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_compiled_once_for_all_lengths(dtype):
    """Once as it comes, once more for any number of tokens and sequences; with the same bits as eager code."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def attend(qkv, cu_seqlens, max_seqlen):
        q, k, v = qkv.unflatten(1, (-1, 32)).split([4, 2, 2], dim=1)
        return 2 * ops.attention(q, k, v, cu_seqlens, max_seqlen, causal=True)

    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    for lengths in ([3, 5], [7, 1, 4], [2, 2, 9, 2], [30], [1, 1], [40, 3, 3]):
        qkv = torch.randn(sum(lengths), 8 * 32, generator=torch.Generator().manual_seed(0)).to(dtype)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        op, eager = (functools.partial(f, cu_seqlens=cu_seqlens, max_seqlen=max(lengths)) for f in (compiled, attend))
        seed = [torch.ones(sum(lengths), 4, 32, dtype=dtype)]
        assert torch.equal(op(qkv), eager(qkv))
        assert torch.equal(*gradients(op, [qkv], seed), *gradients(eager, [qkv], seed))
    assert counter.frame_count <= 4  # with a gradient and without


def test_attentions_op_passes_torchs_own_checks():
    q, k, v, cu_seqlens, _ = calls()["attention"][0]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    cu_seqlens_q = torch.tensor([0, 1, 4], dtype=torch.int32)
    op = torch.ops.minivlm2vec.torch_attention
    torch.library.opcheck(op, (*leaves, cu_seqlens, True, None, None))
    torch.library.opcheck(op, (leaves[0][:4], *leaves[1:], cu_seqlens, False, 0.5, cu_seqlens_q))
