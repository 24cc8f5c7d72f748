"""The task instructions of MMEB, by name: what VLM2Vec was trained with.

`{text}` is where an input's own text goes. The tag of an image comes before the instruction and is put there by
the processor. In the data every instruction ends with a newline, and plain text targets (class names, answers,
captions) have none.
"""

from dataclasses import dataclass

TEXT = "{text}"
IMAGE = "Represent the given image.\n"
CROP = "Represent the given cropped image of the object"
MATCH = 'Select the portion of the image that follows the language expressions: "{text}"\n'
WIKIPEDIA = "Represent the given Wikipedia image with related text information: {text}\n"


@dataclass(frozen=True)
class Task:
    """What to put around a query and around a document of one task."""

    query: str
    document: str


TASKS = {
    # classification: an image, against class names
    "classify": Task("Represent the given image for classification\n", TEXT),
    "classify_object": Task("Identify the object shown in the image\n", TEXT),
    "classify_scene": Task("Identify the scene shown in the image\n", TEXT),
    "classify_country": Task("Identify the country depicted in the image\n", TEXT),
    "classify_news": Task(
        "Represent the given news image with the following caption for domain classification: {text}\n", TEXT
    ),
    "classify_hateful": Task(
        "Represent the given image for binary classification to determine whether it constitutes hateful speech "
        "or not\n", TEXT
    ),
    # visual question answering: an image and a question, against answers
    "vqa": Task("Represent the given image with the following question: {text}\n", TEXT),
    # retrieval
    "t2i": Task("Find me an everyday image that matches the given caption: {text}\n", IMAGE),
    "i2t": Task("Find an image caption describing the given everyday image.\n", TEXT),
    "i2i": Task("Find a day-to-day image that looks similar to the provided image.\n", IMAGE),
    "news_t2i": Task("Retrieve an image of this news caption. {text}\n", IMAGE),
    "news_i2t": Task("Find a caption for the news in the given photo.\n", TEXT),
    "dialogue": Task(
        "Represent the given dialogue about an image, which is used for image retrieval: {text}\n", IMAGE
    ),
    "change": Task("Given an image, find a similar everyday image with the described changes: {text}\n", IMAGE),
    "fashion": Task("Find an image to match the fashion image and style note: {text}\n", IMAGE),
    "wikipedia": Task("Find a Wikipedia image that answers this question: {text}\n", WIKIPEDIA),
    "wikipedia_pair": Task(
        "Retrieve a Wikipedia image-description pair that provides evidence for the question of this image: {text}\n",
        WIKIPEDIA,
    ),
    "document": Task("Find the document image that can answer the given query: {text}\n", IMAGE),
    "news": Task(
        "Find a news image that matches the provided caption: {text}\n",
        "Represent the given image with related text information: {text}\n",
    ),
    # grounding: an image and a description, against crops
    "ground": Task('Select the portion of the image that isolates the object labeled as "{text}"\n', CROP),
    "refer": Task("Select the portion of the image that follows the language expressions. {text}\n", CROP),
    "point": Task("Select the portion of the image that answers the question {text}\n", CROP),
    "match": Task(MATCH, MATCH),
}  # fmt: skip


_DATASETS = {
    "classify": "ImageNet-1K ImageNet-A ImageNet-R CIFAR-100",
    "classify_object": "VOC2007 ObjectNet",
    "classify_scene": "SUN397 Place365",
    "classify_country": "Country211",
    "classify_news": "N24News",
    "classify_hateful": "HatefulMemes",
    "vqa": "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W ScienceQA VizWiz GQA TextVQA",
    "t2i": "MSCOCO_t2i",
    "i2t": "MSCOCO_i2t",
    "i2i": "NIGHTS",
    "news_t2i": "VisualNews_t2i",
    "news_i2t": "VisualNews_i2t",
    "dialogue": "VisDial",
    "change": "CIRR",
    "fashion": "FashionIQ",
    "wikipedia": "WebQA",
    "wikipedia_pair": "OVEN",
    "document": "Wiki-SS-NQ",
    "news": "EDIS",
    "ground": "MSCOCO",
    "refer": "RefCOCO",
    "point": "Visual7W-Pointing",
    "match": "RefCOCO-Matching",
}
DATASETS = {dataset: name for name, datasets in _DATASETS.items() for dataset in datasets.split()}  # of MMEB -> TASKS


def task(name: str) -> Task:
    """The task of that name, or of that dataset of MMEB. Raises ValueError with all names."""
    name = DATASETS.get(name, name)
    if name not in TASKS:
        raise ValueError(f"no task is named {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]


def instruction(name: str) -> str:
    """The instruction of that name: "t2i" and "t2i-query" are the query's, "t2i-document" the document's. Raises
    ValueError with all tasks."""
    side = "document" if name.endswith("-document") else "query"
    return getattr(task(name.removesuffix(f"-{side}")), side)
