"""CUDA graphs for small batches: one launch for the whole decoder instead of some three hundred.

A short query takes about 3 ms of reading weights but longer to launch kernel by kernel. A graph replays its launches
for fixed shapes on fixed addresses, so a batch is copied into buffers and padded to one of few shapes (`Bucket`):

    rows beyond the last sequence belong to none: no attention reads them, and all else is row by row, so whatever
        they hold stays there
    sequences beyond the batch's are empty: they begin and end where the last one ends

Token embeddings and images stay outside the graph. T packed tokens, B sequences, D width.
"""

import functools
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from minivlm2vec_kernels import choose_backend

from .batch import PackedBatch, SharedBatch
from .decoder import Packing, inverse_frequencies, rotations
from .model import Pooling, VLM2Vec, pool_last_token

MAX_TOKENS = 2048  # above, launches take less than 2 % of the time and are hidden behind it
MAX_GRAPHS = 32
MAX_COUNTED = 4096  # shapes whose uses are counted
NEVER = 2**63


@dataclass(frozen=True)
class Bucket:
    """The shape that a batch is padded to."""

    tokens: int
    sequences: int
    max_seqlen: int


Key = tuple[Bucket, bool]  # the bool: whether vectors are normalised


def bucket_of(batch: PackedBatch, longest: int) -> Bucket | None:
    """The bucket of a batch, or None where it is to run as it is: more than MAX_TOKENS tokens, a sequence longer
    than `longest` (whose rotations are others), shared prefixes, or nothing at all.

    Tokens: 32, 64, 128, then multiples of 128, the height of a matrix product's tile, so that padding adds no tile
    that was not there in part. Sequences and the greatest length: powers of two (sequences at most
    as many as tokens).
    """
    T, B, L = batch.num_tokens, batch.num_sequences, batch.max_seqlen
    if not 0 < T <= MAX_TOKENS or longest < L or isinstance(batch, SharedBatch):
        return None
    tokens = max(32, _power_of_two(T)) if T <= 128 else -(-T // 128) * 128
    return Bucket(tokens, min(_power_of_two(B), tokens), max(32, _power_of_two(L)))


def _power_of_two(n: int) -> int:
    """The next one from n on."""
    return 1 << (n - 1).bit_length()


class Buffers:
    """Where a padded batch lies: the same memory for every bucket."""

    def __init__(self, model: VLM2Vec):
        weight = model.decoder.embed_tokens.weight
        self.x = weight.new_zeros(MAX_TOKENS, weight.shape[1])
        self.position_ids = torch.zeros(MAX_TOKENS, dtype=torch.int64, device=weight.device)
        self.cu_seqlens = torch.zeros(MAX_TOKENS + 1, dtype=torch.int32, device=weight.device)

    def fill(self, x: Tensor, batch: PackedBatch, bucket: Bucket) -> None:
        """x [T, D]: the batch's input embeddings."""
        T, B = batch.num_tokens, batch.num_sequences
        self.x[:T].copy_(x)
        self.position_ids[:T].copy_(batch.position_ids)
        self.cu_seqlens[: B + 1].copy_(batch.cu_seqlens)
        self.cu_seqlens[B + 1 : bucket.sequences + 1].fill_(T)

    def vectors(self, model: VLM2Vec, bucket: Bucket, normalize: bool) -> Tensor:
        """[bucket.sequences, D], of which the batch's come first. Overwrites `x`; waits for nothing."""
        config, x = model.config.decoder, self.x[: bucket.tokens]
        short, _ = inverse_frequencies(config, x.device)
        cos, sin = (t.to(x.dtype) for t in rotations(self.position_ids[: bucket.tokens], short, config))
        cu_seqlens = self.cu_seqlens[: bucket.sequences + 1]
        packing = Packing(cu_seqlens, bucket.max_seqlen, cos, sin, backend=model.backend)
        return model.decode(x, packing, normalize=normalize)


class PaddedModel:
    """Calls like VLM2Vec's, small batches padded to buckets. One call runs at a time, whatever the threads.

    A bucket's program is made when the bucket comes for the `make_at`-th time; before that, and where hooks are
    registered on the decoder's modules, which a program would not call, the batch runs as it is. At most `max_programs`
    are kept: a new one takes the place of the one used longest ago, unless that was used more often (which then counts
    half), so that batches of ever new shapes do not spend their time on making programs.

    This class runs programs eagerly, on any device; `GraphedModel` captures them.
    """

    def __init__(self, model: VLM2Vec, *, max_programs: int = MAX_GRAPHS, make_at: int = 2):
        self.model = model
        self.max_programs, self.make_at = max_programs, make_at
        self.programs: OrderedDict[Key, Callable[[], Tensor]] = OrderedDict()
        self.uses: Counter[Key] = Counter()
        self.buffers = Buffers(model)
        self._lock = threading.Lock()
        self._look_at_modules()
        _PADDED.add(self)
        _watch_modules()

    @torch.inference_mode()
    def __call__(self, batch: PackedBatch, *, pool: Pooling = pool_last_token, normalize: bool = True) -> Tensor:
        bucket = bucket_of(batch, self.model.config.decoder.original_max_position_embeddings)
        if bucket is None or pool is not pool_last_token or any(map(len, self._hooks)):
            return self.model(batch, pool=pool, normalize=normalize)
        with self._lock:
            if self._modules_changed:
                self._forget_all()
            key = bucket, normalize
            self.uses[key] += 1
            if key not in self.programs and not self._worth_making(key):
                return self.model(batch, pool=pool, normalize=normalize)
            x = self.model.embed(batch)
            if key not in self.programs:
                self.buffers.fill(x, batch, bucket)  # making a program may run it, which overwrites them
                self.programs[key] = self._make(lambda: self.buffers.vectors(self.model, bucket, normalize))
            self.programs.move_to_end(key)
            self.buffers.fill(x, batch, bucket)
            return self.programs[key]()[: batch.num_sequences].clone()

    def _worth_making(self, key: Key) -> bool:
        """Whether a program is to be made for it; then there is room."""
        if len(self.uses) > MAX_COUNTED:
            self.uses = Counter({k: n for k, n in self.uses.items() if k in self.programs or k == key})
        if self.uses[key] < self.make_at:
            return False
        if len(self.programs) < self.max_programs:
            return True
        oldest = next(iter(self.programs))
        if self.uses[oldest] > self.uses[key]:
            self.uses[oldest] //= 2
            return False
        self._forget(oldest)
        return True

    def _make(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return run

    def _forget(self, key: Key) -> None:
        del self.programs[key]

    def _forget_all(self) -> None:
        for key in list(self.programs):
            self._forget(key)
        self._look_at_modules()

    def _look_at_modules(self) -> None:
        modules = list(self.model.decoder.modules())
        self._parts = {id(m) for m in modules}
        self._hooks = [hooks for m in modules for hooks in (m._forward_pre_hooks, m._forward_hooks)]
        self._modules_changed = False

    def notice(self, module: nn.Module) -> None:
        """A module or parameter of this one was replaced or added."""
        self._modules_changed |= id(module) in self._parts


_PADDED: WeakSet[PaddedModel] = WeakSet()


def _notice(module: nn.Module, name: str, value: nn.Module | nn.Parameter | None) -> None:
    for padded in list(_PADDED):
        padded.notice(module)


@functools.cache  # once, and not before it is needed
def _watch_modules() -> None:
    register_module_module_registration_hook(_notice)
    register_module_parameter_registration_hook(_notice)


class GraphedModel(PaddedModel):
    """PaddedModel with CUDA graphs. All graphs share one memory pool, whose size is that of the largest: they never
    run at the same time, and their outputs are copied out.

    A graph holds the addresses of the weights. Modules and parameters that are replaced by assignment (as by
    `load_state_dict(assign=True)`) are noticed and captured anew, and weights may be written over; after anything
    else that moves them (`model.to(...)`, a new `forward` of a module), make a new one. Raises ValueError where the
    model does not run Triton kernels on a CUDA device.

    strict: raise what a capture raises; else warn, once, and run without graphs from then on.
    """

    def __init__(self, model: VLM2Vec, *, max_programs: int = MAX_GRAPHS, make_at: int = 2, strict: bool = True):
        weight = model.decoder.norm.weight
        if not can_graph(model):
            with torch.no_grad():
                backend = choose_backend(model.backend, weight)
            raise ValueError(f"CUDA graphs need the Triton kernels on a CUDA device, got {backend} on {weight.device}")
        super().__init__(model, max_programs=max_programs, make_at=make_at)
        self.strict = strict
        self._device = weight.device
        with torch.cuda.device(self._device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()

    def __call__(self, batch: PackedBatch, **options) -> Tensor:
        with torch.cuda.device(self._device):
            return super().__call__(batch, **options)

    def _make(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Runs it once on the stream of the capture, so that kernels are compiled and cuBLAS has its workspace, then
        captures it. Other threads may pin memory meanwhile ("thread_local")."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                out = run()
        except RuntimeError as error:
            if self.strict:
                raise
            warnings.warn(f"CUDA graphs are off, as one could not be captured: {error}", stacklevel=2)
            self.make_at = NEVER
            return run

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def _forget(self, key: Key) -> None:
        torch.cuda.synchronize()  # it may still be running
        super()._forget(key)


def can_graph(model: VLM2Vec) -> bool:
    """Whether GraphedModel takes it: Triton kernels on a CUDA device."""
    weight = model.decoder.norm.weight
    with torch.no_grad():
        return weight.is_cuda and choose_backend(model.backend, weight) == "triton"
