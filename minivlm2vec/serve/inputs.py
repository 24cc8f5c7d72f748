"""EmbeddingRequest -> the inputs in it, checked against what this model and this server accept."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..images import is_data_uri
from .errors import APIError, bad_request
from .options import ServeOptions
from .schema import EmbeddingRequest, ImagePart, Message, TextPart
from .task_schema import TaskRequest


@dataclass(frozen=True)
class ImageSource:
    """An image of a caller.

    Fields:
        name: its place in the request, as "messages[0].content[1].image_url".
        url: a data URI or an http(s) URL.
        data: the bytes of the file, once they are known.
        size: width and height in pixels, once they are known.
    """

    name: str
    url: str
    data: bytes = b""
    size: tuple[int, int] = (0, 0)

    @property
    def is_remote(self) -> bool:
        return not is_data_uri(self.url)

    @property
    def pixels(self) -> int:
        return self.size[0] * self.size[1]


Part = str | ImageSource


@dataclass(frozen=True)
class TextInput:
    """A text; name is its place in the request, max_tokens how many of its first tokens are kept (None: all)."""

    name: str
    text: str
    max_tokens: int | None = None


@dataclass(frozen=True)
class IdsInput:
    """Token ids of this model."""

    name: str
    ids: list[int]


@dataclass(frozen=True)
class PartsInput:
    """Texts and images in one input; joint stands between two of them."""

    name: str
    parts: list[Part]
    joint: str = " "

    @property
    def images(self) -> list[ImageSource]:
        return [part for part in self.parts if isinstance(part, ImageSource)]


Input = TextInput | IdsInput | PartsInput


class RequestReader:
    """Reads requests for one model.

    Args:
        names: of the model; the first is the default.
        tokenizer: the hash of the model's tokenizer, which token ids must come with (or with the model's name).
        dimension: length of the model's vectors.
        trained: shorter ones that the model was trained for (Matryoshka).
    """

    def __init__(
        self,
        names: Sequence[str],
        tokenizer: str,
        dimension: int,
        options: ServeOptions,
        trained: Sequence[int] = (),
    ):
        self.names, self.tokenizer, self.dimension = tuple(names), tokenizer, dimension
        self.limits = options.limits
        self.remote_images = bool(options.remote_images.hosts)
        sizes = (*options.matryoshka_dimensions, *trained)
        self.dimensions = frozenset(size for size in sizes if size < dimension) | {dimension}

    def model_name(self, name: str | None) -> str:
        """The name to answer with. Raises APIError 404 for another model."""
        if not name:  # clients of vLLM send ""
            return self.names[0]
        if name in self.names:
            return name
        known = ", ".join(self.names)
        raise APIError(404, f"that model is not served here; there is {known}", param="model", code="model_not_found")

    def num_crops(self, request: EmbeddingRequest | TaskRequest) -> int | None:
        """The most crops of an image that the request asks for. Raises APIError 400."""
        asked = request.mm_processor_kwargs.num_crops if request.mm_processor_kwargs else None
        if asked and asked > self.limits.max_num_crops:
            name = "mm_processor_kwargs.num_crops"
            raise bad_request(f"{name} is {asked}; this server takes at most {self.limits.max_num_crops}", name)
        return asked

    def vector_size(self, request: EmbeddingRequest) -> int:
        """The length of the vectors that the request asks for. Raises APIError 400."""
        size = request.dimensions or self.dimension
        if size not in self.dimensions:
            raise bad_request(
                f"dimensions is {size}, but the model's vectors have {self.dimension} and it was not trained "
                f"to have them cut (Matryoshka); sizes that are served: {sorted(self.dimensions)}", "dimensions"
            )  # fmt: skip
        return size

    def inputs(self, request: EmbeddingRequest) -> list[Input]:
        """All inputs of the request, in order. Raises APIError 400."""
        if request.add_special_tokens is False and request.messages is None:
            raise bad_request("add_special_tokens: with `input` only true is accepted", "add_special_tokens")
        if request.messages is not None:
            if request.input:
                raise bad_request("both `input` and `messages` are given; use one", "messages")
            return list(self._conversations("messages", request.messages))
        if request.input is None:
            raise bad_request("`input` or `messages` is missing", "input", "missing_required_parameter")
        if not request.input:
            empty = "an empty string" if isinstance(request.input, str) else "an empty list"
            raise bad_request(f"input is {empty}", "input")
        return list(self._input(request.input, request.tokenizer))

    def _input(self, value: str | list, tokenizer: str | None) -> Iterator[Input]:
        """What `input` holds: the schema has checked that its elements are all of one kind."""
        if isinstance(value, str):
            yield _text("input", value)
        elif isinstance(value[0], str):
            yield from (_text(f"input[{i}]", text) for i, text in enumerate(self._counted(value)))
        elif isinstance(value[0], int):
            yield self._ids("input", value, tokenizer)
        elif isinstance(value[0], list) and isinstance(value[0][0], int):
            yield from (self._ids(f"input[{i}]", ids, tokenizer) for i, ids in enumerate(self._counted(value)))
        else:
            yield from self._conversations("input", value)

    def _counted(self, values: list) -> list:
        if len(values) > self.limits.max_inputs:
            raise bad_request(
                f"{len(values)} inputs are more than the {self.limits.max_inputs} of one request", "input"
            )
        return values

    def _ids(self, name: str, ids: list[int], tokenizer: str | None) -> IdsInput:
        if tokenizer != self.tokenizer and tokenizer not in self.names:
            raise bad_request(
                f"{name} holds token ids. Another tokenizer's ids would give wrong vectors silently, so send strings "
                "(in LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False)), or, for ids of this model's own "
                f"tokenizer, add the field \"tokenizer\": \"{self.tokenizer}\"", name, "token_ids_not_accepted"
            )  # fmt: skip
        return IdsInput(name, ids)

    def _conversations(self, name: str, value: list) -> Iterator[Input]:
        if isinstance(value[0], Message):
            yield self._conversation(name, value)
        else:
            for i, messages in enumerate(self._counted(value)):
                yield self._conversation(f"{name}[{i}]", messages)

    def _conversation(self, name: str, messages: list[Message]) -> Input:
        """One message. A system message in front of it is its instruction; an empty message of the assistant behind
        it, which clients of vLLM send as what the model would answer, is dropped."""
        last = len(messages) - 1
        if last and messages[last].role == "assistant" and _is_empty(messages[last]):
            last -= 1
        system = messages[0] if last and messages[0].role in ("system", "developer") else None
        if last > (system is not None):
            raise bad_request(
                f"{name}: a conversation is one message, with a system message in front or an empty one of the "
                "assistant behind it: embedding models embed one message at a time", name
            )  # fmt: skip
        parts = self._parts(f"{name}[{last}].content", messages[last])
        if system is not None:
            parts = _with_instruction(parts, self._instruction(f"{name}[0].content", system))
        return PartsInput(f"{name}[{last}].content", parts)

    def _instruction(self, name: str, system: Message) -> str:
        texts = _texts(system)
        if isinstance(system.content, list) and len(texts) < len(system.content):
            raise bad_request(f"{name}: a system message is text only", name)
        return " ".join(texts)

    def _parts(self, name: str, message: Message) -> list[Part]:
        if message.content is None:
            raise bad_request(f"missing field: {name}", name, "missing_required_parameter")
        if isinstance(message.content, str):
            parts: list[Part] = [message.content]
        else:
            parts = [self.part(f"{name}[{i}]", part) for i, part in enumerate(message.content)]
        if not any(parts):
            raise bad_request(f"{name} has neither text nor image", name)
        return parts

    def part(self, name: str, part: TextPart | ImagePart) -> Part:
        """A part of a message. Raises APIError 400."""
        return part.text if isinstance(part, TextPart) else self.image(f"{name}.image_url", part.image_url.url)

    def image(self, name: str, url: str) -> ImageSource:
        """An image by its address. Raises APIError 400."""
        if not is_data_uri(url):
            if not url.lower().startswith(("http://", "https://")):
                raise bad_request(f"{name}: an image is a data URI or an http(s) URL", name, "invalid_image_url")
            if not self.remote_images:
                raise bad_request(
                    f"{name}: this server fetches no remote images; send a data URI", name, "remote_images_not_allowed"
                )
        return ImageSource(name, url)


def _text(name: str, text: str) -> TextInput:
    if not text:
        raise bad_request(f"{name} is an empty string", name)
    return TextInput(name, text)


def _texts(message: Message) -> list[str]:
    content = message.content
    return [content] if isinstance(content, str) else [x.text for x in content or () if isinstance(x, TextPart)]


def _is_empty(message: Message) -> bool:
    images = isinstance(message.content, list) and any(isinstance(x, ImagePart) for x in message.content)
    return not images and not any(_texts(message))


def _with_instruction(parts: list[Part], instruction: str) -> list[Part]:
    """The instruction goes behind the images in front, as `Embedder.encode(prompt=...)` puts it."""
    images = next(i for i, part in enumerate([*parts, ""]) if isinstance(part, str))
    return [*parts[:images], *([instruction] if instruction else []), *parts[images:]]
