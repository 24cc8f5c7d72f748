"""What launchers share: checks of their arguments, their view of rows, and how programs share rows out."""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_HERE: AbstractContextManager[None] = nullcontext()


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's. Where there is one, nothing is asked."""
    return torch.cuda.device_of(x) if _several_devices() else _HERE


@functools.cache
def _several_devices() -> bool:
    return torch.cuda.device_count() > 1


# triton.cdiv and triton.next_power_of_2 take 2.5 and 9 us a call.


def cdiv(n: int, block: int) -> int:
    return -(-n // block)


def next_power_of_2(n: int) -> int:
    """The least one from n on; 1 for n = 0."""
    return 1 << max(n - 1, 0).bit_length()


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous, whatever x's strides: `x.new_empty(x.shape)` in half the time."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def as_rows(x: Tensor, name: str) -> Tensor:
    """x [..., D] as [R, D]. Rows may lie any distance apart, but each must be dense."""
    if x.dim() == 0 or (x.shape[-1] > 1 and x.stride(-1) != 1):
        raise ValueError(
            f"{name}: the last dimension must have stride 1, got shape {tuple(x.shape)}, strides {x.stride()}"
        )
    return x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x


def dense_rows(gradient: Tensor) -> Tensor:
    """A gradient [..., D] as dense rows [R, D], copied where it is not: autograd hands out expanded ones."""
    dense = gradient.dim() > 0 and gradient.stride(-1) == 1
    return as_rows(gradient if dense else gradient.contiguous(), "gradient")


def check_shape(x: Tensor, shape: Sequence[int], name: str) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# BD -> (BM, warps) of rms_norm, layer_norm and quantize_rows: programs that read BM whole rows of up to BD elements
# once. 32 elements a thread, so four 16-byte loads of bf16 in flight for each, up to BD = 8192.
ROW_SETTINGS = {
    64: (32, 4),
    128: (16, 4),
    256: (16, 4),
    512: (8, 4),
    1024: (4, 4),
    2048: (2, 4),
    4096: (1, 4),
    8192: (1, 8),
    16384: (1, 16),
    32768: (1, 16),
}
# The widest rows of each, in any dtype, of which a program spills no register; what is wider is torch's.
WIDEST = {"rms_norm": 16384, "rms_norm_backward": 8192, "layer_norm": 8192, "quantize_rows": 32768}


def whole_rows(D: int, kernel: str, settings: dict[int, tuple[int, int]] = ROW_SETTINGS) -> tuple[int, int, int]:
    """(BD, BM, warps) for rows of D elements. Raises ValueError where they are wider than the kernel takes."""
    widest = WIDEST[kernel]
    if widest < D:
        raise ValueError(
            f"{kernel}: rows of {D} elements are wider than the {widest} that fit in one program; take backend='torch'"
        )
    BD = max(next_power_of_2(D), min(settings))
    return BD, *settings[BD]
