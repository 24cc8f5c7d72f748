"""CUDA graphs for small batches: one launch for the whole decoder instead of some three hundred, and one for the
tower's layers instead of 184.

A short query takes about 3 ms of reading weights but longer to launch kernel by kernel. A graph replays its launches
for fixed shapes on fixed addresses, so a batch is copied into buffers and padded to one of few shapes (`Bucket`):

    rows beyond the last sequence belong to none: no attention reads them, and all else is row by row, so whatever
        they hold stays there
    sequences beyond the batch's are empty: they begin and end where the last one ends

An image has few crops, so the tower has a graph for each number of them, without padding.

What a user may hook or replace stays outside: token and patch embeddings, the tower's first norm, the projector.
T packed tokens, B sequences, D width, C crops, L positions.
"""

import functools
import threading
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from minivlm2vec_kernels import choose_backend
from minivlm2vec_kernels.ops import needs_grad

from ..batch import PackedBatch
from ..decoder import Packing
from ..model import VLM2Vec
from ..rope import inverse_frequencies, rotations
from .fused import FusedVisionTower, FusedVLM2Vec
from .prefix import SharedBatch

MAX_TOKENS = 2048  # above, 3.3 ms of launches are at most 15 % of the time and hidden behind it
MAX_CROPS = 8  # from here on the tower computes for longer than its launches take (bench/README.md)
MAX_GRAPHS = 32
MAX_SEEN = 128  # shapes that are remembered to have come once
# Relative errors of a vector that are rounding: between two orders of summing, cosines of 0.999 were seen in bfloat16
# at full size, which is an error of 0.045. A graph that reads or writes a wrong address is off by about 1.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


@dataclass(frozen=True)
class Bucket:
    """The shape that a batch is padded to."""

    tokens: int
    sequences: int
    max_seqlen: int


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

    def __init__(self, model: FusedVLM2Vec):
        weight = model.decoder.embed_tokens.weight
        self.x = weight.new_zeros(MAX_TOKENS, weight.shape[1])
        self.frequencies, _ = inverse_frequencies(model.config.decoder, weight.device)  # graphs read them
        self.position_ids = torch.zeros(MAX_TOKENS, dtype=torch.int64, device=weight.device)
        self.cu_seqlens = torch.zeros(MAX_TOKENS + 1, dtype=torch.int32, device=weight.device)

    def fill(self, x: Tensor, batch: PackedBatch, bucket: Bucket) -> None:
        """x [T, D]: the batch's input embeddings."""
        T, B = batch.num_tokens, batch.num_sequences
        self.x[:T].copy_(x)
        self.position_ids[:T].copy_(batch.position_ids)
        self.cu_seqlens[: B + 1].copy_(batch.cu_seqlens)
        self.cu_seqlens[B + 1 : bucket.sequences + 1].fill_(T)

    def vectors(self, model: FusedVLM2Vec, bucket: Bucket, normalize: bool) -> Tensor:
        """[bucket.sequences, D], of which the batch's come first. Overwrites `x`; waits for nothing."""
        config, x = model.config.decoder, self.x[: bucket.tokens]
        positions = self.position_ids[: bucket.tokens]
        cos, sin = (t.to(x.dtype) for t in rotations(positions, self.frequencies, config))
        cu_seqlens = self.cu_seqlens[: bucket.sequences + 1]
        packing = Packing(cu_seqlens, bucket.max_seqlen, cos, sin)
        return model.decode_(x, packing, normalize=normalize)


@functools.cache
def _lock_of(device: torch.device) -> threading.RLock:  # type: ignore[valid-type]
    """One for all programs of a device: no capture may meet another, nor the waits around it. The decoder's holds it
    while the tower's run."""
    return threading.RLock()


Key = TypeVar("Key", bound=Hashable)
Given = TypeVar("Given")


class Programs(ABC, Generic[Key, Given]):
    """Programs for inputs of few shapes, each with a key. One call runs at a time, whatever the threads.

    A key's program is made when the key comes for the second time (among the last `MAX_SEEN` that came once;
    for the first time with make_at=1), and at most `max_programs` are kept: a new one takes the place of the one used
    longest ago. When it is made, its first result is compared with that of the same input as it is; a program that
    differs by more than rounding is dropped for good, with a warning.

    This class runs programs eagerly, on any device; `Captured` captures them.
    """

    def __init__(self, model: FusedVLM2Vec, *, max_programs: int = MAX_GRAPHS, make_at: int = 2):
        self.model, self.max_programs, self.make_at = model, max_programs, make_at
        self.programs: OrderedDict[Key, Callable[[], Tensor]] = OrderedDict()
        self.enabled = True
        self._seen: OrderedDict[Key, None] = OrderedDict()
        self._wrong: set[Key] = set()
        self._lock = _lock_of(model.device)

    @abstractmethod
    def __call__(self, *args: Any, **options: Any) -> Tensor:
        """`result`, or the input as it is where no program fits."""

    @abstractmethod
    def _as_it_is(self, key: Key, given: Given) -> Tensor:
        """Without a program; leaves `given` as it was."""

    @abstractmethod
    def _fill(self, key: Key, given: Given) -> None:
        """Copies the input to where programs read it."""

    @abstractmethod
    def _body(self, key: Key) -> Tensor:
        """What a program does; it may write over what was filled in, and waits for nothing."""

    def _cut(self, out: Tensor, given: Given) -> Tensor:
        """The input's part of what a program gave, still the program's memory."""
        return out

    def recapture(self) -> None:
        """Forgets all programs, which are then made anew: after the model's weights were moved."""
        with self._lock:
            self._wait()
            for kept in (self.programs, self._seen, self._wrong):
                kept.clear()
            self.enabled = True

    def result(self, key: Key, given: Given) -> Tensor:
        """By the key's program, where there is one or is to be."""
        with self._lock:
            if key in self.programs:
                self.programs.move_to_end(key)
                return self._run(self.programs[key], key, given)
            if not self._comes_again(key):
                return self._as_it_is(key, given)
            return self._begin(key, given)

    def _comes_again(self, key: Key) -> bool:
        """Whether a program is to be made for it."""
        if key in self._wrong:
            return False
        if key in self._seen or self.make_at == 1:
            self._seen.pop(key, None)
            return True
        self._seen[key] = None
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return False

    def _begin(self, key: Key, given: Given) -> Tensor:
        """Makes a program and checks it by its first input, whose result is returned."""
        expected = self._as_it_is(key, given)
        if not expected.isfinite().all():
            return expected
        self._fill(key, given)  # making a program may run it
        program = self._make(lambda: self._body(key))
        if program is None:
            return expected
        error = relative_error(self._run(program, key, given), expected)
        allowed = ROUNDING[self.model.dtype]
        if not error <= allowed:  # NaN is not
            self._wrong.add(key)
            warnings.warn(
                f"a program for {key} gave other vectors than the same batch without it (relative error "
                f"{error:.2g}, rounding is below {allowed}); it is dropped, and such batches run as they are",
                stacklevel=4,
            )
            return expected
        if len(self.programs) >= self.max_programs:
            self._wait()  # it may still be running
            self.programs.popitem(last=False)
        self.programs[key] = program
        return expected

    def _run(self, program: Callable[[], Tensor], key: Key, given: Given) -> Tensor:
        self._fill(key, given)
        return self._cut(program(), given).clone()

    def _make(self, run: Callable[[], Tensor]) -> Callable[[], Tensor] | None:
        return run

    def _wait(self) -> None:
        pass


Padded = tuple[Bucket, bool]  # and whether vectors are normalised


class PaddedModel(Programs[Padded, PackedBatch]):
    """Calls like the model's, small batches padded to buckets."""

    def __init__(self, model: FusedVLM2Vec, **options: Any):
        super().__init__(model, **options)
        self.buffers = Buffers(model)

    def recapture(self) -> None:
        super().recapture()
        tower = self.model.vision
        if isinstance(tower, FusedVisionTower) and tower.graphs is not None:
            tower.graphs.recapture()

    def takes(self, batch: PackedBatch) -> bool:
        """Whether a batch has a program, or gets one when it comes again."""
        return self.enabled and bucket_of(batch, self.model.config.decoder.original_max_position_embeddings) is not None

    @torch.inference_mode()
    def __call__(self, batch: PackedBatch, *, normalize: bool = True) -> Tensor:
        bucket = bucket_of(batch, self.model.config.decoder.original_max_position_embeddings)
        if bucket is None or not self.enabled:
            return self.model.run(batch, normalize=normalize)
        return self.result((bucket, normalize), batch)

    def _as_it_is(self, key: Padded, batch: PackedBatch) -> Tensor:
        return self.model.run(batch, normalize=key[1])

    def _fill(self, key: Padded, batch: PackedBatch) -> None:
        self.buffers.fill(self.model.embed(batch), batch, key[0])

    def _body(self, key: Padded) -> Tensor:
        return self.buffers.vectors(self.model, *key)

    def _cut(self, out: Tensor, batch: PackedBatch) -> Tensor:
        return out[: batch.num_sequences]


@dataclass(frozen=True)
class Crops:
    """How many pass through the tower's layers together."""

    count: int


class TowerPrograms(Programs[Crops, Tensor]):
    """Calls like the tower's `layers_`, of up to MAX_CROPS crops by programs."""

    def __init__(self, model: FusedVLM2Vec, **options: Any):
        super().__init__(model, **options)
        assert isinstance(model.vision, FusedVisionTower)
        self.tower, config = model.vision, model.vision.config
        shape = MAX_CROPS, config.num_positions, config.hidden_size
        with torch.inference_mode(False):  # the tower is called outside of that mode as well
            self.x = torch.zeros(shape, dtype=model.dtype, device=model.device)

    def __call__(self, x: Tensor) -> Tensor:
        """x [C, L, D], which is written over -> [C, P * P, D]."""
        alike = (x.shape[1:], x.dtype, x.device) == (self.x.shape[1:], self.x.dtype, self.x.device)
        if not (self.enabled and alike and len(x) <= MAX_CROPS) or needs_grad(x):
            return self.tower.layers_(x)
        with torch.no_grad():
            return self.result(Crops(len(x)), x)

    def _as_it_is(self, key: Crops, x: Tensor) -> Tensor:
        return self.tower.layers_(x.clone())

    def _fill(self, key: Crops, x: Tensor) -> None:
        self.x[: key.count].copy_(x)

    def _body(self, key: Crops) -> Tensor:
        return self.tower.layers_(self.x[: key.count])


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """The greatest |ours - expected| / |expected| of all vectors [..., D]; waits for the device."""
    return float(((ours - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)).max())


class Captured(Programs[Key, Given]):
    """Programs as CUDA graphs. All graphs share one memory pool, whose size is that of the largest: they never
    run at the same time, and their outputs are copied out.

    A graph holds the addresses of the weights: they may be written over, and after anything that moves them
    `recapture` is needed. Calls may come from several threads and streams: each waits for the buffers that the last
    one used. Raises ValueError where the model does not run Triton kernels on a CUDA device.

    strict: raise what a capture raises; else warn, once, and run without graphs from then on.
    """

    def __init__(self, model: FusedVLM2Vec, *, strict: bool = True, **options: Any):
        if not can_graph(model):
            raise ValueError(f"CUDA graphs need the Triton kernels on a CUDA device, got {model.device}")
        super().__init__(model, **options)
        self.strict, self._device = strict, model.device
        with torch.cuda.device(self._device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()
            self._read = torch.cuda.Event()  # when the last call has read the buffers

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        with torch.cuda.device(self._device):
            return super().__call__(*args, **options)  # type: ignore[safe-super]

    def _fill(self, key: Key, given: Given) -> None:
        torch.cuda.current_stream().wait_event(self._read)
        super()._fill(key, given)  # type: ignore[safe-super]

    def _run(self, program: Callable[[], Tensor], key: Key, given: Given) -> Tensor:
        try:
            return super()._run(program, key, given)
        finally:  # what follows the replay may fail, for want of memory
            self._read.record()

    def _make(self, run: Callable[[], Tensor]) -> Callable[[], Tensor] | None:
        """Runs it once on the stream of the capture, so that kernels are compiled and cuBLAS has its workspace, then
        captures it. Other threads may pin memory meanwhile ("thread_local")."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                run()
            torch.cuda.current_stream().wait_stream(self._stream)
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                out = run()
        except RuntimeError as error:
            if self.strict:
                raise
            warnings.warn(f"CUDA graphs are off, as one could not be captured: {error}", stacklevel=2)
            self.enabled = False
            return None

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def _wait(self) -> None:
        torch.cuda.synchronize(self._device)


class GraphedModel(Captured[Padded, PackedBatch], PaddedModel):
    """PaddedModel with CUDA graphs."""


class GraphedTower(Captured[Crops, Tensor], TowerPrograms):
    """TowerPrograms with CUDA graphs."""


def can_graph(model: VLM2Vec) -> bool:
    """Whether `Captured` takes it: Triton kernels on a CUDA device."""
    with torch.no_grad():
        return model.device.type == "cuda" and choose_backend(model.backend, next(model.parameters())) == "triton"
