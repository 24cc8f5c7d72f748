"""python -m minivlm2vec.mini.world DIR: see cli/mini_world.py."""

import sys

from ...cli.mini_world import main

if __name__ == "__main__":
    sys.exit(main())
