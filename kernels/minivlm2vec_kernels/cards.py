"""What each card has, and on which of them the kernels are taken without being asked for.

The one table of cards: launchers choose their tiles by it, tests compile for every row of it, and the tests' pretended
card takes its limits from it. NVIDIA's shared memory is "maximum amount of shared memory per thread block" of the CUDA
C++ programming guide's table of compute capabilities; AMD's is the LDS of a workgroup in the CDNA and RDNA ISA guides.

Under ROCm torch calls itself CUDA and an MI300's capability is (9, 4), so `torch.version.hip` is asked before a number.
"""

import functools
import warnings
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Card:
    """A kind of card.

    Attributes:
        name: as compilers call it.
        shared: bytes of shared memory that one program may have.
        tma: tiles come and go by tensor descriptors where a kernel can use them.
        bfloat16: its matrix units multiply it.
        e4m3: Triton converts to that 8-bit floating point for it.
        tensor_cores: Triton multiplies on its matrix units.
        amd: of AMD, and not of NVIDIA.
    """

    name: str
    shared: int
    tma: bool = False
    bfloat16: bool = True
    e4m3: bool = True
    tensor_cores: bool = True
    amd: bool = False

    @property
    def small(self) -> bool:
        """Whether tiles must be those that fit in 64 KB: an unknown card's are."""
        return self.shared <= 64 * KB


KB = 1024
CARDS = {
    card.name: card
    for card in (
        Card("sm_75", 64 * KB, bfloat16=False, e4m3=False, tensor_cores=False),  # T4, RTX 20
        Card("sm_80", 163 * KB, e4m3=False),  # A100
        Card("sm_86", 99 * KB, e4m3=False),  # A10, A40, RTX 30
        Card("sm_89", 99 * KB),  # L4, L40, RTX 40
        Card("sm_90", 227 * KB, tma=True),  # H100, H200
        Card("sm_100", 227 * KB, tma=True),  # B200
        Card("sm_120", 99 * KB),  # RTX 50; its descriptors are not used
        Card("gfx90a", 64 * KB, amd=True),  # MI200
        Card("gfx942", 64 * KB, amd=True),  # MI300
        Card("gfx1100", 64 * KB, amd=True),  # RX 7900
    )
}
OLDEST = (7, 5)  # of NVIDIA's, that Triton compiles for


def of_nvidia(capability: tuple[int, int]) -> Card:
    """For one that is not in the table: no descriptors, tiles for 64 KB, and the dtypes that newer ones have."""
    major, minor = capability
    unknown = Card(f"sm_{major}{minor}", 64 * KB, bfloat16=major >= 8, e4m3=capability >= (8, 9))
    return CARDS.get(unknown.name, unknown)


def of_amd(gfx: str) -> Card:
    """By the name that torch gives, such as gfx90a:sramecc+:xnack-."""
    name = gfx.split(":")[0]
    return CARDS.get(name, Card(name, 64 * KB, amd=True))


@functools.cache
def card(device: int) -> Card:
    """The card of a CUDA (or ROCm) device, by its number."""
    if torch.version.hip is not None:
        return of_amd(torch.cuda.get_device_properties(device).gcnArchName)
    return of_nvidia(torch.cuda.get_device_capability(device))


def card_of(x: torch.Tensor) -> Card | None:
    """The card that a tensor is on; None on a CPU."""
    return card(x.get_device()) if x.is_cuda else None


@functools.cache
def _too_old(device: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST


# Both answers are constants to torch.compile, which would otherwise trace how they are found.


@torch.compiler.assume_constant_result
def refusal(device: int, bfloat16: bool, e4m3: bool = False) -> str:
    """Why the kernels cannot run on a device with tensors of these dtypes; "" where they can."""
    if _too_old(device):
        return f"{card(device).name} is older than sm_{OLDEST[0]}{OLDEST[1]}, the oldest that Triton compiles for"
    if bfloat16 and not card(device).bfloat16:
        return f"{card(device).name} has no bfloat16; float16 and float32 work there"
    if e4m3 and not card(device).e4m3:
        return f"{card(device).name} has no 8-bit floats"
    return ""


@torch.compiler.assume_constant_result
def takes_triton(device: int, bfloat16: bool, e4m3: bool = False) -> bool:
    """Whether kernels are taken where nobody says which. Warns once where they are not."""
    why = refusal(device, bfloat16, e4m3)
    if not why and not card(device).tensor_cores:  # a T4 has 65 TFLOP/s on them and 8 beside them
        why = (
            f"on {card(device).name} Triton multiplies without the tensor cores, which torch's operators use; "
            "backend='triton' or MINIVLM2VEC_BACKEND=triton asks for the kernels"
        )
    if not why and card(device).amd:
        why = (
            f"on {card(device).name} (AMD) the kernels have been compiled and never run; after `minivlm2vec doctor` "
            "there, backend='triton' or MINIVLM2VEC_BACKEND=triton asks for them"
        )
    if why:
        _warn(f"torch's own operators are taken: {why}")
    return not why


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
