"""What launchers share: the custom ops they become under torch.compile, and how grids reach a kernel."""

import pytest
import torch

from minivlm2vec_kernels import (
    activation_triton,
    attention_backward_triton,
    attention_triton,
    image_grids,
    image_patches_triton,
    layer_norm_triton,
    linear_triton,
    merge_crops_triton,
    ops,
    pooling_triton,
    quantize_rows_triton,
    rms_norm_triton,
    rope_triton,
)
from minivlm2vec_kernels.launch import WIDEST, as_rows


def ops_and_arguments(device):
    x, w = torch.randn(5, 64, device=device), torch.randn(64, device=device)
    square, lengths = torch.randn(64, 64, device=device), torch.tensor([0, 2, 5], device=device).int()
    q, k, _ = torch.randn(5, 3, 2, 64, device=device).unbind(1)
    angles = torch.randn(5, 32, device=device)
    crops = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8, device=device)
    color, features = torch.rand(3, device=device) + 0.5, torch.randn(3, 4, 8, device=device)
    separators = torch.randn(2, 32, device=device).unbind()
    options = (lengths, 3, True, None, None, None)
    return {
        "attention": (attention_triton.attention, q, k, q, *options[:4], None, None),
        "attention_with_lse": (attention_backward_triton.attention_with_lse, q, k, q, *options),
        "attention_backward": (
            attention_backward_triton.attention_backward,
            q,
            q,
            k,
            q,
            q,
            angles.mT[:2].contiguous(),
            *options,
        ),
        "rms_norm_backward": (rms_norm_triton.rms_norm_backward, x, x, x, w, 1e-5, True),
        "rms_norm_backward, weight frozen": (rms_norm_triton.rms_norm_backward, x, None, x, w, 1e-5, False),
        "silu_mul_backward": (activation_triton.silu_mul_backward, x[:, :32], x),
        "rope": (rope_triton.rope, q, k, angles, angles, True),
        "rms_norm": (rms_norm_triton.rms_norm, x, w, 1e-5),
        "add_rms_norm": (rms_norm_triton.add_rms_norm, x, x, w, 1e-5),
        "layer_norm": (layer_norm_triton.layer_norm, x, w, w, 1e-5),
        "layer_norm_shift_": (layer_norm_triton.layer_norm_shift_, x, w, w, w, 1e-5),
        "add_layer_norm": (layer_norm_triton.add_layer_norm, x, x, w, w, 1e-5),
        "rope_": (rope_triton.rope_, q, k, angles, angles),
        "rms_norm_quantize": (rms_norm_triton.rms_norm_quantize, x, w, 1e-5),
        "quantize_rows": (quantize_rows_triton.quantize_rows, x),
        "silu_mul": (activation_triton.silu_mul, x),
        "quick_gelu": (activation_triton.quick_gelu, x, w),
        "quick_gelu without bias": (activation_triton.quick_gelu, x, None),
        "pool_last_token": (pooling_triton.pool_last_token, x, lengths, w, 1e-5, True),
        "merge_crops": (merge_crops_triton.merge_crops, features, [1, 2], *separators),
        "image_patches": (image_patches_triton.image_patches, crops, [1, 2], color, color, 2, torch.float32),
        "linear_quick_gelu": (linear_triton.linear_quick_gelu, x, square, w),
        "linear_silu_mul": (linear_triton.linear_silu_mul, x, square),
    }


@pytest.mark.parametrize("name", list(ops_and_arguments("cpu")))
def test_custom_op_is_what_it_declares(name, device):
    """Schema (what is written, what aliases), shapes given to the compiler, and results under it."""
    if "quantize" in name and device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("Triton's e4m3 needs capability 8.9")
    launcher, *args = ops_and_arguments(device)[name]
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(launcher.op, tuple(args), test_utils=checks)


def test_compiled_code_takes_any_number_of_rows(device):
    """One graph for all row counts: the op hides the launcher's arithmetic from the compiler."""
    torch._dynamo.reset()
    weight, frames = torch.randn(64, device=device), []

    def count(graph, _):
        frames.append(graph)
        return graph.forward

    norm = torch.compile(
        lambda x: ops.rms_norm(x, weight, 1e-5, backend="triton"), backend=count, fullgraph=True, dynamic=True
    )
    for rows in (5, 17, 63):
        x = torch.randn(rows, 64, device=device)
        torch.testing.assert_close(norm(x), ops.rms_norm(x, weight, 1e-5, backend="torch"))
    assert len(frames) == 1


def test_eager_calls_skip_the_dispatcher(device):
    x, weight = torch.randn(5, 64, device=device), torch.randn(64, device=device)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        rms_norm_triton.rms_norm(x, weight, 1e-5)
    assert seen and not any("minivlm2vec" in name for name in seen)


def test_as_rows_keeps_memory():
    x = torch.randn(6, 4, 16)
    assert as_rows(x, "x").shape == (24, 16)
    assert as_rows(x[..., :8], "x").data_ptr() == x.data_ptr()
    assert as_rows(x[0, 0], "x").shape == (1, 16)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 31, 32])
def test_packed_grids_compile_one_kernel_a_power_of_two(count):
    """Triton specialises on 1 and on multiples of 16; a packed grid is neither."""
    grids = [(1 + i % 16, 16 - i % 16) for i in range(count)]
    packed = image_grids.pack(grids)
    assert len(packed) >= count and len(packed) & (len(packed) - 1) == 0 and len(packed) < 2 * count
    assert all(g % 2 == 1 and 1 < g < 2**31 for g in packed)
    assert [(g >> 16, (g & 65535) >> 1) for g in packed[:count]] == grids
    assert all(g >> 16 == 0 for g in packed[count:])


def test_grids_survive_flattening():
    grids = [(1, 2), (3, 4)]
    assert image_grids.unflatten(image_grids.flatten(grids)) == grids
    assert [len(part) for part in image_grids.launches([(1, 1)] * 70)] == [32, 32, 6]


ON_ROWS = {  # op -> its rows' limit, and a call with rows x [R, D] and weights w [D]
    "rms_norm": ("rms_norm", lambda x, w, **o: ops.rms_norm(x, w, 1e-5, **o)),
    "add_rms_norm": ("rms_norm", lambda x, w, **o: ops.add_rms_norm(x, x, w, 1e-5, **o)),
    "rms_norm_quantize": ("rms_norm", lambda x, w, **o: ops.rms_norm_quantize(x, w, 1e-5, **o)),
    "layer_norm": ("layer_norm", lambda x, w, **o: ops.layer_norm(x, w, w, 1e-5, **o)),
    "add_layer_norm": ("layer_norm", lambda x, w, **o: ops.add_layer_norm(x, x, w, w, 1e-5, **o)),
    "layer_norm_shift_": ("layer_norm", lambda x, w, **o: ops.layer_norm_shift_(x, w, w, w, 1e-5, **o)),
    "quantize_rows": ("quantize_rows", lambda x, w, **o: ops.quantize_rows(x, **o)),
}


@pytest.mark.parametrize("name", ON_ROWS)
def test_the_widest_rows_run_and_wider_ones_are_refused_by_number(name, device, monkeypatch):
    kernel, call = ON_ROWS[name]
    widest, asked = WIDEST[kernel], []
    plain = ops.choose_backend
    monkeypatch.setattr(ops, "choose_backend", lambda *a, **o: asked.append(o["widest"]) or plain(*a, **o))
    x, w = torch.randn(1, widest, device=device), torch.randn(widest, device=device)
    ours, exact = (call(x.clone(), w, backend=b) for b in ("triton", "torch"))
    for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in (ours, exact)), strict=True):
        e4m3 = b.dtype == torch.float8_e4m3fn  # the interpreter loses a carry: 128 becomes 64 (test_quantize_rows.py)
        step = b.float().abs() / 2 + 2**-6 if e4m3 else 1e-5 * b.abs().max()
        assert bool(((a.float() - b.float()).abs() <= step).all())
    x, w = torch.randn(1, widest + 1, device=device), torch.randn(widest + 1, device=device)
    with pytest.raises(ValueError, match=f"{kernel}: rows of {widest + 1} elements are wider than the {widest} that"):
        call(x, w, backend="triton")
    assert set(asked) == {widest}


def test_a_gradient_of_rows_that_are_too_wide_is_refused_before_the_forward_pass(device):
    x, w = torch.randn(1, 8193, device=device, requires_grad=True), torch.randn(8193, device=device)
    for name in ("rms_norm", "add_rms_norm"):
        with pytest.raises(ValueError, match="rms_norm_backward: rows of 8193 elements are wider than the 8192"):
            ON_ROWS[name][1](x, w, backend="triton")
