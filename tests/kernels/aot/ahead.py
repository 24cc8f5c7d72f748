"""How far loads through descriptors (TMA) are ahead of the waits for them, as PTX says.

Triton keeps `stages` buffers of each operand. Before a loop it loads the first stages - 1 blocks, and an iteration
loads the block of stages - 1 iterations later. Where that load stands at the end of an iteration and the wait at the
beginning of one, a whole iteration less lies between them: with two stages none at all.
"""

import re

LOAD = re.compile(r"cp\.async\.bulk\.tensor\S*global")
WAIT = re.compile(r"mbarrier\.try_wait")


def least(ptx: str) -> int:
    """The least whole number of iterations between a load and its wait, of all loops that load; 0 where none does."""
    lines = ptx.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\$L__BB\w+):", line))}
    found, begin = [], 0
    for i, line in enumerate(lines):
        branch = re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+);", line)
        start = labels.get(branch[1], i) if branch else i
        if start >= i:
            continue  # not backwards: no loop
        loads = [n for n in range(start, i) if LOAD.search(lines[n])]
        waits = [n for n in range(start, i) if WAIT.search(lines[n])]
        if not loads or not waits:
            continue  # such as the loop of a wait itself
        before = sum(bool(LOAD.search(x)) for x in lines[begin:start])
        stages_ahead = before // len(loads)
        found.append(stages_ahead if loads[0] < waits[0] else stages_ahead - 1)
        begin = i
    return max(0, min(found, default=0))
