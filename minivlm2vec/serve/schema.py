"""What the endpoints take and give: OpenAI's embeddings schema and, for images, vLLM's `messages`.

Unknown fields are refused by name, as OpenAI does it. vLLM's fields that would change the vector take only the value
that is in effect here; those that would not are read and ignored. Lists stop at their first error, and the number of
values and containers of a body is bounded before it is parsed: half a million errors would take a minute to write down,
and the parser holds the interpreter's lock.
"""

import codecs
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError, from_json

from .errors import APIError, bad_request

MAX_INPUTS = 2048  # OpenAI's own limit
MAX_PARTS = 1024  # of one message
MAX_FIELDS = 64  # of one object
MAX_VALUES = 1 << 20  # of one body; parsing so many takes some tenths of a second
MAX_CONTAINERS = 1 << 16  # lists and objects of one body; each costs ten times as much as a number


Request = TypeVar("Request", bound=BaseModel)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def few_fields(cls, value: Any) -> Any:
        """Every unknown field would become an error of its own."""
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise PydanticCustomError("too_many_fields", f"an object has more than {MAX_FIELDS} fields")
        return value


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageURL(Strict):
    url: str = Field(description="data:image/…;base64,… or, where the server allows the host, http(s)://…")
    detail: str | None = Field(None, description="ignored")


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageURL
    uuid: str | None = Field(None, description="vLLM's name for its cache, ignored")

    @field_validator("image_url", mode="before")
    @classmethod
    def _of_a_text(cls, value: Any) -> Any:
        """Some clients send the address itself."""
        return {"url": value} if isinstance(value, str) else value


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _content_kind(value: Any) -> str | None:
    if value is None:
        return "nothing"
    return "text" if isinstance(value, str) else "parts" if isinstance(value, list) else None


Parts = Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]


Nothing = Annotated[list[Any] | dict[str, Any], Field(max_length=0)] | None  # clients send it for what they do not use


class Message(Strict):
    role: str = Field(description="system or developer in front of another message: an instruction; else ignored")
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[Parts, Tag("parts")] | Annotated[None, Tag("nothing")],
        Discriminator(
            _content_kind, custom_error_type="content", custom_error_message="content is a string or a list of parts"
        ),
    ] = None
    name: str | None = Field(None, description="ignored")
    tool_calls: Nothing = None


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
Conversation = Annotated[list[Message], Field(min_length=1, max_length=3)]  # see inputs.py for the two around one
Conversations = Annotated[list[Conversation], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]


def _input_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    if not value:
        return "texts"
    first = value[0]
    if isinstance(first, list):
        return "conversations" if first and isinstance(first[0], dict) else "ids_list"
    if isinstance(first, bool):
        return None
    return {str: "texts", int: "ids", dict: "conversation"}.get(type(first))


def _messages_kind(value: Any) -> str | None:
    if not isinstance(value, list):
        return None
    return "conversations" if value and isinstance(value[0], list) else "conversation"


Input = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(max_length=MAX_INPUTS, fail_fast=True), Tag("texts")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True), Tag("ids_list")]
    | Annotated[Conversation, Tag("conversation")]
    | Annotated[Conversations, Tag("conversations")],
    Discriminator(
        _input_kind,
        custom_error_type="input",
        custom_error_message="input is a string, a list of strings, token ids, or conversations",
    ),
]
Messages = Annotated[
    Annotated[Conversation, Tag("conversation")] | Annotated[Conversations, Tag("conversations")],
    Discriminator(
        _messages_kind,
        custom_error_type="messages",
        custom_error_message="messages is a list of messages, or a list of such lists",
    ),
]


class ProcessorOptions(Strict):
    num_crops: int | None = Field(None, ge=1, description="the most crops an image is cut into")


class EmbeddingRequest(Strict):
    """One of `input` and `messages` is needed."""

    model: str | None = Field(None, description="one of the names of /v1/models; default the first")
    input: Input | None = Field(None, description="texts, or token ids together with `tokenizer`")
    messages: Messages | None = Field(
        None,
        description="one conversation, or a list of them: one message, with a system message in front or an empty one "
        "of the assistant behind it",
    )
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64 is of little-endian float32")
    dimensions: int | None = Field(None, ge=1, description="only where the model is Matryoshka")
    user: str | None = Field(None, description="ignored")
    store: bool | None = Field(None, description="ignored: nothing is stored")
    tokenizer: str | None = Field(
        None, description="whose ids `input` holds: the `tokenizer` of /v1/models or the model's name"
    )
    mm_processor_kwargs: ProcessorOptions | None = None
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        description="keeps the first tokens of inputs without images; -1: as many as the server takes",
        json_schema_extra={"not": {"const": 0}},
    )
    truncation_side: Literal["right"] | None = None
    add_special_tokens: bool | None = Field(None, description="ignored with `messages`; else only true")
    add_generation_prompt: Literal[False] | None = None
    continue_final_message: bool | None = Field(None, description="ignored: no message is continued")
    chat_template: None = None
    chat_template_kwargs: Nothing = None
    media_io_kwargs: Nothing = None
    tools: Nothing = None
    documents: Nothing = None
    normalize: Literal[True] | None = None
    use_activation: Literal[True] | None = None
    embed_dtype: Literal["float32"] | None = None
    endianness: Literal["little", "native"] | None = None
    request_id: str | None = Field(None, description="ignored")
    priority: int | None = Field(None, description="ignored")
    cache_salt: str | None = Field(None, description="ignored")

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def not_zero(cls, value: int | None) -> int | None:
        if value == 0:
            raise PydanticCustomError("zero", "-1 or at least 1 is needed, got 0")
        return value


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Embedding]
    usage: Usage


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int = Field(description="the most tokens of one input")
    dimensions: int
    tokenizer: str = Field(description="what to send as `tokenizer` with token ids")


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Status(BaseModel):
    status: str


def parse(body: bytes, kind: type[Request] = EmbeddingRequest) -> Request:  # type: ignore[assignment]
    """Reads a request. Raises APIError 400 naming the first field at fault."""
    body = body.removeprefix(codecs.BOM_UTF8)
    if body.count(b",") >= MAX_VALUES:
        message = f"the body has more than {MAX_VALUES:,} values (or commas); send several requests"
        raise bad_request(message, code="too_many_values")
    if _has_many_containers(body):
        message = f"the body has more than {MAX_CONTAINERS:,} lists and objects; send several requests"
        raise bad_request(message, code="too_many_values")
    try:
        data = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as e:
        raise bad_request(f"the body is not valid JSON: {e}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise bad_request("the body is a JSON object", code="invalid_json")
    try:
        return kind.model_validate(data)
    except ValidationError as e:
        raise _explain(e, data) from None


def _has_many_containers(body: bytes) -> bool:
    """More than MAX_CONTAINERS; brackets in strings do not count. numpy lets go of the interpreter's lock."""
    if body.count(b"[") + body.count(b"{") <= MAX_CONTAINERS:
        return False
    plain = np.frombuffer(body.replace(rb"\\", b"").replace(b'\\"', b""), np.uint8)  # each quote opens or closes
    inside = np.logical_xor.accumulate(plain == ord('"'))
    opening = (plain == ord("[")) | (plain == ord("{"))
    return bool(np.count_nonzero(opening & ~inside) > MAX_CONTAINERS)


def _explain(error: ValidationError, data: dict) -> APIError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = _path(first["loc"], data, whole=first["type"] == "too_many_fields")
    if first["type"] == "extra_forbidden":
        return bad_request(f"unknown field: {param}", param, "unknown_parameter")
    if first["type"] == "missing":
        return bad_request(f"missing field: {param}", param, "missing_required_parameter")
    message = first["msg"]
    if first["type"] == "union_tag_invalid":  # {tag}, {expected_tags}: pydantic's own sentence is about its unions
        tag, expected = (_printable(str(error.errors()[0]["ctx"][key])) for key in ("tag", "expected_tags"))
        return bad_request(f"{param}.type is '{tag}'; it is one of {expected}", param, "invalid_value")
    if first["type"] == "too_many_fields":
        return bad_request(f"{param}: {message}" if param else message, param or None, "unknown_parameter")
    return bad_request(f"{param}: {message}", param, "invalid_type" if "type" in first["type"] else "invalid_value")


def _path(location: Sequence[str | int], data: Any, *, whole: bool = False) -> str:
    """The place in the caller's data, without the names of the alternatives that pydantic puts into it.

    whole: all of the place is there; else its last part may be a field that is missing."""
    path = ""
    for n, key in enumerate(location):
        inside = (isinstance(data, dict) and key in data) or (
            isinstance(data, list) and isinstance(key, int) and key < len(data)
        )
        is_type = n > 0 and isinstance(location[n - 1], int) and isinstance(data, dict) and data.get("type") == key
        if is_type or (not inside and (whole or n < len(location) - 1)):
            continue  # a tag of a union; that of a part, "text", may also be a field
        if not inside and isinstance(key, str) and not isinstance(data, dict):
            continue
        path += f"[{key}]" if isinstance(key, int) else f".{key}" if path else key
        data = data[key] if inside else None
    return _printable(path)


def _printable(text: str, width: int = 100) -> str:
    """Callers choose the names of unknown fields; they come back in messages and logs."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= width else text[: width - 1] + "…"
