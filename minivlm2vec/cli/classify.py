"""`minivlm2vec classify`: images against labels."""

import argparse
import csv
import json
import sys
from typing import TYPE_CHECKING, Any

from .arguments import add_model_arguments, load_embedder, model_spec
from .embed import BAD_ROWS, DONE, Bar
from .messages import say
from .pictures import add_forms, check_paths, image_paths, instruction_named, runs, texts_of

if TYPE_CHECKING:
    from ..tasks import Classification, Classifier

TOGETHER = 256  # images of a call


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Prints the nearest labels of each image. With -o and one folder or table it streams and can be killed at any "
        "moment: the same command goes on, as `embed` does, and OUT.vectors.npy stays for further labels."
    )
    parser.epilog = "Exit codes: 0 all images have a label; 1 an error; 2 wrong arguments; 3 some images have none"
    parser.add_argument("images", nargs="+", metavar="IMG", help="images; a folder is all its images; - reads paths")
    parser.add_argument("--labels", required=True, metavar="FILE|A,B,C", help="a file with one a line, or a list")
    parser.add_argument("--template", action="append", metavar="TEXT",
                        help="what is made of a label, such as 'a photo of {}'; repeatable: averaged")  # fmt: skip
    parser.add_argument(
        "--instruction", default="classify", metavar="NAME", help="a task of MMEB, or 'none' (%(default)s)"
    )
    parser.add_argument("--top", type=int, default=5, metavar="K", help="labels of an image (%(default)s)")
    parser.add_argument("-o", "--out", metavar="OUT", help="write a .csv or .jsonl; resumable")
    parser.add_argument("--overwrite", action="store_true", help="replace an OUT that was made otherwise")
    parser.add_argument("--quiet", action="store_true", help="no progress bar (with -o)")
    add_forms(parser, json="one JSON object a line", csv="a row for each image: its nearest label")
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..tasks import Classifier, label_texts
    from ..tasks.common import as_task, check_has_text, checked_top

    labels = texts_of(args.labels, "--labels")
    template = args.template or "{}"
    args.instruction = instruction_named(args.instruction)
    _check_options(args)
    checked_top(args.top, len(label_texts(labels, template)), "labels", allowed=5)
    if args.out:
        return _into_file(args, labels, template)
    check_has_text({}, as_task(args.instruction).query, "every image")
    check_paths(args.images)
    embedder = load_embedder(args, show_progress=sys.stderr.isatty())
    return _print_all(args, Classifier(embedder, labels, instruction=args.instruction, template=template))


def _check_options(args: argparse.Namespace) -> None:
    """Raises ValueError for options that have no meaning beside -o, or without it."""
    without = ("json", "csv") if args.out else ("overwrite", "quiet")
    for name in without:
        if getattr(args, name):
            said = (
                "is for what is printed; OUT's ending, .csv or .jsonl, says what -o writes" if args.out else "needs -o"
            )
            raise ValueError(f"--{name} {said}")


def _into_file(args: argparse.Namespace, labels: list[str], template: Any) -> int:
    from .. import files

    if len(args.images) != 1 or args.images[0] == "-":
        raise ValueError(f"-o is for one folder or table, got {len(args.images)}: {', '.join(args.images[:3])}")
    options = files.EmbedOptions(model_spec(args, show_progress=not args.quiet), overwrite=args.overwrite)
    args.append, args.store = False, "float32"
    with Bar(args) as progress:
        summary = files.classify(args.images[0], args.out, labels, None, options, progress,
                                 instruction=args.instruction, template=template, top=args.top)  # fmt: skip
    if summary is None:
        return DONE
    say(f"wrote {args.out}: {summary.rows:,} images, {len(labels)} labels; vectors in {summary.out}")
    if summary.bad_rows:
        say(f"{summary.bad_rows:,} of them have no label: {summary.errors} says why")
    return BAD_ROWS if summary.bad_rows else DONE


def _print_all(args: argparse.Namespace, classifier: "Classifier") -> int:
    rows, bad, number = csv.writer(sys.stdout, lineterminator="\n"), 0, 0
    if args.csv:
        rows.writerow(("image", "label", "score", "probability"))
    for paths in runs(image_paths(args.images), TOGETHER):
        for result in _classified(classifier, paths, args.top):
            number += 1
            if isinstance(result, ValueError):
                bad += 1
                say(f"no label for {result}")
            elif args.json:
                print(json.dumps(result.as_dict()), flush=True)
            elif args.csv:
                rows.writerow((result.image, *result.row()))
            else:
                print(result, flush=True)
    if bad == number:
        raise ValueError(f"none of {number} images has a label" if number else "no image is given")
    return BAD_ROWS if bad else DONE


def _classified(classifier: "Classifier", paths: list[str], top: int) -> "list[Classification | ValueError]":
    """The results; where one image cannot be read, each by itself."""
    from ..errors import InputError

    try:
        return list(classifier(paths, top=top))
    except InputError as e:
        if len(paths) == 1:
            return [InputError(e.reason, name=paths[0])]
        return [result for path in paths for result in _classified(classifier, [path], top)]
