"""The sets of mini-MMEB, and how a row of each is drawn.

`SETS[name].row(world, rng)` draws a row as often as it is called, so that a training run can take an endless stream of
rows instead of files. Instructions are worded as in MMEB (`{}` is the row's own text); the
paraphrases are for the `diverse_instruction` split of the training files.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from PIL import Image

from . import drawing
from .concepts import COLOURS, STYLES, THING_GROUPS, Concept, World
from .drawing import Canvas
from .words import NUMBERS, plural, with_article

IMAGE = "<|image_1|>\n"
PICTURE = f"{IMAGE}Represent the given image.\n"
CROP = f"{IMAGE}Represent the given cropped image of the object"
COLOUR_GROUPS = (*THING_GROUPS, "symbols")
CORNERS = ("top left corner", "top right corner", "bottom left corner", "bottom right corner")


@dataclass(frozen=True)
class Item:
    """A query or a candidate. `meaning` is what it shows or says: two items of one meaning are both right, so that a
    row never takes a candidate from another row that means the same as its own positive."""

    text: str
    image: Image.Image | None = None
    meaning: object = None


@dataclass(frozen=True)
class Row:
    query: Item
    positive: Item
    hard_negatives: tuple[Item, ...] = ()  # made for this row; a file of training rows holds the first


@dataclass(frozen=True)
class TaskSet:
    meta_task: str
    sample: Callable[[World, random.Random], Row]
    instructions: tuple[str, ...]  # the first is the original
    about: str
    family: str = ""  # sets of one family draw the same canvases, row by row
    classes: Callable[[World], list[Item]] | None = None  # all candidates, where they are a fixed list

    def row(self, world: World, rng: random.Random, instruction: int = 0) -> Row:
        """A row whose query text is the full instruction (the samplers give only the row's own part)."""
        row = self.sample(world, rng)
        text = self.instructions[instruction].format(row.query.text)
        return Row(Item(text, row.query.image), row.positive, row.hard_negatives)


def own_part(instruction: str, text: str) -> str:
    """What a text says in the place of the instruction's "{}"; "" where it has none."""
    head, _, tail = instruction.partition("{}")
    return text[len(head) : len(text) - len(tail)] if "{}" in instruction else ""


# --- classification --------------------------------------------------------------------------------------


def subgroup(world: World, rng: random.Random) -> Row:
    concept, image = _single(world, rng)
    return Row(Item("", image), _word(concept.subgroup))


def group(world: World, rng: random.Random) -> Row:
    concept, image = _single(world, rng)
    return Row(Item("", image), _word(concept.group))


def scene_topic(world: World, rng: random.Random) -> Row:
    """Four things of one class, and one that is not."""
    by_class = _by_subgroup(world)
    large = sorted(name for name, members in by_class.items() if len(members) >= 3)
    topic = rng.choice(large)
    members = rng.sample(by_class[topic], min(4, len(by_class[topic])))
    odd = rng.choice([concept for concept in world.things if concept.subgroup != topic])
    shown = [*members, odd]
    rng.shuffle(shown)
    image = drawing.scene(rng.choice(world.styles), rng, shown).draw(world)
    return Row(Item("", image), _word(topic))


# --- VQA -------------------------------------------------------------------------------------------------


def where(world: World, rng: random.Random) -> Row:
    canvas = _grid4(world, rng)
    corner = rng.randrange(4)
    return _asked(world, canvas, f"what is in the {CORNERS[corner]}?", corner)


def beside(world: World, rng: random.Random) -> Row:
    canvas = _grid4(world, rng)
    corner = rng.randrange(4)
    across, down = corner ^ 1, corner ^ 2
    answer, relation = rng.choice(
        ((across, "right" if corner % 2 == 0 else "left"), (down, "below" if corner < 2 else "above"))
    )
    side = f"to the {relation} of" if relation in ("left", "right") else relation
    question = f"what is {side} the {canvas.objects[corner].concept.phrase}?"
    return _asked(world, canvas, question, answer)


def position(world: World, rng: random.Random) -> Row:
    canvas = _grid4(world, rng)
    corner = rng.randrange(4)
    question = f"where is the {canvas.objects[corner].concept.phrase}?"
    return Row(Item(question, canvas.draw(world)), _word(CORNERS[corner]))


def count(world: World, rng: random.Random) -> Row:
    """How many times one thing is shown, among others that are shown once."""
    target, *others = rng.sample(world.things, 5)
    number = rng.randint(1, 6)
    others = others[: rng.randint(0, min(3, 9 - number))]
    cells: list[Concept | None] = [*[target] * number, *others]
    cells += [None] * (9 - len(cells))
    rng.shuffle(cells)
    image = drawing.grid(rng.choice(world.styles), rng, 3, cells).draw(world)
    return Row(Item(f"how many {plural(target.phrase)} are there?", image), _word(NUMBERS[number]))


def colour(world: World, rng: random.Random) -> Row:
    """Main colour of one thing. The answer is drawn first, or most would be blue and orange."""
    style = rng.choice(world.styles)
    coloured = [one for one in world.concepts if one.colour(style) and one.group in COLOUR_GROUPS]
    wanted = rng.choice(sorted({concept.colour(style) for concept in coloured}))
    target = rng.choice([concept for concept in coloured if concept.colour(style) == wanted])
    others = rng.sample([concept for concept in world.concepts if concept != target], 3)
    canvas = drawing.grid(style, rng, 2, _shuffled([target, *others], rng))
    return Row(Item(f"what color is the {target.phrase}?", canvas.draw(world)), _word(wanted))


# --- retrieval -------------------------------------------------------------------------------------------


def text_to_image(world: World, rng: random.Random) -> Row:
    concept, image = _single(world, rng)
    return Row(Item(concept.phrase), Item(PICTURE, image, concept.code))


def image_to_text(world: World, rng: random.Random) -> Row:
    concept, image = _single(world, rng)
    return Row(Item("", image), _word(concept.phrase))


def tags_to_image(world: World, rng: random.Random) -> Row:
    """Keywords that are not in the name. One tag may fit other concepts too, several tags seldom do."""
    while True:
        concept, image = _single(world, rng)
        tags = [tag for tag in concept.tags if tag.lower() not in concept.label.lower()]
        if len(tags) >= 3:
            chosen = rng.sample(tags, min(4, len(tags)))
            return Row(Item(", ".join(chosen)), Item(PICTURE, image, concept.code))


def style_to_style(world: World, rng: random.Random) -> Row:
    concept = rng.choice(world.concepts)
    second = world.target_style or rng.choice(world.styles)
    first = rng.choice([style for style in world.styles if style != second])
    query, positive = (drawing.single(world, style, concept) for style in (first, second))
    return Row(Item("", query), Item(PICTURE, positive, concept.code))


def caption_to_scene(world: World, rng: random.Random) -> Row:
    canvas, caption, wrong = _captioned(world, rng)
    hard_negative = Item(PICTURE, wrong.draw(world), _shown(wrong))
    return Row(Item(f"{caption}."), Item(PICTURE, canvas.draw(world), _shown(canvas)), (hard_negative,))


def scene_to_caption(world: World, rng: random.Random) -> Row:
    canvas, caption, wrong = _captioned(world, rng)
    hard_negative = Item(f"{_caption(wrong)}.", None, _shown(wrong))
    return Row(Item("", canvas.draw(world)), Item(f"{caption}.", None, _shown(canvas)), (hard_negative,))


def change(world: World, rng: random.Random) -> Row:
    """ "replace the dog with a cat". Hard negatives: nothing is replaced, another thing is, or by another thing."""
    canvas, spare = _scene(world, rng)
    new, wrong = spare[0], spare[1]
    index = rng.randrange(len(canvas.objects))
    other = (index + rng.randrange(1, len(canvas.objects))) % len(canvas.objects)
    old = canvas.objects[index].concept
    wrong_scenes = (canvas, canvas.replaced(other, new), canvas.replaced(index, wrong))
    text = f"replace the {old.phrase} with {with_article(new.phrase)}"
    scenes = (canvas.replaced(index, new), *wrong_scenes)
    positive, *hard_negatives = [Item(PICTURE, one.draw(world), _shown(one)) for one in scenes]
    return Row(Item(text, canvas.draw(world)), positive, tuple(hard_negatives))


# --- grounding -------------------------------------------------------------------------------------------


def isolate(world: World, rng: random.Random) -> Row:
    canvas, _ = _scene(world, rng)
    index = rng.randrange(len(canvas.objects))
    return _cropped(world, canvas, canvas.objects[index].concept.phrase, index)


def point(world: World, rng: random.Random) -> Row:
    """The thing is named by its class, which no other thing in the scene has."""
    canvas, _ = _scene(world, rng)
    classes = [one.concept.subgroup for one in canvas.objects]
    single = [i for i, name in enumerate(classes) if classes.count(name) == 1]
    if not single:
        return point(world, rng)
    index = rng.choice(single)
    return _cropped(world, canvas, f'Which object belongs to the class "{classes[index]}"?', index)


def refer(world: World, rng: random.Random) -> Row:
    """Two of a kind, told apart by where they are, and drawn differently, or their crops would be the same."""
    twice, *others = rng.sample(world.things, 3)
    style, other_style = rng.sample(world.styles, 2)
    canvas = drawing.scene(style, rng, [twice, twice, *others]).restyled(1, other_style)
    (x0, y0), (x1, y1) = canvas.objects[0].centre, canvas.objects[1].centre
    index = rng.randrange(2)
    if abs(x0 - x1) >= abs(y0 - y1):
        side = "on the left" if (x0 < x1) == (index == 0) else "on the right"
    else:
        side = "at the top" if (y0 < y1) == (index == 0) else "at the bottom"
    return _cropped(world, canvas, f"the {twice.phrase} {side}", index)


def matching(world: World, rng: random.Random) -> Row:
    """Name and place of the same thing, both with the whole picture, as in RefCOCO-Matching."""
    canvas, _ = _scene(world, rng)
    corners = [_corner(*one.centre) for one in canvas.objects]
    alone = [i for i, name in enumerate(corners) if corners.count(name) == 1]
    if not alone:
        return matching(world, rng)
    index = rng.choice(alone)
    image = canvas.draw(world)
    target = INSTRUCTIONS["Scene-Matching"][0]
    items = [
        Item(target.format(f"the object in the {corner}"), image, (_shown(canvas), corner))
        for corner in (corners[index], *sorted(set(CORNERS) - {corners[index]}))
    ]
    return Row(Item(f"the {canvas.objects[index].concept.phrase}", image), items[0], tuple(items[1:]))


# --- what the samplers share -----------------------------------------------------------------------------


def _word(text: str) -> Item:
    return Item(text, None, text)


def _single(world: World, rng: random.Random) -> tuple[Concept, Image.Image]:
    concept, style = rng.choice(world.concepts), rng.choice(world.styles)
    return concept, drawing.single(world, style, concept)


def _shuffled(values: list, rng: random.Random) -> list:
    return rng.sample(values, len(values))


def _by_subgroup(world: World) -> dict[str, list[Concept]]:
    found: dict[str, list[Concept]] = {}
    for concept in world.things:
        found.setdefault(concept.subgroup, []).append(concept)
    return found


def _grid4(world: World, rng: random.Random) -> Canvas:
    return drawing.grid(rng.choice(world.styles), rng, 2, rng.sample(world.concepts, 4))


def _asked(world: World, canvas: Canvas, question: str, answer: int) -> Row:
    """The other names in the picture are the hard negatives."""
    names = [_word(one.concept.phrase) for one in canvas.objects]
    hard_negatives = tuple(name for i, name in enumerate(names) if i != answer)
    return Row(Item(question, canvas.draw(world)), names[answer], hard_negatives)


def _scene(world: World, rng: random.Random) -> tuple[Canvas, list[Concept]]:
    """Four different things, and two more that are not in it."""
    chosen = rng.sample(world.things, 6)
    return drawing.scene(rng.choice(world.styles), rng, chosen[:4]), chosen[4:]


def _cropped(world: World, canvas: Canvas, text: str, index: int) -> Row:
    image = canvas.draw(world)
    crops = [Item(CROP, canvas.crop(image, i), one.concept.code) for i, one in enumerate(canvas.objects)]
    hard_negatives = tuple(crop for i, crop in enumerate(crops) if i != index)
    return Row(Item(text, image), crops[index], hard_negatives)


def _corner(x: float, y: float) -> str:
    half = drawing.CANVAS / 2
    return CORNERS[(x >= half) + 2 * (y >= half)]


def _shown(canvas: Canvas) -> tuple[str, ...]:
    return tuple(sorted(one.concept.code for one in canvas.objects))


def _captioned(world: World, rng: random.Random) -> tuple[Canvas, str, Canvas]:
    """A scene of one to three kinds, one of them perhaps repeated; its caption; the scene with one thing replaced."""
    kinds = rng.sample(world.things, rng.randint(1, 3))
    numbers = [1] * len(kinds)
    if rng.random() < 0.5:
        numbers[rng.randrange(len(kinds))] = rng.randint(2, 3)
    shown = [concept for concept, number in zip(kinds, numbers, strict=True) for _ in range(number)]
    canvas = drawing.scene(rng.choice(world.styles), rng, shown)
    stranger = rng.choice([concept for concept in world.things if concept not in kinds])
    return canvas, _caption(canvas), canvas.replaced(rng.randrange(len(shown)), stranger)


def _caption(canvas: Canvas) -> str:
    """ "an apple, a dog and two cars", in order of first appearance."""
    numbers: dict[Concept, int] = {}
    for one in canvas.objects:
        numbers[one.concept] = numbers.get(one.concept, 0) + 1
    parts = [
        with_article(concept.phrase) if number == 1 else f"{NUMBERS[number]} {plural(concept.phrase)}"
        for concept, number in numbers.items()
    ]
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


# --- the sets --------------------------------------------------------------------------------------------


def _question(*ways: str) -> tuple[str, ...]:
    return tuple(f"{IMAGE}{way}\n" for way in ways)


_VQA = _question(
    "Represent the given image with the following question: {}",
    "Answer this question about the image: {}",
    "Look at the picture and embed it for the question: {}",
    "Using the image, find the answer to: {}",
)
INSTRUCTIONS = {
    "Emoji-Subgroup": _question(
        "Represent the given image for classification",
        "Embed this picture so that its class can be told",
        "Which class does the image belong to?",
        "Classify the picture",
    ),
    "Emoji-Group": _question(
        "Identify the category of the object shown in the image",
        "Name the broad category of what is shown",
        "Embed this picture so that its category can be told",
    ),
    "Scene-Topic": _question("Identify the scene shown in the image"),
    "VQA": _VQA,
    "Emoji-t2i": (
        "Find me an everyday image that matches the given caption: {}\n",
        "Find a picture of this: {}\n",
        "Which image shows the following? {}\n",
        "Look up an image for the caption: {}\n",
    ),
    "Emoji-i2t": _question(
        "Find an image caption describing the given everyday image.",
        "What would be a caption of this picture?",
        "Find the text that tells what is shown.",
    ),
    "Emoji-i2i": _question(
        "Find a day-to-day image that looks similar to the provided image.",
        "Find another picture of the same thing.",
        "Which image is most like this one?",
    ),
    "Tag-t2i": ("Find an image that matches the given keywords: {}\n",),
    "Scene-Change": _question(
        "Given an image, find a similar everyday image with the described changes: {}",
        "Find the image that this one becomes after the change: {}",
        "Starting from the picture, {}",
    ),
    "Scene-Isolate": _question(
        'Select the portion of the image that isolates the object labeled as "{}"',
        'Find the part of the picture that shows the "{}"',
        'Cut out the object named "{}"',
    ),
    "Scene-Refer": _question("Select the portion of the image that follows the language expressions. {}"),
    "Scene-Matching": _question('Select the portion of the image that follows the language expressions: "{}"'),
    "Scene-Point": _question("Select the portion of the image that answers the question {}"),
}


def _subgroups(world: World) -> list[Item]:
    return [_word(name) for name in sorted({concept.subgroup for concept in world.concepts})]


def _groups(world: World) -> list[Item]:
    return [_word(name) for name in sorted({concept.group for concept in world.concepts})]


def _topics(world: World) -> list[Item]:
    return [_word(name) for name in sorted({concept.subgroup for concept in world.things})]


def _fixed(words: tuple[str, ...]) -> Callable[[World], list[Item]]:
    return lambda world: [_word(word) for word in words]


def _phrases(world: World) -> list[Item]:
    return [_word(concept.phrase) for concept in world.concepts]


def _pictures(world: World) -> list[Item]:
    styles = (world.target_style,) if world.target_style else world.styles
    return [
        Item(PICTURE, drawing.single(world, style, concept), concept.code)
        for concept in world.concepts
        for style in styles
    ]


_CLS, _ASK, _RET, _VG = "classification", "vqa", "retrieval", "grounding"
_say = INSTRUCTIONS
SETS = {
    "Emoji-Subgroup": TaskSet(_CLS, subgroup, _say["Emoji-Subgroup"], "picture -> class", classes=_subgroups),
    "Emoji-Group": TaskSet(_CLS, group, _say["Emoji-Group"], "picture -> category", classes=_groups),
    "Scene-Topic": TaskSet(_CLS, scene_topic, _say["Scene-Topic"], "scene -> class of most", classes=_topics),
    "Grid-Where": TaskSet(_ASK, where, _VQA, "what is in the top left corner?", "where", _phrases),
    "Grid-Count": TaskSet(_ASK, count, _VQA, "how many dogs are there?", "", _fixed(NUMBERS[1:])),
    "Grid-Color": TaskSet(_ASK, colour, _VQA, "what color is the dog?", "", _fixed(COLOURS)),
    "Grid-Beside": TaskSet(_ASK, beside, _VQA, "what is to the left of the dog?", "where", _phrases),
    "Grid-Position": TaskSet(_ASK, position, _VQA, "where is the dog?", "where", _fixed(CORNERS)),
    "Emoji-t2i": TaskSet(_RET, text_to_image, _say["Emoji-t2i"], "name -> picture", "", _pictures),
    "Emoji-i2t": TaskSet(_RET, image_to_text, _say["Emoji-i2t"], "picture -> name", classes=_phrases),
    "Emoji-i2i": TaskSet(_RET, style_to_style, _say["Emoji-i2i"], "picture -> same thing redrawn", "", _pictures),
    "Tag-t2i": TaskSet(_RET, tags_to_image, _say["Tag-t2i"], "keywords -> picture", "", _pictures),
    "Scene-t2i": TaskSet(_RET, caption_to_scene, _say["Emoji-t2i"], "caption -> scene", "caption"),
    "Scene-i2t": TaskSet(_RET, scene_to_caption, _say["Emoji-i2t"], "scene -> caption", "caption"),
    "Scene-Change": TaskSet(_RET, change, _say["Scene-Change"], "scene + replacement -> scene", "scene"),
    "Scene-Isolate": TaskSet(_VG, isolate, _say["Scene-Isolate"], "scene + name -> crop", "scene"),
    "Scene-Refer": TaskSet(_VG, refer, _say["Scene-Refer"], "scene + the left one of two -> crop"),
    "Scene-Matching": TaskSet(_VG, matching, _say["Scene-Matching"], "scene + name -> scene + place", "scene"),
    "Scene-Point": TaskSet(_VG, point, _say["Scene-Point"], "scene + class -> crop", "scene"),
}
TRAIN = (
    "Emoji-Subgroup",
    "Emoji-Group",
    "Grid-Where",
    "Grid-Count",
    "Grid-Color",
    "Grid-Beside",
    "Emoji-t2i",
    "Emoji-i2t",
    "Emoji-i2i",
    "Scene-t2i",
    "Scene-i2t",
    "Scene-Change",
    "Scene-Isolate",
)


@dataclass(frozen=True)
class EvalSet:
    """An evaluation set: which rows, in which styles (None: those of training), of which concepts."""

    name: str
    set: str
    styles: tuple[str, ...] | None = None
    target_style: str | None = None  # for style to style
    concepts: str = "held-out"  # or "seen": those of training, in rows and canvases that training does not draw

    @property
    def domain(self) -> str:
        """OOD is a task, or a style, that training has not seen, whatever the concepts."""
        return "IND" if self.set in TRAIN and self.styles is None else "OOD"


_FLUENT = ("fluent",)
_HELD_OUT = (
    *(EvalSet(name, name) for name in SETS),
    EvalSet("Fluent-Subgroup", "Emoji-Subgroup", _FLUENT),
    EvalSet("Fluent-Group", "Emoji-Group", _FLUENT),
    EvalSet("Fluent-Where", "Grid-Where", _FLUENT),
    EvalSet("Fluent-Count", "Grid-Count", _FLUENT),
    EvalSet("Fluent-t2i", "Emoji-t2i", _FLUENT),
    EvalSet("Fluent-i2i", "Emoji-i2i", STYLES, "fluent"),
    EvalSet("Fluent-Change", "Scene-Change", _FLUENT),
    EvalSet("Fluent-Isolate", "Scene-Isolate", _FLUENT),
    EvalSet("Fluent-i2t", "Emoji-i2t", _FLUENT),
    EvalSet("Fluent-Beside", "Grid-Beside", _FLUENT),
    EvalSet("Fluent-Position", "Grid-Position", _FLUENT),
    EvalSet("Fluent-Color", "Grid-Color", _FLUENT),
    EvalSet("Fluent-Point", "Scene-Point", _FLUENT),
)
EVAL = (*_HELD_OUT, *(replace(one, name=f"Seen-{one.name}", concepts="seen") for one in _HELD_OUT))
