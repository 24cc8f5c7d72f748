"""`minivlm2vec ground`: the part of an image that a text describes."""

import argparse
import json
import sys
from pathlib import Path

from .arguments import add_model_arguments, load_embedder
from .messages import say
from .pictures import check_paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Finds what a text describes in an image: the best of --box, or of windows of its own. Prints boxes in pixels "
        "(left, top, right, bottom) with their scores; -o draws them."
    )
    parser.add_argument("image", metavar="IMG")
    parser.add_argument("text", metavar="TEXT", help="a name, words that refer to it, or a question (--instruction)")
    parser.add_argument("-o", "--out", metavar="FILE", help="write the image with the boxes")
    parser.add_argument("--draw", type=int, metavar="N", help="boxes to draw with -o (1)")
    parser.add_argument("--box", action="append", metavar="L,T,R,B", help="a box to choose from; repeatable")
    parser.add_argument("--instruction", default="ground", choices=("ground", "refer", "point"),
                        help="a name, a referring expression, or a question (%(default)s)")  # fmt: skip
    parser.add_argument("--top", type=int, metavar="K", help="boxes to print (5; all that are given)")
    parser.add_argument("--json", action="store_true", help="for machines")
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from PIL import Image

    from ..atomic import replacing
    from ..errors import at_least_one
    from ..tasks import ground

    at_least_one(draw=args.draw)
    if args.draw is not None and not args.out:
        raise ValueError(f"--draw {args.draw} needs -o, the file to draw into")
    boxes = None if args.box is None else [_box(box) for box in args.box]
    suffix = Path(args.out).suffix.lower() if args.out else ""
    if args.out and suffix not in Image.registered_extensions():
        raise ValueError(f"-o {args.out} ends in {suffix!r}, which is no image that can be written, such as .png")
    check_paths([args.image])
    embedder = load_embedder(args, show_progress=sys.stderr.isatty() and not args.json)
    found = ground(embedder, args.image, args.text, boxes=boxes, instruction=args.instruction, top=args.top)
    print(json.dumps(found.as_dict(), indent=2) if args.json else found)
    if args.out:
        with replacing(args.out) as path:
            found.draw(args.draw or 1).save(path, Image.registered_extensions()[suffix])
        say(f"wrote {args.out}")
    return 0


def _box(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--box {text!r}: four numbers left,top,right,bottom are needed") from None
