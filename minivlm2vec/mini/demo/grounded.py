"""One thing that is looked for in a picture without any boxes, for the page."""

from ...embedder import Embedder
from ...rows import Images
from ...tasks import Grounding, ground
from .questions import GROUNDING, DemoData, read_picture

LARGER = 3  # times the picture's own size, on the page: lines are drawn then


def ground_first(embedder: Embedder, data: DemoData, images: Images) -> Grounding | None:
    """What the first question of the first set of grounding names, looked for in its picture; whatever comes out is
    shown. None where the data has no such set."""
    questions = next((one.questions for one in data.question_sets if one.kind is GROUNDING), ())
    if not questions:
        return None
    query = questions[0].query
    picture = read_picture(images, query)
    larger = picture.resize((LARGER * picture.width, LARGER * picture.height))
    return ground(embedder, larger, GROUNDING.own(query.text), top=1)
