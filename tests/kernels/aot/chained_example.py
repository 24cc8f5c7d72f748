"""A kernel that is made of the pattern which `chained.py` looks for, so that a test sees it found."""

import triton
import triton.language as tl


@triton.jit
def two_dots_one_accumulator(a, b, out, n, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    other = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(n):
        x, y = tl.load(a + at), tl.load(b + at)
        acc = tl.dot(x, y, acc * 0.5)
        if CHAINED:
            acc = tl.dot(y, x, acc)
        else:
            other = tl.dot(y, x, other)
        a += BLOCK * BLOCK
        b += BLOCK * BLOCK
    tl.store(out + at, acc + other)


def main() -> None:
    """Prints how many later dots are found with the pattern and without it."""
    from tests.kernels.aot.chained import chained_dots

    names = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "n": "i32"} | dict.fromkeys(("BLOCK", "CHAINED"), "constexpr")
    for chained in (True, False):
        constants = {"BLOCK": 64, "CHAINED": chained}
        source = triton.compiler.ASTSource(fn=two_dots_one_accumulator, signature=names, constexprs=constants)
        compiled = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 100, 32))
        print(len(chained_dots(compiled.asm["ttir"])))


if __name__ == "__main__":
    main()
