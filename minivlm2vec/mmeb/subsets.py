"""The subsets of MMEB, by meta-task, and the Precision@1 that has been published for them.

Sources: arXiv 2410.05160, Tables 1, 2 and 6 and, for the LoRA model on Phi-3.5-V, the table of its first version
as repeated in arXiv 2412.14475, Table 10. No table by dataset was published for the full fine-tune: only its
averages, of a run with batch 1,024, while the released checkpoint was trained with batch 2,048.

Some printed averages do not follow from the rows printed above them, so those are taken from the rows: SigLIP
retrieval (prints 31.6, the rows give 44.1), and UniIR grounding, IND, OOD and all (prints 65.3 for grounding, the
rows give 62.2: its grounding rows are of another variant of UniIR).
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..errors import nearest

HUB_NAME = "TIGER-Lab/MMEB-eval"  # the rows and pictures, as a dataset on the Hugging Face Hub
META_TASKS = ("classification", "vqa", "retrieval", "grounding", "other")


@dataclass(frozen=True)
class Subset:
    name: str
    meta_task: str  # one of META_TASKS
    domain: str  # "IND", "OOD" (of MMEB's training sets), or "" where that is not known
    averaged: bool = True  # CIFAR-100 lies in the repository but is not one of the 36; a subsets.json may say no


PUBLISHED_MODELS = (
    "VLM2Vec Full", "VLM2Vec LoRA", "CLIP", "OpenCLIP", "SigLIP", "BLIP2", "MagicLens", "E5-V", "UniIR",
)  # fmt: skip
# name, IND or OOD, then P@1 in the order of PUBLISHED_MODELS without the first
_CLASSIFICATION = """
ImageNet-1K   IND  65.6 55.8 63.5 45.4 10.3 48.0  9.6 58.3
N24News       IND  79.5 34.7 38.6 13.9 36.0 33.7 23.4 42.5
HatefulMemes  IND  67.1 51.1 51.7 47.2 49.6 49.0 49.7 56.4
VOC2007       IND  88.6 50.7 52.4 64.3 52.1 51.6 49.9 66.2
SUN397        IND  72.7 43.4 68.8 39.6 34.5 57.0 33.1 63.2
Place365      OOD  42.6 28.5 37.8 20.0 21.5 31.5  8.6 36.5
ImageNet-A    OOD  19.3 25.5 14.2 42.6  3.2  8.0  2.0  9.8
ImageNet-R    OOD  70.2 75.6 83.0 75.0 39.7 70.9 30.8 66.2
ObjectNet     OOD  29.5 43.4 51.4 40.3 20.6 31.6  7.5 32.2
Country211    OOD  13.0 19.2 16.8 14.2  2.5  6.2  3.1 11.3
"""
_VQA = """
OK-VQA          IND  63.2  7.5 11.5  2.4  8.7 12.7  8.9 25.4
A-OKVQA         IND  50.2  3.8  3.3  1.5  3.2  2.9  5.9  8.8
DocVQA          IND  78.4  4.0  5.3  4.2  2.6  3.0  1.7  6.2
InfographicsVQA IND  40.8  4.6  4.6  2.7  2.0  5.9  2.3  4.6
ChartQA         IND  59.0  1.4  1.5  3.0  0.5  0.9  2.4  1.6
Visual7W        IND  47.7  4.0  2.6  1.2  1.3  2.5  5.8 14.5
ScienceQA       OOD  43.4  9.4 10.2  7.9  6.8  5.2  3.6 12.8
VizWiz          OOD  39.2  8.2  6.6  2.3  4.0  1.7  2.6 24.3
GQA             OOD  60.7 41.3 52.5 57.5  9.7 43.5  7.8 48.8
TextVQA         OOD  66.1  7.0 10.9  1.0  3.3  4.6  8.2 15.1
"""
_RETRIEVAL = """
VisDial        IND  73.3 30.7 25.4 21.5 18.0 24.8  9.2 42.2
CIRR           IND  47.8 12.6 15.4 15.1  9.8 39.1  6.1 51.3
VisualNews_t2i IND  67.2 78.9 74.0 51.0 48.1 50.7 13.5 74.3
VisualNews_i2t IND  70.7 79.6 78.0 52.4 13.5 21.1  8.1 76.8
MSCOCO_t2i     IND  70.6 59.5 63.6 58.3 53.7 54.1 20.7 68.5
MSCOCO_i2t     IND  66.5 57.7 62.1 55.0 20.3 40.0 14.0 72.1
NIGHTS         IND  66.1 60.4 66.1 62.9 56.5 58.1  4.2 66.2
WebQA          IND  88.1 67.5 62.1 58.1 55.4 43.0 17.7 89.6
FashionIQ      OOD  12.9 11.4 13.8 20.1  9.3 11.2  2.8 40.2
Wiki-SS-NQ     OOD  56.6 55.0 44.6 55.1 28.7 18.7  8.6 12.2
OVEN           OOD  47.3 41.1 45.0 56.0 39.5  1.6  5.9 69.4
EDIS           OOD  79.9 81.0 77.5 23.6 54.4 62.6 26.8 79.2
"""
_GROUNDING = """
MSCOCO            IND  67.3 33.8 34.5 46.4 28.9 22.1 10.8 46.6
RefCOCO           OOD  84.7 56.9 54.2 70.8 47.4 22.8 11.9 67.8
RefCOCO-Matching  OOD  79.2 61.3 68.3 50.8 59.5 35.6 38.9 62.9
Visual7W-Pointing OOD  86.8 55.1 56.3 70.1 52.0 23.4 14.3 71.3
"""
_TABLES = dict(zip(META_TASKS, (_CLASSIFICATION, _VQA, _RETRIEVAL, _GROUNDING), strict=False))
_LINES = [(task, line.split()) for task, table in _TABLES.items() for line in table.strip().splitlines()]

MMEB = {name: Subset(name, task, domain) for task, (name, domain, *_) in _LINES}
MMEB["CIFAR-100"] = Subset("CIFAR-100", "classification", "", averaged=False)
PUBLISHED: dict[str, dict[str, float]] = {
    name: dict(zip(PUBLISHED_MODELS[1:], map(float, scores), strict=True)) for _, (name, _, *scores) in _LINES
}
# As printed: classification, vqa, retrieval, grounding, IND, OOD, all; "-" where the rows say otherwise.
_AVERAGES = """
VLM2Vec Full  52.8 50.3 57.8 72.3 62.8 47.4 55.9
VLM2Vec LoRA  54.8 54.9 62.3 79.5 66.5 52.0 60.1
CLIP          42.8  9.1 53.0 51.8 37.1 38.7 37.8
OpenCLIP      47.8 10.9 52.3 53.3 39.3 40.2 39.7
SigLIP        40.3  8.4    - 59.5 32.3 38.0 34.8
BLIP2         27.0  4.2 33.9 47.0 25.3 25.1 25.2
MagicLens     38.8  8.3 35.4 26.0 31.0 23.7 27.8
E5-V          21.8  4.9 11.5 19.0 14.9 11.5 13.3
UniIR         44.3 16.2 61.8    -    -    -    -
"""
_GROUPS = (*META_TASKS[:4], "IND", "OOD", "all")
PUBLISHED_AVERAGES: dict[str, dict[str, float]] = {
    line[:13].strip(): {
        group: float(score) for group, score in zip(_GROUPS, line[13:].split(), strict=True) if score != "-"
    }
    for line in _AVERAGES.strip().splitlines()
}


def groups(subsets: Iterable[Subset]) -> dict[str, list[str]]:
    """Names of the averaged subsets in each meta-task, in IND, OOD and all; empty groups are left out."""
    counted = [one for one in subsets if one.averaged]
    found = {task: [one.name for one in counted if one.meta_task == task] for task in META_TASKS}
    found |= {domain: [one.name for one in counted if one.domain == domain] for domain in ("IND", "OOD")}
    found["all"] = [one.name for one in counted]
    return {group: names for group, names in found.items() if names}


def published_average(model: str, group: str, names: Collection[str]) -> float | None:
    """The published model's mean over `names`, which are the evaluated members of `group`: as printed where that is
    the whole group, else from the rows; None if not known."""
    complete = sorted(names) == sorted(groups(MMEB.values()).get(group, []))
    if complete and group in PUBLISHED_AVERAGES[model]:
        return PUBLISHED_AVERAGES[model][group]
    if all(model in PUBLISHED.get(name, {}) for name in names):
        return sum(PUBLISHED[name][model] for name in names) / len(names)
    return None


def choose(
    available: dict[str, Subset], names: Collection[str] | None, meta_tasks: Collection[str] | None
) -> list[Subset]:
    """The subsets asked for, in the order of `available`. ValueError, with the nearest name, for an unknown one."""
    for name in names or ():
        _known(name, available, "subset")
    for task in meta_tasks or ():
        _known(task, {one.meta_task for one in available.values()}, "meta-task")
    return [
        one
        for name, one in available.items()
        if (not names or name in names) and (not meta_tasks or one.meta_task in meta_tasks)
    ]


def _known(name: str, available: Collection[str], what: str) -> None:
    if name in available:
        return
    near = nearest(name, available)
    hint = f"did you mean {near}?" if near else f"there are {', '.join(sorted(available))}"
    raise ValueError(f"no {what} is named {name!r}; {hint}")
