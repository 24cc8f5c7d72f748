"""python -m minivlm2vec.mmeb: the same as `minivlm2vec mmeb`."""

import sys

from minivlm2vec.cli import main

if __name__ == "__main__":
    sys.exit(main(["mmeb", *sys.argv[1:]]))
