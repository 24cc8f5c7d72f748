"""Packages that only some parts need: imported when they are, with a message that says what to install."""

import importlib
from types import ModuleType
from typing import Any


def import_extra(name: str, *, extra: str, why: str) -> ModuleType:
    """Imports the module `name`, such as "pyarrow.parquet", and returns its package, `pyarrow`.

    Raises ImportError that names the extra of minivlm2vec where the package is not installed: "pyarrow is needed
    `why`: pip install 'minivlm2vec[`extra`]'". A package that is there and broken raises its own error.
    """
    package = name.partition(".")[0]
    try:
        found = importlib.import_module(package)
    except ModuleNotFoundError as e:
        if e.name != package:
            raise
        raise ImportError(f"{package} is needed {why}: pip install 'minivlm2vec[{extra}]'") from None
    importlib.import_module(name)
    return found


def import_pyarrow(why: str, *, extra: str = "files") -> Any:
    """pyarrow, with its module `parquet`."""
    return import_extra("pyarrow.parquet", extra=extra, why=why)


def import_lancedb(why: str = "for Lance datasets") -> Any:
    """lancedb, with its module `index`."""
    return import_extra("lancedb.index", extra="lance", why=why)
