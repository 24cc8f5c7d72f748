"""What /v1/classify, /v1/rerank and /v1/score take and give: the shapes of Jina, Cohere and vLLM.

An item (a query, a document, what is classified) is a text, Jina's {"text", "image"}, vLLM's {"content": parts}, or one
part. Fields that would change a score take only the value that is in effect here, as those of /v1/embeddings.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from .schema import (
    MAX_INPUTS,
    ImagePart,
    Nothing,
    Parts,
    ProcessorOptions,
    Strict,
    TextPart,
    Usage,
)  # fmt: skip

MAX_TEMPLATES = 64


class Fields(Strict):
    """Jina's: a text, an image, or both."""

    text: str | None = None
    image: str | None = Field(None, description="a data URI or, where the server allows the host, http(s)://…")


class Content(Strict):
    """vLLM's: parts of one item."""

    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[Parts, Tag("parts")],
        Discriminator(
            lambda value: "text" if isinstance(value, str) else "parts" if isinstance(value, list) else None,
            custom_error_type="content",
            custom_error_message="content is a string or a list of parts",
        ),
    ]


def _item_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "string"
    if not isinstance(value, dict):
        return None
    if "content" in value:
        return "content"
    return {"text": "text_part", "image_url": "image_part"}.get(str(value["type"])) if "type" in value else "fields"


Item = Annotated[
    Annotated[str, Tag("string")]
    | Annotated[Fields, Tag("fields")]
    | Annotated[Content, Tag("content")]
    | Annotated[TextPart, Tag("text_part")]
    | Annotated[ImagePart, Tag("image_part")],
    Discriminator(
        _item_kind,
        custom_error_type="item",
        custom_error_message='an item is a string, {"text": …, "image": …}, {"content": [parts]}, or a part of type '
        "text or image_url",
    ),
]
Items = Annotated[
    Annotated[list[Item], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True), Tag("many")]
    | Annotated[Item, Tag("one")],
    Discriminator(lambda value: "many" if isinstance(value, list) else "one"),
]


class OwnInstruction(Strict):
    """An instruction of one's own; "{text}" is where the text goes, else it goes behind."""

    query: str = Field(max_length=4096)
    document: str = Field("{text}", max_length=4096)


Instruction = Annotated[
    Annotated[str, Tag("name")] | Annotated[OwnInstruction, Tag("own")],
    Discriminator(lambda value: "name" if isinstance(value, str) else "own"),
]


class TaskRequest(Strict):
    """Fields of all three."""

    model: str | None = Field(None, description="one of the names of /v1/models; default the first")
    instruction: Instruction | None = Field(
        None, description='a task of MMEB ("t2i", "vqa", "classify_scene", …), "none", or one of your own'
    )
    mm_processor_kwargs: ProcessorOptions | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, description="as of /v1/embeddings; 0 and null: no cut")
    truncation_side: Literal["right"] | None = None
    add_special_tokens: Literal[True] | None = None
    normalize: Literal[True] | None = None
    use_activation: bool | None = Field(None, description="ignored: a cosine has no activation")
    activation: bool | None = Field(None, description="ignored")
    chat_template: None = None
    chat_template_kwargs: Nothing = None
    media_io_kwargs: Nothing = None
    user: str | None = Field(None, description="ignored")
    request_id: str | None = Field(None, description="ignored")
    priority: int | None = Field(None, description="ignored")
    cache_salt: str | None = Field(None, description="ignored")


Template = Annotated[
    Annotated[str, Tag("one")]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_TEMPLATES, fail_fast=True), Tag("several")],
    Discriminator(lambda value: "several" if isinstance(value, list) else "one"),
]


class ClassifyRequest(TaskRequest):
    input: Items = Field(description="the images, each perhaps with a text")
    labels: Annotated[list[str], Field(max_length=MAX_INPUTS, fail_fast=True)] = Field(
        description="at least two different texts"
    )
    template: Template | None = Field(
        None, description='what is made of a label, "{}" being the label; of several the mean stands for it'
    )
    top_n: int | None = Field(None, ge=0, description="the nearest labels that an answer has: default 5, 0 for all")


class PairRequest(TaskRequest):
    """Fields of /v1/rerank and /v1/score."""

    max_tokens_per_query: int | None = Field(None, ge=0, description="keeps the first tokens of a query; 0: all")
    max_tokens_per_doc: int | None = Field(None, ge=0, description="keeps the first tokens of a document; 0: all")


class RerankRequest(PairRequest):
    query: Item
    documents: Items
    top_n: int | None = Field(None, ge=0, description="the nearest documents that are returned; null and 0: all")
    return_documents: bool | None = Field(
        None, description="true: as they were given; false: not; null: those that are texts"
    )
    rank_fields: list[Literal["text"]] | None = Field(None, max_length=1, description="Cohere's")
    max_chunks_per_doc: int | None = Field(None, ge=1, description="ignored: no document is cut into chunks")
    relevant_spans: None = None
    return_embeddings: Literal[False] | None = None


class ScoreRequest(PairRequest):
    """One of the pairs text_1 and text_2, data_1 and data_2, queries and documents, queries and items."""

    text_1: Items | None = None
    text_2: Items | None = None
    data_1: Items | None = None
    data_2: Items | None = None
    queries: Items | None = None
    documents: Items | None = None
    items: Items | None = None


class Prediction(BaseModel):
    label: str
    score: float = Field(description="softmax of all labels' cosines at the training temperature 0.02")
    cosine: float


class ClassificationResult(BaseModel):
    object: Literal["classification"]
    index: int
    prediction: str = Field(description="the nearest label")
    score: float
    predictions: list[Prediction] = Field(description="the nearest first")


class ClassifyResponse(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ClassificationResult]
    usage: Usage


class RerankResult(BaseModel):
    index: int = Field(description="of the document in the request")
    relevance_score: float = Field(description="cosine, -1 to 1")
    document: dict[str, Any] | None = None


class RerankResponse(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    results: list[RerankResult] = Field(description="the nearest first")
    usage: Usage


class Score(BaseModel):
    object: Literal["score"]
    index: int
    score: float = Field(description="cosine, -1 to 1")


class ScoreResponse(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: Usage
