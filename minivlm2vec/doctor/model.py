"""The whole model with the bundled checkpoint: its vectors on this device against recorded ones, in every form."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ..embedder import Embedder
from ..inference.fp8 import check_fp8
from ..inference.graphs import PaddedModel, TowerPrograms
from ..inference.prefix import SharedBatch, share_prefixes
from ..inference.prepack import can_prepack
from . import recorded
from .kernels import TORCH_INSTEAD, spelled
from .report import Check
from .task import NotRun, Options, Task

# Relative errors of a vector that are rounding. Measured for `mini` on a CPU: float32 1e-6, float16 0.002, bfloat16
# 0.02, fp8 0.05. A wrong address, mask or rotation is off by 0.1 to 1.
TOLERANCE = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.08}
FP8_TOLERANCE = 0.2
PLAIN = "plain, torch alone"
SMALL = 60  # tokens a pack, for several packs and for inputs that are mixed otherwise
# Of the recorded inputs those for Triton's interpreter, and for padding where there is no card, which take minutes for
# all of them: a text, one with an image, and two that begin alike.
FEW = (0, 7, 9, 12)


@dataclass(frozen=True)
class Form:
    """A way of running the model.

    Fields:
        name: for the report.
        way_round: what is left off when it fails.
        options: of `Embedder.from_pretrained`.
        vectors: (embedder, inputs) -> their vectors, each of the arrays [inputs, D] to be compared.
        refuse: raises NotRun where the device or dtype has not got it.
    """

    name: str
    way_round: str
    options: dict[str, Any] = field(default_factory=dict)
    vectors: Callable[[Embedder, list[Any]], list[np.ndarray]] = field(default=lambda e, x: in_packs(e, x))
    refuse: Callable[[torch.device, torch.dtype], None] = field(default=lambda device, dtype: None)
    tolerance: float | None = None  # instead of the dtype's
    dtype: torch.dtype | None = None  # the only one


def tasks(options: Options, dtypes: Sequence[torch.dtype]) -> Iterator[Task]:
    for form in forms(options):
        for dtype in dtypes if form.dtype is None else {form.dtype} & set(dtypes):
            run = partial(examined, form, dtype, options)
            yield Task("model", form.name, "", spelled(dtype), run, form.way_round)


def forms(options: Options) -> Iterator[Form]:
    """From the plainest on, so that the first that fails says what is wrong with the rest."""
    plain = {"optimize": False}
    bare = {"cuda_graphs": False, "share_prefixes": False, "prepack": False}
    yield Form(PLAIN, options.elsewhere, plain | {"backend": "torch"})
    if options.triton:
        yield Form("plain, Triton kernels", TORCH_INSTEAD, plain)
    yield Form("optimised", "optimize=False", bare)
    if torch.device(options.device).type == "cpu" and not options.triton:
        yield Form("optimised, weights packed", "prepack=False", bare | {"prepack": True}, refuse=_refuse_prepack)
    yield Form("shared prefixes", "share_prefixes=False", bare, with_shared_prefixes)
    if torch.device(options.device).type != "cuda":
        yield Form("padded as for CUDA graphs", "", bare, padded)
    elif options.triton:
        yield Form("CUDA graphs", "cuda_graphs=False", bare | {"cuda_graphs": True}, replayed)
    yield Form("as it comes", TORCH_INSTEAD, {"backend": None})  # what is left is which backend is taken
    yield Form("fp8", "precision=None", bare | {"precision": "fp8", "prepack": None}, refuse=_refuse_fp8,
               tolerance=FP8_TOLERANCE, dtype=torch.bfloat16)  # fmt: skip


def ways_round(checks: Sequence[Check]) -> tuple[Check, ...]:
    """The checks, from the plainest form on. Where one fails, what a later one adds goes round nothing: those of its
    dtype that fail too get its way round."""
    first: dict[str, str] = {}
    for c in checks:
        if c.verdict == "failed":
            first.setdefault(c.dtype, c.way_round)
    return tuple(replace(c, way_round=first[c.dtype]) if c.verdict == "failed" else c for c in checks)


def examined(form: Form, dtype: torch.dtype, options: Options) -> Check:
    """Raises what loading or running raises; a warning that a graph was dropped is a failure."""
    if options.interpret and dtype == torch.bfloat16:
        raise NotRun("Triton's interpreter rounds bfloat16 towards zero")
    device = torch.device(options.device)
    form.refuse(device, dtype)
    given = {"backend": options.backend} | form.options
    given = {k: v for k, v in given.items() if v is not None}
    expected, inputs = recorded.vectors().numpy(), recorded.inputs()
    if options.interpret or form.vectors is padded:
        expected, inputs = expected[list(FEW)], [inputs[i] for i in FEW]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        e = Embedder.from_pretrained("mini", device=device, dtype=dtype, show_progress=False, **given)
        error = max(relative_error(found, expected) for found in form.vectors(e, inputs))
    tolerance = form.tolerance or TOLERANCE[spelled(dtype)]
    dropped = [str(w.message) for w in caught if "program for" in str(w.message) or "graphs are off" in str(w.message)]
    reason = dropped[0] if dropped else "" if error == error else "not every number of a vector is finite"
    passed = not dropped and error <= tolerance
    return Check("model", form.name, "", spelled(dtype), "passed" if passed else "failed",
                 error if np.isfinite(error) else None, tolerance, "" if passed else reason,
                 "" if passed else form.way_round)  # fmt: skip


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The greatest |found - expected| / |expected| of all rows; NaN where a number is."""
    return float((np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


# ------------------------------------------------------------------------------------------------- ways of running


def in_packs(e: Embedder, inputs: list[Any]) -> list[np.ndarray]:
    """All in one pack, in several, and each alone."""
    alone = np.concatenate([e.encode([x]) for x in inputs])
    return [e.encode(inputs), e.encode(inputs, batch_tokens=SMALL), alone]


def with_shared_prefixes(e: Embedder, inputs: list[Any]) -> list[np.ndarray]:
    """Sharing is forced: on a few short texts it would not pay."""
    batch = e.processor.pack([e.load(e.plan(x)) for x in inputs])
    longest = e.model.config.decoder.original_max_position_embeddings
    shared = share_prefixes(batch, longest, weight_bound_rows=0, smallest_share=0)
    if not isinstance(shared, SharedBatch):
        raise RuntimeError("the texts share nothing, though they begin alike")
    return [e.embed(shared).cpu().numpy()]


def replayed(e: Embedder, inputs: list[Any]) -> list[np.ndarray]:
    """What graphs give when they are captured, and when they are replayed on other data and again."""
    model: Any = e.model
    both = {"decoder": model.graphs, "tower": model.vision.graphs}
    for graphs in both.values():
        graphs.make_at = 1
    found = in_packs(e, inputs)
    for part, graphs in both.items():
        if not graphs.programs and graphs.enabled:
            raise RuntimeError(f"no graph of the {part} was captured, or each was wrong and is dropped")
    return found + in_packs(e, inputs)


def padded(e: Embedder, inputs: list[Any]) -> list[np.ndarray]:
    """What would be captured on a CUDA device, run as it is."""
    model: Any = e.model
    model.graphs, model.vision.graphs = PaddedModel(model), TowerPrograms(model)
    return replayed(e, inputs)


def _refuse_prepack(device: torch.device, dtype: torch.dtype) -> None:
    if not can_prepack(device, dtype):
        raise NotRun(f"this processor packs no {spelled(dtype)}")


def _refuse_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """check_fp8 also tries a product, whose failure is one."""
    try:
        check_fp8(device, dtype)
    except ValueError as e:
        if "does not work" in str(e):
            raise
        raise NotRun(str(e)) from None
