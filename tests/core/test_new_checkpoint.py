"""config.json of a new checkpoint: what follows from changed keys, and which keys and values are refused."""

import json

import pytest
from PIL import Image

from minivlm2vec import Embedder
from minivlm2vec.errors import CheckpointError
from minivlm2vec.new_checkpoint import (
    LONG_FACTOR,
    PRESETS,
    SHORT_FACTOR,
    base_config,
    configured,
    merged,
    new_checkpoint,
)
from tests.support.golden import synth_image

TOWER = {"image_size": 84, "hidden_size": 96, "num_attention_heads": 3}


@pytest.mark.parametrize("preset", PRESETS)
def test_no_change_gives_the_preset(preset):
    assert configured(preset, {}) == base_config(preset)
    assert configured(preset, {"num_hidden_layers": 7}) == base_config(preset) | {"num_hidden_layers": 7}


@pytest.mark.parametrize(("preset", "changes", "follows"), [
    ("full", {"num_attention_heads": 24}, {"num_key_value_heads": 24}),
    ("tiny", {"num_attention_heads": 4}, {"num_key_value_heads": 2}),  # the preset has two query heads a key head
    ("tiny", {"num_attention_heads": 1}, {"num_key_value_heads": 1}),
    ("tiny", {"num_attention_heads": 4, "num_key_value_heads": 4}, {"num_key_value_heads": 4}),
    ("full", {"max_position_embeddings": 1 << 20}, {"sliding_window": 2 << 20}),
    ("full", {"max_position_embeddings": 1 << 20, "sliding_window": None}, {"sliding_window": None}),
    ("full", {"dtype": "float16"}, {"torch_dtype": "float16"}),  # transformers' newer name of it
    ("small", {"hidden_size": 512, "rope_scaling": None}, {"rope_scaling": None}),
])  # fmt: skip
def test_what_depends_on_a_key_follows(preset, changes, follows):
    found = configured(preset, changes)
    assert {key: found[key] for key in follows} == follows


@pytest.mark.parametrize(("preset", "changes", "count"), [
    ("small", {"hidden_size": 512}, 64),  # 4 heads of 128
    ("small", {"num_attention_heads": 8}, 24),  # of 48
    ("full", {"hidden_size": 2048}, 32),  # 32 of 64
])  # fmt: skip
def test_factors_of_another_head_dim(preset, changes, count):
    """As many as half the head dim, from the published first to the published last."""
    scaling = configured(preset, changes)["rope_scaling"]
    for name, published in (("short_factor", SHORT_FACTOR), ("long_factor", LONG_FACTOR)):
        factors = scaling[name]
        assert len(factors) == count and factors == sorted(factors)
        assert (factors[0], factors[-1]) == (published[0], published[-1])
    own = [1.0] * count
    given = configured(preset, changes | {"rope_scaling": {"short_factor": own}})["rope_scaling"]
    assert given == scaling | {"short_factor": own}


def test_the_tower_follows_its_own_sizes():
    processor = configured("tiny", {"img_processor": {"vision_config": TOWER}})["img_processor"]
    assert (processor["image_dim_out"], processor["num_img_tokens"]) == (96, 9)  # 84 / 14 / 2 squared


def test_a_changed_model_runs(tmp_path):
    changes = {"hidden_size": 96, "num_attention_heads": 6, "img_processor": {"vision_config": TOWER}}
    folder = new_checkpoint(tmp_path / "m", config=changes)
    e = Embedder.from_pretrained(folder, device="cpu", show_progress=False)
    assert e.encode(["a cat", Image.fromarray(synth_image(90, 70, 1))]).shape == (2, 96)
    assert json.loads((folder / "preprocessor_config.json").read_text())["num_img_tokens"] == 9


@pytest.mark.parametrize(("changes", "message"), [
    ({"hidden_sise": 1}, "named hidden_sise; did you mean hidden_size?"),
    ({"dtype": "float8"}, "torch_dtype is 'float8'; expected bfloat16, float16 or float32"),
    ({"image_size": 56}, "named image_size; did you mean img_processor.vision_config.image_size?"),
    ({"img_processor": {"patch_size": 7}}, "named img_processor.patch_size; did you mean "
     "img_processor.vision_config.patch_size?"),
    ({"rope_scaling": {"factors": []}}, "named rope_scaling.factors; did you mean rope_scaling.long_factor?"),
    ({"embd_layer": {"xyzzy": 1}}, "named embd_layer.xyzzy; there are embedding_cls, hd_transform_order"),
    ({"hidden_size": "64"}, "hidden_size is '64'; a whole number"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0; a whole number from 1"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of"),
    ({"img_processor": 3}, "img_processor is 3"),
    ({"img_processor": {"vision_config": [1]}}, "img_processor.vision_config is [1]"),
    ({"img_processor": {"vision_config": {"num_hidden_layers": "3"}}}, "vision_config.num_hidden_layers is '3'"),
    ({"embd_layer": "image"}, "embd_layer is 'image'"),
    ({"rope_scaling": [1]}, "rope_scaling is [1]"),
    ({"rope_scaling": {"short_factor": ["a"] * 16}}, "short_factor[0] is 'a'"),
    ({"rope_scaling": {"long_factor": [1.0] * 15}}, "rope_scaling.long_factor has 15 factors; head_dim 32 needs 16"),
    ({"sliding_window": "wide"}, "sliding_window is 'wide'"),
])  # fmt: skip
def test_what_makes_no_model_is_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError) as refused:
        new_checkpoint(tmp_path / "m", config=changes)
    assert message in str(refused.value) and not (tmp_path / "m").exists()


def test_a_published_config_is_taken_whole(tmp_path):
    """With the keys that have no meaning here."""
    more = {"_name_or_path": "x", "auto_map": {"AutoConfig": "y"}, "transformers_version": "4.38.1"}
    assert configured("tiny", base_config("full") | more) == merged(configured("tiny", base_config("full")), more)
