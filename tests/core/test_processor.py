"""Prompts, tags and packing: the quirks of the original that are kept, and those decided otherwise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minivlm2vec.batch import num_image_tokens
from minivlm2vec.config import VLM2VecConfig
from minivlm2vec.embedder import pack_by_length
from minivlm2vec.errors import InputError
from minivlm2vec.new_checkpoint import base_config
from minivlm2vec.processor import Processor
from minivlm2vec.tokenizer import Tokenizer
from tests.support.golden import tokenizer_file

BOS, SPACE, NEWLINE = 1, 29871, 13
IMAGE = -1


@pytest.fixture(scope="module")
def processor() -> Processor:
    raw = base_config("small")
    raw["img_processor"]["vision_config"] |= {"image_size": 56}  # 2x2 merged patches a crop: short runs of tokens
    return Processor(Tokenizer(tokenizer_file()), VLM2VecConfig.from_dict(raw), num_crops=4)


def picture(width=40, height=40, value=0) -> Image.Image:
    return Image.new("RGB", (width, height), (value, 10, 20))


def ids(processor, item, **options) -> list[int]:
    """Ids, image tokens shown as -1."""
    planned = processor.plan(item, **options)
    out = np.array(planned.input_ids)
    out[planned.image_index] = IMAGE
    return out.tolist()


def run(n: int = num_image_tokens((2, 2), 2)) -> list[int]:
    return [IMAGE] * n


def test_every_piece_begins_with_bos(processor):
    """Quirk 1: the pieces around tags are tokenised one by one."""
    tokens = ids(processor, {"text": "<|image_1|> Represent", "image": picture()})
    assert tokens[: 1 + len(run())] == [BOS, *run()]
    assert tokens[1 + len(run()) :][:2] == [BOS, SPACE]
    middle = ids(processor, {"text": "Hello<|image_1|>Hello", "image": picture()})
    hello = processor.tokenizer("Hello")
    assert middle == [*hello, *run(), *hello]


def test_pieces_are_literal(processor):
    """As text, image, text of a caller who knows no tags."""
    pieces, images = ["a <|image_1|>", "b", "<|image_2|>"], [picture(), picture(80, 40)]
    planned = processor.plan_pieces(pieces, images)
    assert planned.grids == processor.plan({"images": images}).grids
    kept = np.delete(planned.input_ids, planned.image_index).tolist()
    assert kept == [t for piece in pieces for t in processor.tokenizer(piece)]
    assert planned.image_source.tolist() == list(range(len(planned.image_source)))
    swapped = processor.plan_pieces(["", "", ""], images, [2, 1])
    tagged = processor.plan({"text": "<|image_2|><|image_1|>", "images": images})
    assert swapped.input_ids == tagged.input_ids and (swapped.image_source == tagged.image_source).all()
    assert processor.plan_pieces(["a"], []).input_ids == processor.plan("a").input_ids
    with pytest.raises(InputError, match="2 pieces of text do not fit around 2 images"):
        processor.plan_pieces(["a", "b"], images)


def test_tag_at_the_end_pools_a_bos(processor):
    """Quirk 2."""
    assert ids(processor, {"text": "<|image_1|>", "image": picture()}) == [BOS, *run(), BOS]


def test_empty_text_is_one_bos(processor):
    """Quirk 3."""
    assert ids(processor, "") == [BOS]


def test_special_tokens_in_text_are_parsed(processor):
    """Quirk 4: </s> is 2 and swallows the spaces behind it; <|endoftext|> is 32000."""
    assert 2 in processor.tokenizer("a</s> b")
    assert processor.tokenizer("<|endoftext|>")[-1] == 32000
    assert processor.tokenizer("<|user|>")[-1] == 32010


def test_a_tag_without_image_is_plain_text(processor):
    """Quirk 5."""
    tokens = ids(processor, "<|image_1|>")
    assert tokens == [BOS, 529, 29989, 3027, 29918, 29896, 29989, 29958]


@pytest.mark.parametrize("text, images", [
    ("<|image_2|> x", 1), ("<|image_1|> <|image_2|>", 1), ("<|image_1|>", 2), ("<|image_0|>", 1),
    ("<|image_1|> <|image_3|>", 2),
])  # fmt: skip
def test_tags_that_do_not_match_the_images(processor, text, images):
    """Quirk 6: the message names the tags and the number of images."""
    with pytest.raises(InputError, match=rf"<\|image_\d\|>.* but {images} image"):
        processor.plan({"text": text, "images": [picture()] * images})


@pytest.mark.parametrize("digits", ["9" * 19, "0" * 4999 + "1", "9" * 5000, "٣" * 5000])
def test_a_number_too_long_for_a_tag(processor, digits):
    with pytest.raises(InputError, match=rf"has {len(digits)} digits, but 1 image.* at most 18"):
        processor.plan({"text": f"<|image_{digits}|> x", "image": picture()})


def test_a_message_names_some_of_very_many_tags(processor):
    text = "".join(f"<|image_{n}|>" for n in range(10_000))
    with pytest.raises(InputError, match="and 9992 more but 1 image") as e:
        processor.plan({"text": text, "image": picture()})
    assert len(str(e.value)) < 400


def test_leading_zeros_in_a_tag(processor):
    """Quirk 6: <|image_01|> is tag 1."""
    one = {"text": "<|image_1|> x", "image": picture()}
    assert ids(processor, one) == ids(processor, {**one, "text": "<|image_01|> x"})


def test_the_same_tag_twice(processor):
    """Quirk 7, decided otherwise: the image stands in both places."""
    planned = processor.plan({"text": "<|image_1|> and <|image_1|>", "image": picture()})
    n = len(run())
    assert len(planned.image_index) == 2 * n
    np.testing.assert_array_equal(planned.image_source, np.tile(np.arange(n), 2))


def test_tags_out_of_order(processor):
    """Quirk 8, decided otherwise: tag n takes image n's tokens wherever it stands."""
    wide, square = picture(100, 40), picture()
    n_wide, n_square = num_image_tokens((1, 2), 2), num_image_tokens((2, 2), 2)
    planned = processor.plan({"text": "<|image_2|><|image_1|>", "images": [wide, square]})
    source = planned.image_source
    assert planned.grids == ((1, 2), (2, 2))
    np.testing.assert_array_equal(source[:n_square], n_wide + np.arange(n_square))
    np.testing.assert_array_equal(source[n_square:], np.arange(n_wide))


def test_max_length_cuts_texts_only(processor):
    """Quirk 10: from the right, BOS counted; an input with an image is never cut."""
    text = "a cat and a dog and a bird"
    assert ids(processor, text, max_length=4) == processor.tokenizer(text)[:4]
    item = {"text": "<|image_1|> " + text, "image": picture()}
    assert ids(processor, item, max_length=4) == ids(processor, item)


def test_images_without_tags_come_first(processor):
    """Documented: <|image_1|>\\n<|image_2|>\\n in front, as in the MMEB data."""
    plain = {"text": "hello", "images": [picture(), picture()]}
    tagged = {**plain, "text": "<|image_1|>\n<|image_2|>\nhello"}
    assert ids(processor, plain) == ids(processor, tagged)
    assert ids(processor, picture()) == ids(processor, {"text": "<|image_1|>\n", "image": picture()})


def test_prompt_goes_behind_the_tags(processor):
    item = {"text": "<|image_1|>\nWhat is it?", "image": picture()}
    expected = {"text": "<|image_1|>\nAnswer: What is it?", "image": picture()}
    assert ids(processor, item, prompt="Answer: ") == ids(processor, expected)
    assert ids(processor, {"image": picture()}, prompt="Look.\n") == ids(
        processor, {"text": "<|image_1|>\nLook.\n", "image": picture()}
    )
    assert ids(processor, "a cat", prompt="Find: {text}\n") == processor.tokenizer("Find: a cat\n")
    assert ids(processor, "a cat", prompt="Find: ") == processor.tokenizer("Find: a cat")
    assert ids(processor, "<|image_1|> cat", prompt="Find: ") == processor.tokenizer("Find: <|image_1|> cat")


UNUSABLE = {
    "None": (None, "NoneType"),
    "number": (3, "int"),
    "empty dict": ({}, "neither text nor image"),
    "text None": ({"text": None}, "neither text nor image"),
    "text of bytes": ({"text": b"x"}, "'text' is a str, got bytes"),
    "unknown key": ({"text": "x", "img": "y"}, r"unknown keys \['img'\]"),
    "image and images": ({"image": picture(), "images": [picture()]}, "both 'image' and 'images'"),
    "images no list": ({"images": picture()}, "'images' is a list"),
    "None among images": ({"images": [picture(), None]}, "image 2 of 2 is None"),
    "too thin": ({"image": picture(20_000, 10)}, "20000 x 10 pixels is too thin"),
    "lone surrogate": ("\ud800", "not valid Unicode"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_inputs(processor, kind):
    item, message = UNUSABLE[kind]
    with pytest.raises(InputError, match=message):
        processor.plan(item)


def test_text_beyond_the_longest_position(processor):
    config = VLM2VecConfig.from_dict({**base_config("small"), "max_position_embeddings": 32, "sliding_window": None})
    small = Processor(processor.tokenizer, config)
    assert len(small.plan("a " * 15)) <= 32
    with pytest.raises(InputError, match=r"8\d tokens are more than the 32 of max_position_embeddings"):
        small.plan("a cat " * 40)
    assert len(small.plan("a cat " * 40, max_length=32)) == 32


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text("ab <|>_1image", max_size=12), st.integers(0, 2)), max_size=6))
def test_packing_lays_inputs_end_to_end(processor, items):
    """Whatever the pack, each input's ids and image tokens are those it has alone."""
    loaded = []
    for text, images in items:
        text = text.replace("<|image_", "")
        sizes = [(30 + 40 * k, 50) for k in range(images)]
        item = {"text": text, "images": [picture(*s, value=k) for k, s in enumerate(sizes)]} if images else text
        loaded.append(processor.load(processor.plan(item)))
    pack = processor.pack(loaded)
    assert pack.num_sequences == len(items) and pack.num_tokens == sum(map(len, loaded)) == len(pack.input_ids)
    assert pack.cu_seqlens.tolist() == np.cumsum([0, *map(len, loaded)]).tolist()
    alone = [processor.pack([x]) for x in loaded]
    assert pack.grids == tuple(g for a in alone for g in a.grids)
    token = 0
    for a, start, n in zip(alone, pack.cu_seqlens.tolist(), pack.lengths, strict=False):
        assert torch.equal(pack.input_ids[start : start + n], a.input_ids)
        assert torch.equal(pack.position_ids[start : start + n], torch.arange(n))
        here = (pack.image_index >= start) & (pack.image_index < start + n)
        assert torch.equal(pack.image_index[here] - start, a.image_index)
        assert torch.equal(pack.image_source[here] - token, a.image_source)
        token += sum(num_image_tokens(g, 2) for g in a.grids)
    crops = [a.crops for a in alone]
    assert torch.equal(pack.crops, torch.cat(crops) if crops else pack.crops[:0])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 5000), max_size=60), st.integers(1, 6000))
def test_packs_hold_every_input_once_and_respect_the_limit(lengths, batch_tokens):
    packs = pack_by_length(lengths, batch_tokens)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    for pack in packs:
        assert pack and (len(pack) == 1 or sum(lengths[i] for i in pack) <= batch_tokens)
    order = [lengths[i] for pack in packs for i in pack]
    assert order == sorted(lengths, reverse=True)


@settings(max_examples=60, deadline=None)
@given(text=st.text("ab \n1é写<|end>", max_size=400), max_length=st.integers(1, 5))
def test_a_cut_text_has_the_ids_of_the_whole_one(processor, text, max_length):
    """No more of a text is tokenised than max_length can keep, and that changes no id."""
    text = text + " tail" * 300
    assert processor.plan(text, max_length=max_length).input_ids == processor.tokenizer(text)[:max_length]


def test_a_text_too_long_for_any_tokens_is_not_tokenised(processor, monkeypatch):
    limit = processor.config.decoder.max_position_embeddings * processor.tokenizer.longest_token
    monkeypatch.setattr(
        processor, "tokenizer", type("Never", (), {"longest_token": processor.tokenizer.longest_token})()
    )
    for item in ("a" * (limit + 1), {"text": "a" * (limit + 1), "image": picture()}):
        with pytest.raises(InputError, match="characters are more than the"):
            processor.plan(item)
