"""mini-MMEB: a small benchmark in MMEB's file formats, drawn from openly licensed emoji pictures.

It is a demonstration and a test bed, not MMEB: the pictures are emoji, the scenes are pasted together, and a
score here says nothing about a score there. What it keeps is the form: four meta-tasks, instructions worded
as in MMEB, candidates per row with the positive first, IND and OOD sets, training sets with hard negatives.

    python -m minivlm2vec.mini.world DIR                     fetches four npm packages (160 MB) and writes DIR
    python -m minivlm2vec.mini card CHECKPOINT DIR           scores a checkpoint on it and writes its model card

Concepts are split before anything is drawn: no drawing of a held-out concept is ever shown in training, after
merging equal drawings and skin, gender and direction variants. A whole style (Fluent) is held out. Sets named
Seen-* ask for concepts of training again, in other rows and in both kinds of style; averages leave them out.
"""

from .build import write
from .concepts import World, load_world

__all__ = ["World", "load_world", "write"]
