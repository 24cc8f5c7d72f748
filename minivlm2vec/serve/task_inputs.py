"""Requests of /v1/classify, /v1/rerank and /v1/score -> their inputs, each with its instruction, checked.

An input is laid out as `Embedder.encode(prompt=…)` lays out a dict: the images that it begins with, each with a newline
behind, then the instruction around its text. So a score equals that of `minivlm2vec.tasks`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..prompts import TASKS, TEXT, Task
from ..tasks import label_texts
from ..tasks.common import check_has_text
from .errors import bad_request
from .inputs import ImageSource, Input, Part, PartsInput, RequestReader, TextInput
from .schema import ImagePart, TextPart
from .task_schema import ClassifyRequest, Content, PairRequest, RerankRequest, ScoreRequest, TaskRequest

TOP = 5  # labels of a classification
MAX_PREDICTIONS = 1 << 16  # labels of all classifications of a request
PAIRS = (("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"), ("queries", "items"))


@dataclass(frozen=True)
class Named:
    """An item as it was read: its place in the request, its texts and images in order."""

    name: str
    parts: list[Part]

    @property
    def has_image(self) -> bool:
        return any(isinstance(part, ImageSource) for part in self.parts)

    @property
    def text(self) -> str:
        return " ".join(part for part in self.parts if isinstance(part, str))

    def input(self, prompt: str, max_tokens: int | None = None) -> Input:
        """With an instruction. max_tokens: keeps the first of an item without images."""
        before, _, after = prompt.partition(TEXT)  # without "{text}" the text goes behind
        first = next((i for i, part in enumerate(self.parts) if isinstance(part, str)), len(self.parts))
        parts: list[Part] = [part for image in self.parts[:first] for part in (image, "\n")]
        parts.append(before)
        for n, part in enumerate(self.parts[first:]):
            parts += [" ", part] if n else [part]
        parts.append(after)
        if self.has_image:
            return PartsInput(self.name, parts, joint="")
        return TextInput(self.name, before + self.text + after, max_tokens)


class TaskReader:
    """Reads the requests of one server.

    Args:
        reader: that of /v1/embeddings, for images, names and limits.
    """

    def __init__(self, reader: RequestReader):
        self.reader, self.most = reader, reader.limits.max_inputs

    def classification(self, request: ClassifyRequest) -> tuple[list[Input], list[Input], int | None]:
        """The images; the texts of the labels in the first template, then in the second, …; how many labels an answer
        has (None: all). Raises APIError 400."""
        task, items = self._task(request, "classify"), self._items("input", request.input)
        if len(request.labels) > self.most:
            raise _too_many(len(request.labels), self.most, "labels")
        texts = self._label_texts(request)
        top = TOP if request.top_n is None else request.top_n
        top = min(top or len(request.labels), len(request.labels))
        if len(items) * top > MAX_PREDICTIONS:
            raise bad_request(f"{len(items)} inputs times {top} labels (top_n) are more than the {MAX_PREDICTIONS:,} "
                              "of one answer", "top_n")  # fmt: skip
        for item in items:
            if not item.has_image and task.query != TEXT:
                raise bad_request(f'{item.name} has no image, and the instruction is for one; instruction "none" '
                                  "classifies texts", item.name)  # fmt: skip
            _check_text(item, task.query)
        names = [f"labels[{i % len(request.labels)}]" for i in range(len(texts))]
        labels = [Named(name, [text]).input(task.document) for name, text in zip(names, texts, strict=True)]
        return [item.input(task.query) for item in items], labels, top

    def _label_texts(self, request: ClassifyRequest) -> list[str]:
        """All labels in the first template, then in the second; counted before they are written down."""
        labels, asked = request.labels, request.template
        templates = ["{}"] if asked is None else [asked] if isinstance(asked, str) else asked
        if (number := len(labels) * len(templates)) > self.most:
            raise _too_many(number, self.most, "template", "labels times templates")
        each, most = sum(map(len, labels)), self.reader.limits.max_body_bytes
        if (size := sum(len(t) * len(labels) + t.count("{}") * each for t in templates)) > most:
            raise bad_request(f"labels in templates have {size:,} characters; this server takes {most:,}", "template")
        try:
            return label_texts(labels, templates)
        except InputError as e:
            raise bad_request(str(e), "labels") from None
        except ValueError as e:
            raise bad_request(str(e), "template") from None

    def reranking(self, request: RerankRequest) -> tuple[Input, list[Input]]:
        """The query and the documents. Raises APIError 400."""
        task, query = self._task(request, "t2i"), self._item("query", request.query)
        documents = self._items("documents", request.documents)
        return self._asked(query, task, request), [self._found(item, task, request) for item in documents]

    def scoring(self, request: ScoreRequest) -> tuple[list[Input], list[Input]]:
        """The two sides: 1 and N, or N and N. Raises APIError 400."""
        task, (first, second) = self._task(request, None), _pair(request)
        queries = self._items(first, getattr(request, first))
        documents = self._items(second, getattr(request, second))
        if len(queries) not in (1, len(documents)):
            raise bad_request(f"{first} has {len(queries)} items and {second} {len(documents)}; 1 and any number, or "
                              "equally many, can be scored", second)  # fmt: skip
        asked = [self._asked(item, task, request) for item in queries]
        return asked, [self._found(item, task, request) for item in documents]

    def _asked(self, query: Named, task: Task, request: PairRequest) -> Input:
        _check_text(query, task.query)
        return query.input(task.query, request.max_tokens_per_query or None)

    def _found(self, item: Named, task: Task, request: PairRequest) -> Input:
        """What the instruction says of an image is not put in front of a text; so does `tasks.rank`."""
        prompt = task.document if item.has_image or TEXT in task.document else TEXT
        return item.input(prompt, request.max_tokens_per_doc or None)

    def _task(self, request: TaskRequest, default: str | None) -> Task:
        asked = request.instruction
        if asked is None:
            return Task(TEXT, TEXT) if default is None else TASKS[default]
        if not isinstance(asked, str):
            return Task(asked.query or TEXT, asked.document or TEXT)
        if asked == "none":
            return Task(TEXT, TEXT)
        if asked not in TASKS:
            raise bad_request(f'instruction is no task; there are {", ".join(TASKS)}, "none", and {{"query": …, '
                              '"document": …} for one of your own', "instruction")  # fmt: skip
        return TASKS[asked]

    def _items(self, name: str, value: Any) -> list[Named]:
        if not isinstance(value, list):
            if isinstance(value, Content) and isinstance(value.content, list) and len(value.content) > 1:
                raise bad_request(f"{name}: whether several parts are one item or several depends on the version of "
                                  f"vLLM; send a list of items", name)  # fmt: skip
            return [self._item(name, value)]
        if len(value) > self.most:
            raise _too_many(len(value), self.most, name)
        return [self._item(f"{name}[{i}]", item) for i, item in enumerate(value)]

    def _item(self, name: str, value: Any) -> Named:
        item = Named(name, list(self._parts(name, value)))
        if not item.has_image and not item.text.strip():
            raise bad_request(f"{name} has neither text nor image", name)
        return item

    def _parts(self, name: str, value: Any) -> Iterator[Part]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, TextPart | ImagePart):
            yield self.reader.part(name, value)
        elif isinstance(value, Content):
            if isinstance(value.content, str):
                yield value.content
            else:
                yield from (self.reader.part(f"{name}.content[{i}]", part) for i, part in enumerate(value.content))
        else:
            if value.image is not None:
                yield self.reader.image(f"{name}.image", value.image)
            if value.text is not None:
                yield value.text


def _check_text(item: Named, prompt: str) -> None:
    try:
        check_has_text(item.text, prompt, item.name)
    except InputError as e:
        raise bad_request(f'{e}; `instruction` names another, or "none"', item.name) from None


def _pair(request: ScoreRequest) -> tuple[str, str]:
    """The two fields that are given. Raises APIError 400."""
    names = dict.fromkeys(name for pair in PAIRS for name in pair)
    given = {name for name in names if getattr(request, name) is not None}
    for pair in PAIRS:
        if given == set(pair):
            return pair
    known = ", ".join(f"{a} and {b}" for a, b in PAIRS)
    got = " and ".join(name for name in names if name in given) or "none"
    missing = next((b if a in given else a for a, b in PAIRS if len(given) == 1 and given & {a, b}), None)
    code = "invalid_value" if len(given) > 1 else "missing_required_parameter"
    raise bad_request(f"one of these pairs is needed: {known}; got {got}", missing, code)


def _too_many(number: int, most: int, name: str, what: str | None = None) -> Exception:
    return bad_request(f"{number} {what or name} are more than the {most} of one request", name)


def together(*sides: Sequence[Input]) -> list[Input]:
    return [one for side in sides for one in side]
