"""merge_crops_triton.py: the tower's features for one image, and for as many as one launch takes."""

from minivlm2vec_kernels import merge_crops_triton
from minivlm2vec_kernels.image_grids import IMAGES_PER_LAUNCH
from tests.kernels.aot import Spec


def specs() -> list[Spec]:
    return [_spec(24, 1024, 1), _spec(24, 1024, IMAGES_PER_LAUNCH), _spec(6, 96, 4)]


def _spec(P: int, D: int, images: int) -> Spec:
    BD, BR, warps = merge_crops_triton.settings(4 * D)
    types = dict.fromkeys(("features", "sub_GN", "glb_GN", "out"), "*bf16")
    types |= {"stride_crop": "i32", "stride_patch": "i32", "grids": ("i32",) * images}
    constants = {"P": P, "D": D, "BR": BR, "BD": BD}
    name = f"P{P} D{D} images{images}"
    return Spec("merge_crops_triton.merge_crops_kernel", name, types, constants, warps, quick=images == 1)
