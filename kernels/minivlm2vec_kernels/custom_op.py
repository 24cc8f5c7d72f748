"""How a function becomes one opaque op under torch.compile, and costs nothing when it is called eagerly."""

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, Protocol, TypeVar, cast

import torch
from torch.library import CustomOpDef

# Of the ops of this copy of the package: copies that are loaded under other names (hub.py) keep apart.
NAMESPACE = "minivlm2vec" if __package__ == "minivlm2vec_kernels" else __package__

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)


class CompiledAsOp(Protocol[P, R_co]):
    """A function that has been decorated with `compiled_as_op`."""

    op: CustomOpDef

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


def compiled_as_op(
    fake: Callable[P, R_co], *, mutates_args: Sequence[str] = (), name: str | None = None
) -> Callable[[Callable[P, R_co]], CompiledAsOp[P, R_co]]:
    """Decorator: the function as it is when called eagerly, the custom op NAMESPACE::name under torch.compile.

    The op keeps the compiler out of the function (no graph break, nothing specialised on sizes) and declares
    which arguments are written; `fake` gives the outputs' shapes. Eager calls skip the dispatcher, whose
    12 us of Python are more than a launch takes. Arguments are positional. `name` is the function's own by default.
    """

    def decorate(function: Callable[P, R_co]) -> CompiledAsOp[P, R_co]:
        op = torch.library.custom_op(
            f"{NAMESPACE}::{name or function.__name__}", function, mutates_args=tuple(mutates_args)
        )
        op.register_fake(fake)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R_co:
            return op(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

        decorated = cast(CompiledAsOp[P, R_co], call)
        decorated.op = op
        return decorated

    return decorate
