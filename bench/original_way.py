"""The baseline: the same weights, run as the original implementation runs them, from transformers' own modules.

Rows are right-padded to the longest, attention is eager, every crop slot goes through the tower (zero crops too),
all layers of tower and decoder run, the head over the vocabulary is computed for every position, and the vector is
taken out at the end. Image features and their places are the processor's, so only the model is compared.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm2vec.batch import PackedBatch
from minivlm2vec.config import VLM2VecConfig
from minivlm2vec.model import VLM2Vec
from minivlm2vec.vision import MEAN, STD
from minivlm2vec_kernels import reference


class OriginalWay(nn.Module):
    """Takes the weights of a loaded VLM2Vec; those it has and VLM2Vec dropped (last tower layer, head) are random."""

    def __init__(self, model: VLM2Vec, *, attention: str = "eager"):
        super().__init__()
        self.config = model.config
        dtype, device = model.dtype, model.device
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                self.tower, self.decoder = _clip(self.config, attention), _phi3(self.config, attention)
        finally:
            torch.set_default_dtype(default)
        self.projector = model.projector
        _copy(model.vision, self.tower, fused=True)
        _copy(model.decoder, self.decoder.model, fused=False)
        self.to(device=device, dtype=dtype).eval().requires_grad_(False)

    def forward(self, batch: PackedBatch, num_crops: int) -> Tensor:
        """[B, D], normalised."""
        lengths = list(batch.lengths)
        x = self.decoder.model.embed_tokens(batch.input_ids)
        if batch.grids:
            x = x.index_copy(0, batch.image_index, self._images(batch, num_crops)[batch.image_source])
        padded = nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True)  # [B, L, D]
        mask = nn.utils.rnn.pad_sequence([x.new_ones(n, dtype=torch.int64) for n in lengths], batch_first=True)
        out = self.decoder(inputs_embeds=padded, attention_mask=mask, output_hidden_states=True, use_cache=False)
        out.logits.float()
        last = out.hidden_states[-1][torch.arange(len(lengths)), mask.sum(1) - 1]
        return F.normalize(last, dim=-1)

    def _images(self, batch: PackedBatch, num_crops: int) -> Tensor:
        v, dtype = self.config.vision, self.projector.sub_GN.dtype
        mean, std = (torch.tensor(x, device=batch.crops.device) for x in (MEAN, STD))
        patches = reference.image_patches(batch.crops, batch.grids, mean, std, v.patch_size, dtype)
        P, p, S = v.patches_per_side, v.patch_size, v.image_size
        views = patches.unflatten(2, (3, p, p)).unflatten(1, (P, P)).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, S, S)
        counts = [1 + h * w for h, w in batch.grids]
        slots = views.new_zeros(len(counts), num_crops + 1, 3, S, S)
        for slot, image in zip(slots, views.split(counts), strict=True):
            slot[: len(image)] = image
        features = self.tower(slots.flatten(0, 1), output_hidden_states=True).hidden_states[-2][:, 1:]
        features = features.unflatten(0, (len(counts), -1))
        real = torch.cat([f[:n] for f, n in zip(features, counts, strict=True)])
        return self.projector(real, batch.grids)


def _clip(config: VLM2VecConfig, attention: str) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    v = config.vision
    return CLIPVisionModel(CLIPVisionConfig(
        hidden_size=v.hidden_size, intermediate_size=v.intermediate_size, num_attention_heads=v.num_attention_heads,
        num_hidden_layers=v.num_hidden_layers, image_size=v.image_size, patch_size=v.patch_size,
        layer_norm_eps=v.layer_norm_eps, hidden_act="quick_gelu", attn_implementation=attention,
    ))  # fmt: skip


def _phi3(config: VLM2VecConfig, attention: str) -> nn.Module:
    from transformers import Phi3Config, Phi3ForCausalLM

    d, scaling = config.decoder, config.decoder.rope_scaling
    return Phi3ForCausalLM(Phi3Config(
        vocab_size=d.vocab_size, hidden_size=d.hidden_size, intermediate_size=d.intermediate_size,
        num_hidden_layers=d.num_hidden_layers, num_attention_heads=d.num_attention_heads,
        num_key_value_heads=d.num_key_value_heads, rms_norm_eps=d.rms_norm_eps, sliding_window=None, pad_token_id=0,
        max_position_embeddings=d.max_position_embeddings,
        original_max_position_embeddings=d.original_max_position_embeddings,
        rope_parameters={"rope_type": "longrope", "rope_theta": d.rope_theta,
                         "short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor),
                         "original_max_position_embeddings": d.original_max_position_embeddings},
        attn_implementation=attention, tie_word_embeddings=False,
    ))  # fmt: skip


@torch.no_grad()
def _copy(ours: nn.Module, theirs: nn.Module, *, fused: bool) -> None:
    theirs = getattr(theirs, "vision_model", theirs)
    names = dict(ours.named_parameters())
    for name, value in theirs.named_parameters():
        name, part = name.removeprefix("encoder."), 0
        for i, projection in enumerate(("q_proj", "k_proj", "v_proj") if fused else ()):
            if f".{projection}." in name:
                name, part = name.replace(projection, "qkv_proj"), i
        if name in names:
            rows = value.shape[0]
            value.copy_(names[name][part * rows : (part + 1) * rows])
