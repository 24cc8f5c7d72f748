"""Products chained through one loop-carried accumulator, which Triton 3.6 to 3.8 compile wrongly for sm_100 and sm_103
where they take tcgen05 (Triton #10821): acc = dot(a, b, acc); acc = dot(c, d, acc).

Read from the compiled kernel's TTIR, after inlining: what the loops are before any pass that may go wrong.
"""

import re

NAME = re.compile(r"%[\w#]+")
LOOP = re.compile(r"scf\.for .*iter_args\((.*?)\)\s*->")
PASSED_ON = ("arith.", "math.", "tt.reshape", "tt.trans", "ttg.convert_layout")  # from operand to result


def chained_dots(ttir: str) -> list[str]:
    """The later dot of each pair, as TTIR has it. Values that pass through elementwise operations count as the same."""
    found: list[str] = []
    carried: list[dict[str, int]] = []  # of each open loop: value -> how many dots it has been through since it began
    opened: list[str] = []  # what each open brace belongs to
    for line in ttir.splitlines():
        text = line.strip()
        if loop := LOOP.search(text):
            carried.append({pair.split("=")[0].strip(): 0 for pair in loop[1].split(",") if "=" in pair})
        names = NAME.findall(text.split(" loc(")[0])
        if carried and "=" in text and names and not loop:
            operation = text.split("=", 1)[1].strip()
            result, operands = names[0], names[1:]
            for values in carried:
                if operation.startswith("tt.dot ") and len(operands) >= 3:
                    if operands[2] in values:
                        values[result] = values[operands[2]] + 1
                        if values[result] > 1:
                            found.append(text.split(" loc(")[0])
                elif operation.startswith(PASSED_ON):
                    through = [values[x] for x in operands if x in values]
                    if through:
                        values[result] = max(through)
        for brace in re.findall(r"[{}]", re.sub(r"\{[^{}]*\}", "", text)):
            if brace == "{":
                opened.append("loop" if loop else "other")
            elif opened and opened.pop() == "loop":
                carried.pop()
    return found
