"""MMEB, the benchmark that VLM2Vec is known by, and data in its format (extra `mmeb`).

    results = evaluate(embedder, "MMEB-eval", "outputs/mmeb", EvaluateOptions(subsets=("CIRR",)))

evaluation        the whole of it: rows -> vectors -> ranks -> files
subsets           the benchmark's subsets, and what was published for them
dataset           rows and pictures, in a folder or on the Hub
encode            vectors of what the rows name, each once, kept on disk
score             vectors -> ranks, Precision@1, intervals
results           what came of it, and its files
comparison        two evaluations, row by row
progress          how far it is
report            the table, beside the published rows
mteb_model        the model as mteb wants one (extra `mteb`)
sentence_module   the model as a sentence-transformers module (extra `sentence-transformers`)
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .comparison import Comparison, compare
    from .evaluation import EvaluateOptions, evaluate
    from .progress import Progress, ProgressBars
    from .results import Results

_HOMES = {
    "Comparison": "comparison",
    "EvaluateOptions": "evaluation",
    "Progress": "progress",
    "ProgressBars": "progress",
    "Results": "results",
    "compare": "comparison",
    "evaluate": "evaluation",
}
__all__ = ["Comparison", "EvaluateOptions", "Progress", "ProgressBars", "Results", "compare", "evaluate"]

__getattr__ = lazy_names(__name__, _HOMES)  # `subsets` is all that the command's --help needs
