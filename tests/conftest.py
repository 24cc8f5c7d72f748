"""What kernel tests share. Without CUDA, kernels run in Triton's interpreter: chosen here, before import."""

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton and kernel files are imported, hence here

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # its neighbours need the other cores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _let_interpreter_convert_scalars() -> None:
    """Triton 3.6's interpreter holds a scalar as an array of one element and calls `int` on it for a loop's
    bounds, which NumPy from 2.4 on refuses; Triton 3.7 takes the element out first, as this does for 3.6."""
    import triton
    from triton.runtime import interpreter

    if not triton.__version__.startswith("3.6."):
        return
    patch = interpreter._patch_lang_tensor

    def patch_and_convert(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_convert


if DEVICE == "cpu" and importlib.util.find_spec("triton"):
    _let_interpreter_convert_scalars()


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    """Tests that draw without a generator of their own draw the same at every run."""
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    """Where kernels run in this process: the card, or the CPU under the interpreter."""
    return DEVICE


@pytest.fixture
def generator() -> torch.Generator:
    """Random numbers, the same at every run."""
    return torch.Generator(DEVICE).manual_seed(0)


@pytest.fixture
def poison_empty(monkeypatch) -> None:
    """Fills what torch.empty and its kin return with NaN (integers with their maximum), so that an element
    that a kernel leaves unwritten is seen."""
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ]:
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate):
    def call(*args, **kwargs):
        x = allocate(*args, **kwargs)
        if x.is_floating_point() or x.is_complex():
            return x.fill_(float("nan"))
        return x if x.dtype == torch.bool else x.fill_(torch.iinfo(x.dtype).max)

    return call


@pytest.fixture
def large_tiles(monkeypatch) -> None:
    """Attention in float32 by tiles that would spill on a card: the interpreter pays by the tile."""
    from minivlm2vec_kernels import attention_backward_triton, attention_triton

    if DEVICE == "cpu":
        large = attention_triton.Tile(64, 64, 4, 1)
        monkeypatch.setattr(attention_triton, "NO_TENSOR_CORES_TILE", large)
        monkeypatch.setattr(attention_backward_triton, "NO_TENSOR_CORES_TILE", large)


@pytest.fixture
def assert_error_at_most():
    """The derived tolerance; see `check_error`."""
    return check_error


def check_error(out: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor, atol: float = 0.0) -> None:
    """A kernel's error is at most twice that of the same maths in torch at the same dtype, plus `atol`.

    out: the kernel's; same_dtype: the torch reference on the same tensors; exact: the reference in float32
    (or 64) on the upcast tensors. Errors are the largest absolute ones; prints what it saw. `atol` covers
    cases in which torch happens to be exact, and is to be measured, not guessed.
    """
    assert out.shape == same_dtype.shape == exact.shape, (out.shape, same_dtype.shape, exact.shape)
    assert out.dtype == same_dtype.dtype, (out.dtype, same_dtype.dtype)
    assert torch.isfinite(out).all(), f"{(~torch.isfinite(out)).sum()} of {out.numel()} elements are not finite"
    ours, torchs = largest_error(out, exact), largest_error(same_dtype, exact)
    print(f"error {ours:.2e}, torch {torchs:.2e}, atol {atol:.0e} ({str(out.dtype)[6:]}, {tuple(out.shape)})")
    assert ours <= 2 * torchs + atol, f"error {ours:.3e} > 2 x torch's {torchs:.3e} + {atol:.0e}"


def largest_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return (x.double() - exact.double()).abs().max().item() if x.numel() else 0.0
