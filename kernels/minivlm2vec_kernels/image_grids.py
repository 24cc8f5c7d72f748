"""How the grids of a batch's images reach the image kernels: in the launch arguments.

Nothing is copied to the device, so nothing waits, and a CUDA graph can capture the launch.
"""

from collections.abc import Iterator, Sequence

Grid = tuple[int, int]  # rows and columns of crops that an image was cut into
IMAGES_PER_LAUNCH = 32
LIMIT = 1 << 15


def flatten(grids: Sequence[Grid]) -> list[int]:
    """[(h, w), ...] as h, w, h, w, ...: an op's schema knows lists of integers, not of pairs."""
    return [side for grid in grids for side in grid]


def unflatten(flat: Sequence[int]) -> list[Grid]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def pack(grids: Sequence[Grid]) -> tuple[int, ...]:
    """One odd integer an image, h << 16 | w << 1 | 1, followed by images of no rows up to a power of two.

    Triton compiles anew for an argument of 1 and for multiples of 16. An odd number above 1 is neither, so a
    kernel is compiled once for each power of two of images. Kernels read h as g >> 16, w as (g & 65535) >> 1.
    """
    for h, w in grids:
        if not (0 < h < LIMIT and 0 < w < LIMIT):
            raise ValueError(f"a grid's sides must be between 1 and {LIMIT - 1}, got {h} x {w}")
    packed = [h << 16 | w << 1 | 1 for h, w in grids]
    padding = (1 << (len(packed) - 1).bit_length()) - len(packed)
    return (*packed, *[3] * padding)


def launches(grids: Sequence[Grid]) -> Iterator[Sequence[Grid]]:
    """The images of one launch after another: all of them, unless they are very many."""
    for start in range(0, len(grids), IMAGES_PER_LAUNCH):
        yield grids[start : start + IMAGES_PER_LAUNCH]
