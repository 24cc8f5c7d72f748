"""Parts of a model by name. What a model is made of stands in its config.json, and each name there is looked up here.

    @register("pooling", "mean")
    def mean(x, cu_seqlens):                            # [T, D], [B + 1] -> [B, D]
        return torch.stack([s.mean(0) for s in x.split(cu_seqlens.diff().tolist())])

The kinds, and what is registered under them:

    pooling     a function as above; or a class of such modules, made with (config, backend=...)
    tower       a class, made with (config.vision, backend=...): forward(crops, grids) -> features
    projector   a class, made with (config, backend=...): forward(features, grids) -> image tokens [I, D]
    model       a class derived from VLM2Vec, made with (config, backend=...)

A checkpoint names its parts and brings none: whoever loads it imports the file that registers them, or names that file
(`load_plugin`, --plugin). Nothing is imported because a checkpoint says so.
"""

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .errors import CheckpointError

KINDS = ("model", "tower", "projector", "pooling")
T = TypeVar("T")
_parts: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}


def register(kind: str, name: str) -> Callable[[T], T]:
    """A decorator: gives a class or a function a name that config.json can hold.

    Raises ValueError for a kind that is none, and for a name that another part has (the same part, defined again in a
    notebook or a file that is loaded twice, takes its own place).
    """
    if kind not in KINDS:
        raise ValueError(f"kind is one of {', '.join(KINDS)}, got {kind!r}")

    def decorate(part: T) -> T:
        other = _parts[kind].get(name)
        if other is not None and _origin(other) != _origin(part):
            raise ValueError(f"a {kind} is registered as {name!r} already: {_origin(other)}; {_origin(part)} needs "
                             "another name")  # fmt: skip
        _parts[kind][name] = part
        return part

    return decorate


def find(kind: str, name: str) -> Any:
    """The part of that name. Raises CheckpointError for one that nobody has registered."""
    if name not in _parts[kind]:
        raise CheckpointError(
            f"the {kind} {name!r} is not registered here; registered are {', '.join(map(repr, _parts[kind]))}. Import "
            "the file that registers it first, or name that file: --plugin FILE.py, minivlm2vec.load_plugin(FILE)"
        )
    return _parts[kind][name]


def name_of(kind: str, part: Any) -> str | None:
    """The name under which a function, or the class of a module, is registered; None where it is not."""
    plain = getattr(type(part), "stands_for", None)  # of a class of inference/
    return next((n for n, one in _parts[kind].items() if any(one is p for p in (part, type(part), plain))), None)


def load_plugin(path: str | os.PathLike) -> None:
    """Runs a Python file, which may register parts. Name none that you do not trust. Once a process for each file.

    Raises ValueError naming the file where there is none, or it fails.
    """
    path = Path(path).expanduser().resolve()
    name = f"minivlm2vec_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return
    if not path.is_file():
        raise ValueError(f"plugin {path} does not exist: it is a Python file")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"plugin {path} is no Python file: its name ends in .py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        del sys.modules[name]
        raise ValueError(f"plugin {path}: {type(e).__name__}: {e}") from e


def _origin(part: Any) -> str:
    """Where it is defined; the same for a file that is loaded as a plugin and imported too."""
    module = getattr(part, "__module__", "?")
    file = getattr(sys.modules.get(module), "__file__", None) or module
    return f"{file}: {getattr(part, '__qualname__', part)}"
