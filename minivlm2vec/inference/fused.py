"""The layers for inference: residuals added inside products, activations in their epilogues, and the last layer for
last tokens alone.

Each class here is one of the plain model's with other methods: `fuse` turns a plain layer into it, in place, and
keeps its parameters. What a layer computes is the same, up to rounding. Its insides are not: sums are written over
each other and modules are not called, so hooks could not be told the truth. Hence `InferenceOnly`.

R rows: as many as tokens T, or fewer where prefixes are shared (prefix.py). B sequences, D width, C crops, L positions.
"""

from dataclasses import replace
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minivlm2vec_kernels import ops
from minivlm2vec_kernels.tile_schedule import TileSchedule

from ..batch import Grid, PackedBatch
from ..decoder import MLP, Attention, Decoder, DecoderLayer, Packing, RMSNorm
from ..linear import Embedding, Linear
from ..model import VLM2Vec
from ..vision import LayerNorm, PatchEmbedding, VisionAttention, VisionEmbeddings, VisionLayer, VisionMLP, VisionTower
from .prefix import LAUNCH_BOUND_ROWS, WEIGHT_BOUND_ROWS, SharedBatch, SharedPacking, share_prefixes


def _refuse(what: str, instead: str = "") -> Any:
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"{type(self).__name__} is made for inference alone and cannot {what}: load the model with optimize=False"
            + instead
        )

    return method


class InferenceOnly(nn.Module):
    """A module whose insides are not what they seem: whatever would look at them or change them raises."""

    register_forward_pre_hook = register_forward_hook = _refuse("call hooks")
    register_full_backward_pre_hook = register_full_backward_hook = _refuse("call hooks")
    register_backward_hook = register_state_dict_pre_hook = _refuse("call hooks")
    state_dict = load_state_dict = _load_from_state_dict = _refuse("be saved or loaded")
    __deepcopy__ = __reduce_ex__ = _refuse(
        "be copied or pickled", ", or anew (from_pretrained) in the process that needs it"
    )
    _apply = _refuse("be moved or cast")
    compile = _refuse("be compiled")
    if torch.__version__ >= "2.14":  # torch.compile asks for these at the first call, and for nothing of its own before
        _initialize_hook = _infer_parameters = _refuse("be compiled")
    _replace = add_module = register_module = __delattr__ = _refuse("have a part replaced")

    def train(self, mode: bool = True) -> Any:
        return self._train() if mode else super().train(False)

    _train = _refuse("be trained")

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module | nn.Parameter) or name in self._modules or name == "forward":
            self._replace()
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "_torchdynamo_orig_callable":  # what torch.compile before 2.14 asks a module for, first of all
            self.compile()
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name not in ("weight", "bias"):  # of a packed layer, for torch.nn.utils and whoever else looks at them
                raise
            how = "load the model with optimize=False"
            raise AttributeError(f"{error}: its numbers are stored otherwise, for inference alone; {how}") from None


class FusedLinear(InferenceOnly, Linear):
    """y = x W^T + b, and the forms in which fused layers need it. What stores or multiplies a matrix otherwise
    (prepack.py, fp8.py) has these methods too. x is a Tensor, or QuantizedRows for a layer that takes them."""

    backend: str | None

    def add_(self, residual: Tensor, x: Tensor, *, bias_is_in: bool = False) -> Tensor:
        """residual + x W^T + b, for which `residual` may be written over. bias_is_in: it holds b already, as
        `bias_ahead` allows."""
        return ops.linear_add_(residual, x, self.weight, None if bias_is_in else self.bias, backend=self.backend)

    def bias_ahead(self) -> Tensor | None:
        """The bias, if `add_` can do without: whoever normalises the residual then adds it in the same pass. None
        where there is none to add, and where the product adds it for nothing."""
        return self.bias

    def silu_mul(self, x: Any) -> Tensor:
        """silu(gate) * up, where gate is the first half of the outputs (no bias)."""
        return ops.linear_silu_mul(x, self.weight, backend=self.backend)

    def quick_gelu(self, x: Tensor) -> Tensor:
        """quick_gelu(x W^T + b)."""
        return ops.linear_quick_gelu(x, self.weight, self.bias, backend=self.backend)

    def rows(self, x: Any, start: int, stop: int | None) -> Tensor:
        """Outputs start to stop alone: x W[start:stop]^T (+ b)."""
        return F.linear(x, self.weight[start:stop], None if self.bias is None else self.bias[start:stop])


class QuantizedRows(NamedTuple):
    """Rows of inputs as `ops.quantize_rows` gives them: q [R, K] e4m3, scale [R] float32."""

    q: Tensor
    scale: Tensor

    def at(self, rows: Tensor) -> "QuantizedRows":
        """Some rows; as bytes, since torch cannot index e4m3 everywhere."""
        return QuantizedRows(self.q.view(torch.uint8)[rows].view(self.q.dtype), self.scale[rows])


Rows = Tensor | QuantizedRows


class FusedRMSNorm(InferenceOnly, RMSNorm):
    def ahead_of(self, x: Tensor, first: nn.Linear) -> Rows:
        """The normed x [R, D] as the block's first matrix takes it."""
        if getattr(first, "takes_quantized", False):
            return QuantizedRows(*ops.rms_norm_quantize(x, self.weight, self.eps, backend=self.backend))
        return self(x)


class FusedLayerNorm(InferenceOnly, LayerNorm):
    def ahead_of(self, x: Tensor, last: FusedLinear) -> tuple[Tensor, Tensor, bool]:
        """The normed x [T, D], and x with the bias of the block's last matrix already in it, where that saves a pass
        over x, which is then written over."""
        shift = last.bias_ahead()
        if shift is None:
            return self(x), x, False
        return *ops.layer_norm_shift_(x, shift, self.weight, self.bias, self.eps, backend=self.backend), True


# ------------------------------------------------------------------------------------------------------- the decoder


class FusedDecoderLayer(InferenceOnly, DecoderLayer):
    input_layernorm: FusedRMSNorm
    post_attention_layernorm: FusedRMSNorm
    self_attn: "FusedAttention"
    mlp: "FusedMLP"

    def forward(self, x: Tensor, packing: Packing) -> Tensor:  # [R, D] -> [R, D]
        return self.forward_(x.clone(), packing)

    def forward_(self, x: Tensor, packing: Packing) -> Tensor:
        """`forward`, for which x may be written over."""
        x = self.self_attn.add_to(x, self.input_layernorm.ahead_of(x, self.self_attn.qkv_proj), packing)
        return self.mlp.add_to(x, self.post_attention_layernorm.ahead_of(x, self.mlp.gate_up_proj))

    def last_(self, x: Tensor, packing: Packing) -> Tensor:
        """[R, D] -> [B, D], the last tokens alone: of the others only keys and values are needed."""
        x = self.self_attn.last_to(x, self.input_layernorm.ahead_of(x, self.self_attn.qkv_proj), packing)
        return self.mlp.add_to(x, self.post_attention_layernorm.ahead_of(x, self.mlp.gate_up_proj))


class FusedAttention(InferenceOnly, Attention):
    qkv_proj: FusedLinear
    o_proj: FusedLinear

    def add_to(self, x: Tensor, h: Rows, p: Packing) -> Tensor:
        """x [R, D] residual stream, h [R, D] its norm -> x + attention."""
        q, k, v = self._split(self.qkv_proj(h), self.heads)
        q, k = ops.rope_(q, k, p.cos, p.sin, backend=self.backend)
        cu_seqlens_q, max_seqlen_q = (p.cu_seqlens_q, p.max_seqlen_q) if isinstance(p, SharedPacking) else (None, None)
        return self.o_proj.add_(x, self._attend(q, k, v, p, cu_seqlens_q, max_seqlen_q, p.schedule))

    def last_to(self, x: Tensor, h: Rows, p: Packing) -> Tensor:
        """x, h [R, D] -> [B, D]: queries of the last tokens, keys and values of all."""
        last, (N, Nkv, _) = _ends(p)[1:] - 1, self.heads
        of_last = h.at(last) if isinstance(h, QuantizedRows) else h[last]
        q = self.qkv_proj.rows(of_last, 0, N * self.head_dim)
        kv = self.qkv_proj.rows(h, N * self.head_dim, None)
        (q,), (k, v) = self._split(q, (N,)), self._split(kv, (Nkv, Nkv))
        q, _ = ops.rope_(q, q[:, :0], p.cos[last], p.sin[last], backend=self.backend)
        k, _ = ops.rope_(k, k[:, :0], p.cos, p.sin, backend=self.backend)
        return self.o_proj.add_(x[last], self._attend(q, k, v, p, _one_each(len(last), x.device), 1))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, p: Packing, cu_seqlens_q: Tensor | None, max_seqlen_q: int | None,
        schedule: TileSchedule | None = None,
    ) -> Tensor:  # fmt: skip
        if isinstance(p, SharedPacking):
            k, v = k.index_select(0, p.key_index), v.index_select(0, p.key_index)
        y = ops.attention(
            q, k, v, p.cu_seqlens, p.max_seqlen,
            causal=p.causal, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
            schedule=schedule, backend=self.backend,
        )  # fmt: skip
        return y.flatten(1)

    def _split(self, qkv: Tensor, heads: tuple[int, ...]) -> tuple[Tensor, ...]:  # views [R, n, H]
        return qkv.unflatten(1, (-1, self.head_dim)).split(heads, dim=1)


class FusedMLP(InferenceOnly, MLP):
    gate_up_proj: FusedLinear
    down_proj: FusedLinear

    def add_to(self, x: Tensor, h: Rows) -> Tensor:
        """x [R, D] residual stream, h [R, D] its norm -> x + down(silu(gate h) * up h)."""
        return self.down_proj.add_(x, self.gate_up_proj.silu_mul(h))


def _ends(p: Packing) -> Tensor:
    """[B + 1] where each sequence's own rows begin and end."""
    return p.cu_seqlens_q if isinstance(p, SharedPacking) else p.cu_seqlens


def _one_each(n: int, device: torch.device) -> Tensor:
    return torch.arange(n + 1, dtype=torch.int32, device=device)


# --------------------------------------------------------------------------------------------------------- the tower


class FusedVisionTower(InferenceOnly, VisionTower):
    """Crops do not see each other, so they pass through the layers in chunks, which bounds memory.

    Attributes:
        graphs: None, or what replays the layers for few crops as CUDA graphs (graphs.py).
    """

    stands_for = VisionTower  # in the registry
    graphs: Any = None

    def forward(self, crops: Tensor, grids: tuple[Grid, ...], *, crops_per_chunk: int | None = None) -> Tensor:
        embeddings = self.embeddings
        if not (is_plain_inside(embeddings) and is_unchanged(self.pre_layrnorm)):
            x = self.pre_layrnorm(embeddings(crops, grids))
            return _joined([self._through_layers(part.clone()) for part in x.split(crops_per_chunk or self._chunk(x))])
        patches = embeddings.patch_embedding.patches(crops, grids)
        chunks = patches.split(crops_per_chunk or self._chunk(patches))
        weight, place = embeddings.patch_embedding.weight.flatten(1), embeddings.with_positions
        return _joined([self._through_layers(self.pre_layrnorm(place(F.linear(part, weight)))) for part in chunks])

    def _through_layers(self, x: Tensor) -> Tensor:
        return self.layers_(x) if self.graphs is None or is_captured(x) else self.graphs(x)

    def layers_(self, x: Tensor) -> Tensor:
        """x [C, L, D], which is written over -> [C, P * P, D], without graphs."""
        layers: Any = self.layers
        for layer in layers:
            x = layer.forward_(x)
        return x[:, 1:]

    def _chunk(self, x: Tensor) -> int:
        """64 on a GPU. On a CPU so many that the widest activation stays below 32 MB: larger blocks are mapped
        anew by the allocator each time, and touching fresh pages costs as much as the arithmetic on them."""
        if x.device.type != "cpu":
            return 64
        widest = max(self.config.intermediate_size, 3 * self.config.hidden_size)  # of the MLP, and q, k and v
        return max(1, 32_000_000 // (self.config.num_positions * widest * x.element_size()))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class FusedVisionLayer(InferenceOnly, VisionLayer):
    layer_norm1: FusedLayerNorm
    layer_norm2: FusedLayerNorm
    self_attn: "FusedVisionAttention"
    mlp: "FusedVisionMLP"

    def forward(self, x: Tensor) -> Tensor:  # [C, L, D] -> [C, L, D]
        return self.forward_(x.clone())

    def forward_(self, x: Tensor) -> Tensor:
        """`forward`, for which x may be written over."""
        C, L, _ = x.shape
        x = x.flatten(0, 1)
        h, x, bias_is_in = self.layer_norm1.ahead_of(x, self.self_attn.out_proj)
        x = self.self_attn.add_to(x, h, C, L, bias_is_in)
        h, x, bias_is_in = self.layer_norm2.ahead_of(x, self.mlp.fc2)
        return self.mlp.add_to(x, h, bias_is_in).unflatten(0, (C, L))


class FusedVisionAttention(InferenceOnly, VisionAttention):
    qkv_proj: FusedLinear
    out_proj: FusedLinear

    def add_to(self, x: Tensor, h: Tensor, C: int, L: int, bias_is_in: bool) -> Tensor:
        """x [C * L, D] residual stream, h its norm -> x + attention."""
        q, k, v = self.qkv_proj(h).unflatten(1, (3, -1, self.head_dim)).unbind(1)
        cu_seqlens = torch.arange(0, (C + 1) * L, L, dtype=torch.int32, device=x.device)
        y = ops.attention(q, k, v, cu_seqlens, L, causal=False, backend=self.backend)
        return self.out_proj.add_(x, y.flatten(1), bias_is_in=bias_is_in)


class FusedVisionMLP(InferenceOnly, VisionMLP):
    fc1: FusedLinear
    fc2: FusedLinear

    def add_to(self, x: Tensor, h: Tensor, bias_is_in: bool) -> Tensor:
        """x [C * L, D] residual stream, h its norm -> x + fc2(quick_gelu(fc1(h)))."""
        return self.fc2.add_(x, self.fc1.quick_gelu(h), bias_is_in=bias_is_in)


# ---------------------------------------------------------------------------------------------------- the whole model


class FusedModuleList(InferenceOnly, nn.ModuleList):
    pass


class FusedDecoder(InferenceOnly, Decoder):
    pass


class FusedVLM2Vec(InferenceOnly, VLM2Vec):
    """VLM2Vec whose every layer is fused: the last one is computed for last tokens alone.

    Attributes:
        sharing: whether `prepare` lets texts share their beginnings.
        graphs: None, or what replays small batches as CUDA graphs (graphs.py).
    """

    stands_for = VLM2Vec
    sharing: bool
    graphs: Any

    def prepare(self, batch: PackedBatch) -> PackedBatch:
        """The same batch, on the host, texts' common beginnings there once where that pays. Not where embed_tokens is
        another's or has a hook: it may look at more than a token at a time."""
        table = self.decoder.embed_tokens
        if not (self.sharing and type(table) in (Embedding, nn.Embedding) and is_unchanged(table)):
            return batch
        longest, kind = self.config.decoder.original_max_position_embeddings, self.device.type
        bound, launches = WEIGHT_BOUND_ROWS.get(kind, 256), LAUNCH_BOUND_ROWS.get(kind, 0)
        replayed = self.graphs is not None and self.graphs.takes(batch)
        return share_prefixes(
            batch, longest, weight_bound_rows=bound, launch_bound_rows=launches, replayed=replayed
        )  # fmt: skip

    def forward(self, batch: PackedBatch, *, normalize: bool = True) -> Tensor:
        if torch.compiler.is_compiling():  # as a part of something else
            self.compile()
        if self.graphs is not None and not is_captured(batch.input_ids):
            return self.graphs(batch, normalize=normalize)
        return self.run(batch, normalize=normalize)

    def run(self, batch: PackedBatch, *, normalize: bool = True) -> Tensor:
        """`forward` without graphs."""
        x = self.embed(batch)
        x = x if batch.grids else x.clone()  # a hook on embed_tokens may keep it
        return self.decode_(x, self.packing(batch, x.dtype), normalize=normalize)

    def decode_(self, x: Tensor, packing: Packing, *, normalize: bool) -> Tensor:
        """Input embeddings [R, D], which are written over -> vectors [B, D] float32."""
        *layers, last = cast("list[FusedDecoderLayer]", self.decoder.layers)
        for layer in layers:
            x = layer.forward_(x, packing)
        x, norm = last.last_(x, packing), self.decoder.norm
        one_each = _one_each(len(x), x.device)
        return ops.pool_last_token(x, one_each, norm.weight, norm.eps, normalize=normalize, backend=self.backend)

    def packing(self, batch: PackedBatch, dtype: torch.dtype) -> Packing:
        packing: Packing
        if isinstance(batch, SharedBatch):
            packing = SharedPacking.of(batch, self.config.decoder, dtype)
        else:
            packing = super().packing(batch, dtype)
            if len(set(batch.lengths)) > 1:  # of equally long ones no program would be idle
                packing = replace(packing, schedule=TileSchedule(batch.lengths))
        return replace(packing, schedule=None) if is_captured(batch.input_ids) else packing

    def hidden_states(self, batch: PackedBatch, layers: Any) -> dict[int, Tensor]:
        kept = super().hidden_states(batch, layers)
        if isinstance(batch, SharedBatch):
            return {number: x.index_select(0, batch.key_index) for number, x in kept.items()}
        return kept

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("pooling", "causal"):
            self._replace()
        super().__setattr__(name, value)


# ------------------------------------------------------------------------------------------------------------ fusing

FUSED: dict[type[nn.Module], type[nn.Module]] = {
    VisionLayer: FusedVisionLayer,
    VisionAttention: FusedVisionAttention,
    VisionMLP: FusedVisionMLP,
    LayerNorm: FusedLayerNorm,
    DecoderLayer: FusedDecoderLayer,
    Attention: FusedAttention,
    MLP: FusedMLP,
    RMSNorm: FusedRMSNorm,
    Linear: FusedLinear,
    nn.Linear: FusedLinear,
    nn.ModuleList: FusedModuleList,
    VisionTower: FusedVisionTower,
    Decoder: FusedDecoder,
    VLM2Vec: FusedVLM2Vec,
}


def is_plain(module: nn.Module, *, inside: bool = True) -> bool:
    """Whether a module is one of the plain model's, unchanged. inside: and so is everything in it."""
    return (
        type(module) in FUSED
        and is_unchanged(module)
        and (not inside or all(is_plain(child) for child in module.children()))
    )


def is_unchanged(module: nn.Module) -> bool:
    """Whether a module does what its class says: it has no hooks, no `forward` of its own, and its parameters are no
    tensor subclass."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return (
        not any(hooks)
        and "forward" not in vars(module)
        and all(type(p) is nn.Parameter for p in module._parameters.values() if p is not None)
    )


def is_captured(x: Tensor) -> bool:
    """Whether the caller is capturing a CUDA graph of its own: nothing may then be replayed, and what would be copied
    from the host's memory would be read there again at every replay, by then freed."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def is_plain_inside(embeddings: VisionEmbeddings) -> bool:
    """Whether the image embeddings may be computed chunk by chunk: nobody hooks or replaced what they consist of."""
    parts = (embeddings, embeddings.patch_embedding, embeddings.position_embedding)
    kinds = (VisionEmbeddings, PatchEmbedding, Embedding)
    return all(type(part) is kind and is_unchanged(part) for part, kind in zip(parts, kinds, strict=True))


def fuse(module: nn.Module, backend: str | None) -> None:
    """Turns a plain module into its fused form, in place; its children keep theirs."""
    if isinstance(module, nn.Linear):
        module.__dict__["backend"] = backend
    module.__class__ = FUSED[type(module)]
