"""Optional packages say what to install."""

import importlib
import sys

import pytest

from minivlm2vec.extras import import_extra


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pyarrow is needed to read it: pip install 'minivlm2vec\[files\]'"):
        import_extra("pyarrow.parquet", extra="files", why="to read it")


def test_a_broken_package_raises_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "broken_package").mkdir()
    (tmp_path / "broken_package" / "__init__.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        import_extra("broken_package", extra="files", why="to read it")


def test_it_returns_the_package():
    assert import_extra("xml.dom", extra="files", why="").__name__ == "xml"
