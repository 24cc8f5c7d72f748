"""image_patches_triton.py: crops of 336 pixels for one image, and for as many as one launch takes."""

from minivlm2vec_kernels import image_patches_triton
from minivlm2vec_kernels.image_grids import IMAGES_PER_LAUNCH
from tests.kernels.aot import Spec


def specs() -> list[Spec]:
    return [_spec(336, 14, 1), _spec(336, 14, IMAGES_PER_LAUNCH), _spec(64, 8, 4)]


def _spec(S: int, p: int, images: int) -> Spec:
    BO, warps = image_patches_triton.SETTINGS["image_patches"]
    types = {"crops": "*u8", "mean": "*fp32", "std": "*fp32", "out": "*bf16", "grids": ("i32",) * images}
    constants = {"S": S, "p": p, "BO": BO}
    name = f"S{S} p{p} images{images}"
    return Spec("image_patches_triton.image_patches_kernel", name, types, constants, warps, quick=images == 1)
