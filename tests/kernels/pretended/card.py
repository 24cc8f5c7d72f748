"""A card that is not there: everything that this project does on one, up to the point where it would compute.

    with pretend_card() as card:                   # torch and Triton find an H100; pretend_card("gfx942"), an MI300
        vectors = model.to("cuda")(batch.to("cuda"))
    card.launches, card.waits, card.uploads        # what happened

Tensors on the CPU are real. Those on the card are fake (torch's FakeTensorMode): they have a shape, strides, a dtype
and a device, on which torch's own rules are enforced, but no memory, so the published sizes cost nothing. Triton
kernels are compiled for the card as the launch would compile them, and what their launcher would refuse is refused;
none runs. What comes back to the CPU is zeros (True for booleans). So code, devices, launches, waiting and what a CUDA
graph may hold are tested; numbers and times are not.

torch.compile is the identity in here, and there are no gradients: autograd asks for a driver. Needs a machine without a
card. `plugin.py` brings it to pytest.
"""

import functools
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime import _allocation
from triton.tools.tensor_descriptor import TensorDescriptor

from minivlm2vec_kernels import cards

aten = torch.ops.aten

H100 = {"name": "NVIDIA H100 (pretended)", "multi_processor_count": 132, "total_memory": 80 << 30, "uuid": "pretended"}
AMD_CAPABILITIES = {"gfx90a": (9, 0), "gfx942": (9, 4), "gfx1100": (11, 0)}  # what torch says that they are
RANDOM = {getattr(aten, name).default for name in ("uniform_", "normal_", "random_")}
LARGEST_GRID = (2**31 - 1, 65_535, 65_535)


class NoGradients(NotImplementedError):
    pass


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, int, int]
    shared: int  # bytes
    captured: bool  # into a CUDA graph


@dataclass
class Card:
    """What happened on it."""

    capability: tuple[int, int]
    gfx: str = ""  # AMD's name of it; "" for one of NVIDIA's
    launches: list[Launch] = field(default_factory=list)
    waits: Counter[str] = field(default_factory=Counter)  # the host waited for the card: by operator or function
    uploads: Counter[str] = field(default_factory=Counter)  # copies to the card: "pinned" or "pageable"
    operators: Counter[str] = field(default_factory=Counter)  # torch's, on the card
    replays: int = 0
    capturing: bool = False

    @property
    def arch(self) -> int:
        return 10 * self.capability[0] + self.capability[1]

    @property
    def target(self) -> GPUTarget:
        if self.gfx:
            return GPUTarget("hip", self.gfx, 64 if self.gfx.startswith("gfx9") else 32)
        return GPUTarget("cuda", self.arch, 32)

    @property
    def kind(self) -> cards.Card:
        return cards.of_amd(self.gfx) if self.gfx else cards.of_nvidia(self.capability)

    def become(self, kind: tuple[int, int] | str) -> None:
        self.gfx = kind if isinstance(kind, str) else ""
        self.capability = AMD_CAPABILITIES[kind] if isinstance(kind, str) else kind
        torch.version.hip = "6.4" if self.gfx else None

    def kernels(self) -> Counter[str]:
        return Counter(launch.kernel for launch in self.launches)

    def wait(self, reason: str) -> None:
        self.not_while_capturing(reason)
        self.waits[reason] += 1

    def not_while_capturing(self, what: str) -> None:
        if self.capturing:
            raise RuntimeError(f"{what} while a CUDA graph is captured")

    def forget(self) -> None:
        for record in (self.launches, self.waits, self.uploads, self.operators):
            record.clear()
        self.replays = 0


@contextmanager
def pretend_card(kind: tuple[int, int] | str = (9, 0)) -> Iterator[Card]:
    """Everything inside, in this thread, finds one card: NVIDIA's of a compute capability, or AMD's of a name."""
    card = Card((9, 0))
    _device_constructors()  # remembers torch's functions, so not ours
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)  # made here, where torch has no CUDA: it avoids asking it
    with ExitStack() as stack:
        for patch in (*_torch_patches(card), *_triton_patches(card)):
            stack.enter_context(patch)
        stack.enter_context(fake_mode)
        stack.enter_context(_TwoMemories(card))
        card.become(kind)
        yield card


# ----------------------------------------------------------------------------------------------- torch's part


class _TwoMemories(TorchDispatchMode):
    """Operators on real tensors of the CPU alone run; all others go on to FakeTensorMode, below."""

    def __init__(self, card: Card):
        super().__init__()
        self.card = card

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        fakes = [x for x in tensors if isinstance(x, FakeTensor)]
        target = kwargs.get("device")
        to_card = target is not None and torch.device(target).type == "cuda"
        if not fakes and not to_card:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func._can_decompose():  # in inference mode these come whole
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func in RANDOM:
            return args[0]
        if func is aten._local_scalar_dense.default:
            return self._scalar(args[0])
        if func is aten._to_copy.default and target is not None and not to_card:
            return self._download(args[0].shape, kwargs.get("dtype") or args[0].dtype, kwargs)
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            self._reads("copy_", kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            with unset_fake_temporarily():
                return args[0].zero_()
        if func is aten._to_copy.default and not fakes:
            self._upload(args[0])
            return torch.empty_like(args[0], device=target, dtype=kwargs.get("dtype"))
        if func is aten.copy_.default and not isinstance(args[1], FakeTensor):
            self._upload(args[1])
            return func(args[0], torch.empty_like(args[1], device=args[0].device))
        self.card.operators[str(func)] += 1
        return func(*args, **kwargs)

    def _scalar(self, x: torch.Tensor):
        self.card.wait("item")
        if x.dtype == torch.bool:
            return True
        return 0.0 if x.dtype.is_floating_point else 0

    def _download(self, shape, dtype: torch.dtype, options: dict) -> torch.Tensor:
        self._reads("to cpu", options.get("non_blocking"))
        with unset_fake_temporarily():
            return torch.ones(shape, dtype=dtype) if dtype == torch.bool else torch.zeros(shape, dtype=dtype)

    def _reads(self, what: str, non_blocking: bool) -> None:
        if non_blocking:
            self.card.not_while_capturing(what)
        else:
            self.card.wait(what)

    def _upload(self, x: torch.Tensor) -> None:
        self.card.not_while_capturing("a copy from the host")
        self.card.uploads["pinned" if x.is_pinned() else "pageable"] += 1


class _Stream:
    """Of this one nothing is known but its name; all work is done at once."""

    def __init__(self, *_, **__):
        self.cuda_stream = id(self)
        self.device = torch.device("cuda", 0)

    def wait_stream(self, other) -> None: ...
    def wait_event(self, event) -> None: ...
    def record_event(self, event=None):
        return event or torch.cuda.Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.card.wait("Stream.synchronize")

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None: ...


class _Event:
    def __init__(self, *_, enable_timing: bool = False, **__):
        self.timed, self.recorded = enable_timing, False

    def record(self, stream=None) -> None:
        self.recorded = True

    def query(self) -> bool:
        return True

    def wait(self, stream=None) -> None: ...

    def synchronize(self) -> None:
        self.card.wait("Event.synchronize")

    def elapsed_time(self, end) -> float:
        if not (self.timed and end.timed and self.recorded and end.recorded):
            raise RuntimeError("both events must be recorded, with enable_timing=True")
        return 1.0


class _Graph:
    def __init__(self, *_, **__):
        self.captured = False

    def replay(self) -> None:
        if not self.captured:
            raise RuntimeError("replay before a capture")
        self.card.not_while_capturing("replay")
        self.card.replays += 1


def _torch_patches(card: Card) -> Iterator[mock._patch]:
    def properties(device=None):
        major, minor = card.capability
        return SimpleNamespace(**H100, major=major, minor=minor, gcnArchName=f"{card.gfx}:sramecc+:xnack-")

    @contextmanager
    def same(*_, **__):
        yield

    @contextmanager
    def capture(graph, **_):
        card.not_while_capturing("a capture")
        card.capturing = True
        try:
            yield
        finally:
            card.capturing = False
        graph.captured = True

    def is_capturing() -> bool:
        return card.capturing

    own, plain_tolist, plain_device = {"card": card}, FakeTensor.tolist, FakeTensor.device.fget
    thread = threading.get_ident()
    # in the middle of an operator it says "meta", which is for the operator alone
    device = property(lambda x: plain_device(x) if threading.get_ident() == thread else x.fake_device)
    stream = type("Stream", (_Stream,), own)
    values = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: H100["name"],
        "get_device_capability": lambda device=None: card.capability,
        "get_device_properties": properties,
        "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda device=None: card.wait("synchronize"),
        "empty_cache": lambda: card.not_while_capturing("empty_cache"),
        "mem_get_info": lambda device=None: (H100["total_memory"], H100["total_memory"]),
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "set_sync_debug_mode": lambda mode: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "stream": same,
        "graph": capture,
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": is_capturing,
        "Stream": stream,
        "current_stream": lambda device=None: stream(),
        "Event": type("Event", (_Event,), own),
        "CUDAGraph": type("CUDAGraph", (_Graph,), own),
        "_sleep": lambda cycles: None,
    }
    for name, value in values.items():
        yield mock.patch.object(torch.cuda, name, value)
    yield mock.patch.object(torch.version, "hip", None)
    yield mock.patch.object(cards, "card", lambda device: card.kind)  # a test may change what it is
    yield mock.patch.object(cards, "_too_old", lambda device: not card.gfx and card.capability < cards.OLDEST)
    yield mock.patch.object(fake_tensor, "init_gpu_context", lambda device: None)
    yield mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda f: f))
    yield mock.patch.object(torch.nn.Module, "compile", lambda self, **_: None)
    yield mock.patch.object(torch.nn.Module, "_apply", _apply)
    yield mock.patch.object(torch.Tensor, "pin_memory", _pin)
    yield mock.patch.object(torch.Tensor, "is_pinned", lambda x, *_: getattr(x, "pretends_to_be_pinned", False))
    yield mock.patch.object(torch, "Generator", _Generator)
    yield mock.patch.object(FakeTensor, "data_ptr", _address)
    yield mock.patch.object(FakeTensor, "device", device)
    yield mock.patch.object(FakeTensor, "tolist", lambda x: x.cpu().tolist() if x.is_cuda else plain_tolist(x))
    yield mock.patch.object(torch, "equal", lambda a, b: a.shape == b.shape and a.device == b.device)
    # what insists on a driver before it comes to an operator
    yield mock.patch.object(torch, "tensor", _tensor)
    own_methods = {
        "to": _to,
        "cuda": lambda x, device=None, **options: x.to("cuda", **options),
        "copy_": lambda x, source, non_blocking=False: aten.copy_(x, source, non_blocking),
        "contiguous": lambda x, memory_format=torch.contiguous_format: aten.contiguous(x, memory_format=memory_format),
        "requires_grad_": _requires_grad,
        "__invert__": lambda x: aten.bitwise_not(x),
        "nonzero": functools.partialmethod(_nonzero, card=card),
        "__getitem__": _get_item,
        "__setitem__": _set_item,
        "__float__": lambda x: float(x.item()),
        "__format__": lambda x, form: format(x.item() if x.dim() == 0 else str(x), form),
    }
    for name, method in own_methods.items():
        yield mock.patch.object(torch.Tensor, name, method)


def _apply(module: torch.nn.Module, fn, recurse: bool = True) -> torch.nn.Module:
    """torch's own swaps fake tensors, which fails where something else knows of them."""
    for each in module.modules() if recurse else (module,):
        for name, p in each._parameters.items():
            if p is not None:
                each._parameters[name] = torch.nn.Parameter(fn(p.detach()), p.requires_grad)
        each._buffers.update({name: fn(x) for name, x in each._buffers.items() if x is not None})
    return module


def _pin(x: torch.Tensor) -> torch.Tensor:
    copy = x.clone()
    copy.pretends_to_be_pinned = True
    return copy


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.pretended = torch.device(device)
        return made

    device = property(lambda self: self.pretended)


def _address(x: FakeTensor) -> int:
    """Storages begin at multiples of 512 bytes, as the allocator's do."""
    return (x.untyped_storage()._cdata << 10) + x.storage_offset() * x.element_size()


def _to(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    if device is None or device.type != "cuda" or x.is_cuda:
        return torch._C.TensorBase.to(x, *args, **kwargs)
    return aten._to_copy(x, device=device, dtype=dtype, non_blocking=non_blocking)


def _tensor(data, *, device=None, _plain=torch.tensor, **options) -> torch.Tensor:
    device = torch.get_default_device() if device is None else device
    return _plain(data, device="cpu", **options).to(device)


def _requires_grad(x: torch.Tensor, requires_grad: bool = True) -> torch.Tensor:
    if not x.is_cuda:
        return torch._C.TensorBase.requires_grad_(x, requires_grad)
    if requires_grad and sys._getframe(1).f_code is not torch.nn.Parameter.__new__.__code__:
        raise NoGradients("no gradients on a pretended card")
    return x


def _get_item(x: torch.Tensor, index) -> torch.Tensor:
    if not x.is_cuda:
        return torch._C.TensorBase.__getitem__(x, index)
    index = list(index) if isinstance(index, tuple) else [index]
    named = sum(i is not None and i is not Ellipsis for i in index)
    if Ellipsis in [i for i in index if not isinstance(i, torch.Tensor)]:
        at = next(n for n, i in enumerate(index) if i is Ellipsis)
        index[at : at + 1] = [slice(None)] * (x.dim() - named)
    dim, tensors = 0, []
    for i in index:
        if i is None:
            x = x.unsqueeze(dim)
        elif isinstance(i, int):
            x, dim = x.select(dim, i), dim - 1
        elif isinstance(i, slice):
            x = aten.slice(x, dim, i.start, i.stop, i.step or 1) if i != slice(None) else x
        else:
            tensors += [None] * (dim - len(tensors)) + [torch.as_tensor(i)]
        dim += 1
    return aten.index(x, tensors) if tensors else x


def _nonzero(x: torch.Tensor, *, card: Card) -> torch.Tensor:
    """None: there is nothing but zeros."""
    if not x.is_cuda:
        return torch._C.TensorBase.nonzero(x)
    card.wait("nonzero")
    return torch.empty(0, x.dim(), dtype=torch.int64, device=x.device)


def _set_item(x: torch.Tensor, index, value) -> None:
    if not x.is_cuda:
        torch._C.TensorBase.__setitem__(x, index, value)
    elif isinstance(index, torch.Tensor):
        aten.index_put_(x, [index], torch.as_tensor(value, dtype=x.dtype, device=x.device))
    elif isinstance(value, torch.Tensor):
        _get_item(x, index).copy_(value)
    else:
        _get_item(x, index).fill_(value)


# ---------------------------------------------------------------------------------------------- Triton's part


@dataclass(frozen=True)
class _Pointer:
    """What a kernel gets of a tensor."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


def _argument(x):
    if isinstance(x, FakeTensor):
        if not x.is_cuda:
            raise ValueError(f"Pointer argument cannot be accessed from Triton (cpu tensor?): {x}")
        return _Pointer(x.dtype, x.data_ptr())
    if isinstance(x, torch.Tensor):
        raise ValueError(f"Pointer argument cannot be accessed from Triton (cpu tensor?): {tuple(x.shape)}")
    return replace(x, base=_argument(x.base)) if isinstance(x, TensorDescriptor) else x


def _triton_patches(card: Card) -> Iterator[mock._patch]:
    run = triton.JITFunction.run

    def compile_alone(self, *args, **kwargs):
        return run(self, *map(_argument, args), **{k: _argument(v) for k, v in kwargs.items()})

    yield mock.patch.object(triton.JITFunction, "run", compile_alone)
    yield mock.patch.object(triton.runtime.driver, "_active", _driver(card))


def _driver(card: Card) -> SimpleNamespace:
    def launcher(source, metadata):
        return functools.partial(_launch, card, metadata)

    def load_binary(name, kernel, shared, device):
        return object(), object(), 0, 0, 1024

    utils = SimpleNamespace(
        get_device_properties=lambda device: {
            "max_shared_mem": card.kind.shared,
            "multiprocessor_count": H100["multi_processor_count"],
            "warpSize": card.target.warp_size,
        },
        load_binary=load_binary,
    )
    return SimpleNamespace(
        get_current_device=lambda: card.gfx or card.arch,  # kernels are kept by device
        get_current_stream=lambda device: 0,
        get_current_target=lambda: card.target,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_device_interface=lambda: torch.cuda,
        launcher_cls=launcher,
        utils=utils,
    )


def _launch(card: Card, metadata, x: int, y: int, z: int, stream, function, *_) -> None:
    grid = (x, y, z)
    if not all(0 < n <= most for n, most in zip(grid, LARGEST_GRID, strict=True)):
        raise ValueError(f"{metadata.name}: no card takes a grid of {grid}")
    if getattr(metadata, "global_scratch_size", 0):
        allocate = _allocation._allocator.get()
        allocate(x * y * z * metadata.global_scratch_size, metadata.global_scratch_align, stream)
    card.launches.append(Launch(metadata.name, grid, metadata.shared, card.capturing))
