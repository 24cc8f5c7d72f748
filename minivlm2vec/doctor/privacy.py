"""Text that tells nobody who ran it or where: for reports that are pasted into an issue."""

import getpass
import os
import platform
import re
from contextlib import suppress
from pathlib import Path

_WORD = r"""[^\s'"<>|:;,()\[\]\\/]"""
_FOLDER = rf"(?:{_WORD}+(?: {_WORD}+){{0,4}})?[\\/]"  # its name may have spaces
_ROOT = r"(?<![\w.:/\\<~…])(?:[A-Za-z]:)?~?[\\/]"
_QUOTED = re.compile(rf"""(['"]){_ROOT}(?:[^'"]*[\\/])?([^'"\\/]*)\1""")
_PATH = re.compile(rf"{_ROOT}(?:{_FOLDER})*({_WORD}*)")
_URL_USER = re.compile(r"(?<=://)(?:[^\s/:]*:\S*|[^\s/]*)@")
_TERMINAL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
LONGEST = 400  # characters


def anonymous(text: str, longest: int = LONGEST) -> str:
    """One line: no terminal codes, paths cut to their last part, and no name of the user, his home or this host, nor a
    URL's user and password."""
    text = _URL_USER.sub("…@", " ".join(_TERMINAL.sub("", text).split()))
    if home := _home():
        text = text.replace(home, "~")
    text = _QUOTED.sub(lambda m: f"{m[1]}…/{m[2]}{m[1]}" if m[2] else f"{m[1]}…{m[1]}", text)
    text = _PATH.sub(lambda m: f"…/{m[1]}" if len(m[0]) > 1 and m[1] else m[0] if len(m[0]) == 1 else "…", text)
    for name, instead in _names():
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", instead, text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _home() -> str:
    """ "" of a user without one."""
    with suppress(RuntimeError, KeyError, OSError):
        home = str(Path.home())
        return home if len(home) > 1 else ""
    return ""


def _names() -> list[tuple[str, str]]:
    found = []
    with suppress(KeyError, OSError, ImportError):  # a user without a name
        found.append((getpass.getuser(), "<user>"))
    found.append((Path(_home()).name, "<user>"))
    hosts = (platform.node(), platform.node().split(".")[0], os.environ.get("HOSTNAME", ""))
    found += [(name, "<host>") for name in hosts]
    return [(name, instead) for name, instead in found if len(name) > 2 and name not in ("root", "localhost", "home")]
