"""What a model is made of and what it costs: for `minivlm2vec info` and the benches' floors."""

from dataclasses import asdict, dataclass

import torch
from torch import nn

from .batch import Grid, num_image_tokens
from .config import VLM2VecConfig
from .model import VLM2Vec
from .weights import empty_model


@dataclass(frozen=True)
class Row:
    """A part of the model: its name, what it holds, its parameters."""

    name: str
    shape: str
    parameters: int


def module_rows(config: VLM2VecConfig) -> list[Row]:
    """The parts top-down; equal layers are one row."""
    model: VLM2Vec = empty_model(config)
    rows = []
    for name, child in model.named_children():
        layers: list[nn.Module] = [*getattr(child, "layers", ())]
        for sub_name, part in child.named_parameters():
            if not sub_name.startswith("layers."):
                rows.append(Row(f"{name}.{sub_name}", _shape(part), part.numel()))
        if layers:
            for sub_name, part in layers[0].named_parameters():
                rows.append(Row(f"{name}.layers.*.{sub_name}", f"{len(layers)} x {_shape(part)}",
                                len(layers) * part.numel()))  # fmt: skip
    return rows


def text_flops(config: VLM2VecConfig, length: int, *, last_only: bool = True) -> int:
    """Multiplications and additions of one sequence of `length` tokens through the decoder: matrix products and
    causal attention, 2 per multiply-add. last_only: the last layer for the last token alone."""
    d = config.decoder
    h, H = d.hidden_size, d.head_dim
    kv = 2 * d.num_key_value_heads * H * h
    rest = 2 * h * h + 3 * d.intermediate_size * h  # q, o and the MLP
    attention = 2 * h * length * (length + 1)
    full = 2 * length * (kv + rest) + attention
    last = 2 * (length * kv + rest) + 4 * h * length
    return (d.num_hidden_layers - 1) * full + (last if last_only else full)


def image_flops(config: VLM2VecConfig, grid: Grid) -> int:
    """Those of one image's tower and projector (not of its tokens in the decoder)."""
    v, d = config.vision, config.decoder
    tokens = num_image_tokens(grid, v.merged_per_side)
    projector = 2 * tokens * (4 * v.hidden_size * d.hidden_size + d.hidden_size**2)
    return tower_flops(config, grid[0] * grid[1] + 1) + projector


def tower_flops(config: VLM2VecConfig, crops: int) -> int:
    """Those of the tower for so many crops, global views counted in."""
    v = config.vision
    D, L = v.hidden_size, v.num_positions
    layer = 2 * L * (4 * D * D + 2 * D * v.intermediate_size) + 4 * L * L * D
    patches = 2 * (L - 1) * 3 * v.patch_size**2 * D
    return crops * ((v.num_hidden_layers - 1) * layer + patches)


def report(config: VLM2VecConfig) -> dict:
    """Everything as numbers: modules, totals, FLOPs per text token and per square image at 1, 4, 16 crops."""
    rows = module_rows(config)
    total = sum(r.parameters for r in rows)
    itemsize = getattr(torch, config.dtype).itemsize
    images = {}
    for crops, grid in ((1, (1, 1)), (4, (2, 2)), (16, (4, 4))):
        tokens = num_image_tokens(grid, config.vision.merged_per_side)
        tower, decoder = image_flops(config, grid), text_flops(config, tokens)
        images[crops] = {
            "tokens": tokens,
            "tower_and_projector": tower,
            "decoder": decoder,
            "total": tower + decoder,
        }
    return {
        "parts": asdict(config.parts),
        "trained": asdict(config.trained),
        "dimension": empty_model(config).dimension,
        "max_tokens": config.decoder.max_position_embeddings,
        "crop_size": config.vision.image_size,
        "dtype": config.dtype,
        "modules": [{"name": r.name, "shape": r.shape, "parameters": r.parameters, "bytes": r.parameters * itemsize}
                    for r in rows],
        "parameters": total,
        "bytes": total * itemsize,
        "flops_per_text_token": text_flops(config, 30) // 30,
        "flops_per_image": images,
    }  # fmt: skip


def as_text(config: VLM2VecConfig) -> str:
    """The report as a table for the terminal."""
    r = report(config)
    width = max(len(m["name"]) for m in r["modules"])
    trained = {name: value for name, value in r["trained"].items() if value}
    lines = [f"{'module':{width}}  {'shape':>20}  {'parameters':>13}  {'bytes':>9}"]
    for m in r["modules"]:
        lines.append(f"{m['name']:{width}}  {m['shape']:>20}  {m['parameters']:>13,}  {_si(m['bytes']) + 'B':>9}")
    lines += [
        f"{'total':{width}}  {'':>20}  {r['parameters']:>13,}  {_si(r['bytes']) + 'B':>9}",
        "",
        f"vector: {r['dimension']} numbers; longest input: {r['max_tokens']:,} tokens; crops of {r['crop_size']} x "
        f"{r['crop_size']} pixels; {r['dtype']}",
        "; ".join(f"{kind}: {name}" for kind, name in r["parts"].items()),
        *(["trained for: " + "; ".join(f"{name} {value}" for name, value in trained.items())] if trained else ()),
        f"one text token, of 30: {_si(r['flops_per_text_token'])}FLOP",
    ]
    for crops, image in r["flops_per_image"].items():
        lines.append(
            f"one square image, {crops:>2} crops: {image['tokens']:>5,} tokens, {_si(image['total']):>7}FLOP "
            f"(tower and projector {_si(image['tower_and_projector'])}FLOP, decoder {_si(image['decoder'])}FLOP)"
        )
    return "\n".join(lines)


def _si(n: float) -> str:
    """Four digits and a prefix, for a unit to follow: "7.249 G", "64 "."""
    power = min((len(str(int(n))) - 1) // 3, 5)
    return f"{n / 1000**power:.4g} {['', *'kMGTP'][power]}"


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))
