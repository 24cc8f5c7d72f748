"""CUDA graphs for small batches: one launch for the whole decoder instead of some three hundred.

A short query takes about 3 ms of reading weights but longer to launch kernel by kernel. A graph replays its launches
for fixed shapes on fixed addresses, so a batch is copied into buffers and padded to one of few shapes (`Bucket`):

    rows beyond the last sequence belong to none: no attention reads them, and all else is row by row, so whatever
        they hold stays there
    sequences beyond the batch's are empty: they begin and end where the last one ends

Token embeddings and images stay outside the graph. T packed tokens, B sequences, D width.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minivlm2vec_kernels import choose_backend

from .batch import PackedBatch, SharedBatch
from .decoder import Packing, inverse_frequencies, rotations
from .model import Pooling, VLM2Vec, pool_last_token

MAX_TOKENS = 2048  # above, launches take less than 2 % of the time and are hidden behind it
MAX_GRAPHS = 32


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
    """Calls like VLM2Vec's, small batches padded to buckets. Each bucket's program is made when it is first needed;
    the `max_programs` used last are kept. One call runs at a time, whatever the threads.

    This class runs them eagerly, on any device; `GraphedModel` captures them.
    """

    def __init__(self, model: VLM2Vec, *, max_programs: int = MAX_GRAPHS):
        self.model = model
        self.max_programs = max_programs
        self.programs: OrderedDict[tuple[Bucket, bool], Callable[[], Tensor]] = OrderedDict()
        self.buffers = Buffers(model)
        self._lock = threading.Lock()

    @torch.inference_mode()
    def __call__(self, batch: PackedBatch, *, pool: Pooling = pool_last_token, normalize: bool = True) -> Tensor:
        bucket = bucket_of(batch, self.model.config.decoder.original_max_position_embeddings)
        if bucket is None or pool is not pool_last_token:
            return self.model(batch, pool=pool, normalize=normalize)
        with self._lock:
            x, key = self.model.embed(batch), (bucket, normalize)
            if key not in self.programs:
                self.buffers.fill(x, batch, bucket)  # making a program may run it, which overwrites them
                self._add(*key)
            self.programs.move_to_end(key)
            self.buffers.fill(x, batch, bucket)
            return self.programs[key]()[: batch.num_sequences].clone()

    def _add(self, bucket: Bucket, normalize: bool) -> None:
        if len(self.programs) >= self.max_programs:
            self._forget_oldest()
        self.programs[bucket, normalize] = self._make(lambda: self.buffers.vectors(self.model, bucket, normalize))

    def _make(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return run

    def _forget_oldest(self) -> None:
        self.programs.popitem(last=False)


class GraphedModel(PaddedModel):
    """PaddedModel with CUDA graphs. All graphs share one memory pool, whose size is that of the largest: they never
    run at the same time, and their outputs are copied out.

    A graph holds the addresses of the weights: after weights or layers are replaced (not merely written over), make
    a new one. Raises ValueError where the model does not run Triton kernels on a CUDA device.
    """

    def __init__(self, model: VLM2Vec, *, max_programs: int = MAX_GRAPHS):
        weight = model.decoder.norm.weight
        with torch.no_grad():
            backend = choose_backend(model.backend, weight)
        if not weight.is_cuda or backend != "triton":
            raise ValueError(f"CUDA graphs need the Triton kernels on a CUDA device, got {backend} on {weight.device}")
        super().__init__(model, max_programs=max_programs)
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
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def _forget_oldest(self) -> None:
        torch.cuda.synchronize()  # it may still be running
        super()._forget_oldest()
