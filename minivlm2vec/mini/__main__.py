"""python -m minivlm2vec.mini: see cli/mini.py."""

import sys

from ..cli.mini import main

if __name__ == "__main__":
    sys.exit(main())
