"""More styles for training: emoji sets that come as SVG and by name. mini-MMEB itself has none of them.

They lack many concepts; `stream.VariedDrawings` shows those in another style. Needs resvg-py (extra `mini`).
"""

import io
import json
import re
from pathlib import Path

from PIL import Image

from . import sources
from .concepts import Concept, World, fitted


def add_styles(world: World, tarballs: dict[sources.Package, Path]) -> World:
    """The world with these packages' drawings of its concepts. A style has its package's name."""
    styles, drawings = world.styles, dict(world.drawings)
    for package, path in tarballs.items():
        icons = _read(path)
        for concept in world.concepts:
            icon = next(filter(None, (_icon(icons, name) for name in _names(concept))), None)
            if icon is not None:
                drawings[package.name, concept.code] = fitted(_draw(icons, icon))
        styles += (package.name,)
    return World(world.concepts, drawings, styles, world.target_style)


def _read(path: Path) -> dict:
    ((_, content),) = sources.members(path, "package/icons", ".json")
    return json.loads(content)


def _names(concept: Concept) -> list[str]:
    """What the sets may call it: words with hyphens, or run together; flags are "for" their country."""
    words = re.sub("[^a-z0-9]+", "-", re.sub("['’]", "", concept.label.lower()).replace("&", "and")).strip("-")
    return [words, words.replace("flag-", "flag-for-", 1), words.replace("-", "")]


def _icon(icons: dict, name: str) -> dict | None:
    """The icon of this name, or the one that it is another name for; not those that are turned or mirrored."""
    alias = icons.get("aliases", {}).get(name, {"parent": name})
    return icons["icons"].get(alias["parent"]) if set(alias) == {"parent"} else None


def _draw(icons: dict, icon: dict) -> Image.Image:
    try:
        import resvg_py
    except ImportError:
        raise ImportError("drawings in SVG need resvg-py: pip install 'minivlm2vec[mini]'") from None
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="128" height="128" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
