"""Rotary positions: LongRoPE's frequencies (arXiv 2402.13753), and the rotations of a batch's tokens.

T packed tokens, H head dim.
"""

import torch
from torch import Tensor

from .config import DecoderConfig
from .transfer import constants


def rope_tables(position_ids: Tensor, cu_seqlens: Tensor, config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [T, H / 2] float32 of every token's rotation, times the attention factor.

    LongRoPE has two sets of frequencies; a sequence longer than `original_max_position_embeddings` takes the long
    one. The choice is made for each sequence by its own length. (The original makes it once for a padded batch, by
    the longest row, so that there a long neighbour changes a short text's vector; ours equals the original run one
    input at a time.)
    """
    frequencies, long = inverse_frequencies(config, position_ids.device)
    if config.rope_scaling is not None:
        lengths = cu_seqlens.diff()
        is_long = lengths > config.original_max_position_embeddings
        is_long = torch.repeat_interleave(is_long, lengths, output_size=position_ids.shape[0])
        frequencies = torch.where(is_long[:, None], long, frequencies)
    return rotations(position_ids, frequencies, config)


def rotations(position_ids: Tensor, frequencies: Tensor, config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [T, H / 2] float32 of position_ids [T] * frequencies [H / 2] or [T, H / 2], times the factor."""
    angles = position_ids.float()[:, None] * frequencies
    return angles.cos() * config.rope_attention_factor, angles.sin() * config.rope_attention_factor


@constants
def inverse_frequencies(config: DecoderConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Those of short and of long sequences, [H / 2] float32 each. Frequency i is 1 / (factor_i * theta^(2 i / H))."""
    H, scaling = config.head_dim, config.rope_scaling
    base = config.rope_theta ** (torch.arange(0, H, 2, dtype=torch.int64, device="cpu").float() / H)
    factors = (1.0,) if scaling is None else (scaling.short_factor, scaling.long_factor)
    sets = [(1.0 / (torch.tensor(f, dtype=torch.float32, device="cpu") * base)).to(device) for f in factors]
    return sets[0], sets[-1]
