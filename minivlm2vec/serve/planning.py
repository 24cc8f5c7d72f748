"""Inputs of a caller, their images measured -> Planned, within the limits of one input.

A caller's text is literal: "<|image_1|>" in it is ordinary text, as the original reads it where there are no images,
and never the place of one. Image tokens go only where an image part stands. Special tokens of the tokenizer, such as
"<|end|>" or "</s>", are parsed as such, as in the original.
"""

from collections.abc import Sequence

from ..errors import InputError
from ..processor import Planned, Processor
from .errors import APIError, bad_request
from .inputs import IdsInput, ImageSource, Input, PartsInput, TextInput

TOKENS_BEHIND = 16  # of a text that is cut, read behind the last token that is kept


class Planner:
    """Plans inputs for one processor.

    Args:
        max_input_tokens: of one input, image tokens included.
        max_request_tokens: of all inputs of a request.
    """

    def __init__(self, processor: Processor, max_input_tokens: int, max_request_tokens: int):
        self.processor = processor
        self.max_input_tokens, self.max_request_tokens = max_input_tokens, max_request_tokens
        self.longest_token = max(map(len, processor.tokenizer.tokenizer.get_vocab()))
        # So many characters are more tokens than an input may have, however long the tokens are.
        self.max_characters = self.longest_token * max_input_tokens

    def plan(self, inputs: Sequence[Input], truncate: int | None, num_crops: int | None) -> list[Planned]:
        """truncate: as truncate_prompt_tokens of the request. Raises APIError 400."""
        limit = self.max_input_tokens
        max_length = None if truncate is None else limit if truncate == -1 else min(truncate, limit)
        plans, total = [], 0
        for x in inputs:
            plans.append(self._plan_one(x, max_length, num_crops))
            total += len(plans[-1])
            if total > self.max_request_tokens:
                raise bad_request(f"the request has more than the {self.max_request_tokens:,} tokens that this server "
                                  "takes at once; send several requests", "input", "too_many_tokens")  # fmt: skip
        return plans

    def _plan_one(self, x: Input, max_length: int | None, num_crops: int | None) -> Planned:
        try:
            if isinstance(x, TextInput):
                lengths = [n for n in (max_length, x.max_tokens) if n is not None]
                planned = self._plan_text(x.name, x.text, min(lengths, default=None))
            elif isinstance(x, IdsInput):
                planned = self._plan_ids(x.ids, max_length)
            else:
                planned = self._plan_parts(x, max_length, num_crops)
        except InputError as e:
            name = e.name if e.name.startswith(x.name) else x.name
            raise bad_request(f"{name}: {e.reason}", name) from None
        if len(planned) > self.max_input_tokens:
            message = f"{len(planned)} tokens are more than the {self.max_input_tokens} that this server takes"
            raise _too_long(x.name, message)
        return planned

    def _plan_text(self, name: str, text: str, max_length: int | None) -> Planned:
        if max_length is None:
            self._check_characters(name, text)
        else:  # what of it can matter, and some more, since the last tokens depend on what follows
            text = text[: self.longest_token * (max_length + TOKENS_BEHIND)]
        return Planned(self.processor.tokenizer(text)[:max_length])

    def _plan_ids(self, ids: list[int], max_length: int | None) -> Planned:
        """Token ids as they are: no BOS is added."""
        size = self.processor.config.decoder.vocab_size
        if max(ids) >= size:
            raise InputError(f"token id {max(ids)} is not below the vocabulary's {size}")
        return Planned(list(ids[:max_length]))

    def _plan_parts(self, x: PartsInput, max_length: int | None, num_crops: int | None) -> Planned:
        """Parts are joined by one space, as vLLM's template for VLM2Vec does it: [image, text] is the original's
        "<|image_1|> text"."""
        texts = [part for part in x.parts if isinstance(part, str)]
        if len(texts) == len(x.parts):
            return self._plan_text(x.name, x.joint.join(texts), max_length)
        for text in texts:
            self._check_characters(x.name, text)
        return self.processor.plan_pieces(
            _texts_between(x.parts, x.joint),
            x.images,
            num_crops=num_crops,
            names=[image.name for image in x.images],
            sizes=[image.size for image in x.images],
        )

    def _check_characters(self, name: str, text: str) -> None:
        """Nobody makes the tokenizer read megabytes."""
        if len(text) > self.max_characters:
            message = f"{len(text):,} characters are more than the {self.max_characters:,} that this server reads"
            raise _too_long(name, message)


def _texts_between(parts: Sequence[str | ImageSource], joint: str) -> list[str]:
    """The text before, between and behind the images."""
    pieces = [""]
    for n, part in enumerate(parts):
        pieces[-1] += joint if n else ""
        if isinstance(part, str):
            pieces[-1] += part
        else:
            pieces.append("")
    return pieces


def _too_long(name: str, message: str) -> APIError:
    return bad_request(f"{name}: {message}; truncate_prompt_tokens cuts a text", name, "context_length_exceeded")
