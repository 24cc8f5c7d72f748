"""These kernels in the layout of Hugging Face's Kernel Hub, for use without this project.

    python -m minivlm2vec_kernels.hub FOLDER

    from kernels import get_local_kernel                      # pip install kernels
    y = get_local_kernel("FOLDER").rms_norm(x, weight, 1e-5)

A kernel of the hub is a folder `build` with one folder for each kind of machine. Kernels that are compiled where they
run need only one, `torch-universal`: a package that imports itself by relative names (it is loaded under the name `id`
of its metadata.json, which no other version has), and a folder of its own name for older loaders.
"""

import argparse
import base64
import hashlib
import json
import sys
from pathlib import Path

NAME = "minivlm2vec_kernels"
VERSION = 0  # of what the package offers; the hub keeps 0 for what may still change
VARIANT = "torch-universal"
LICENSE = "Apache-2.0"
LEFT_OUT = {Path(__file__).name}

OLD_LOADERS = '''"""For loaders that look for the package here; it is the folder above."""

import importlib.util
import sys
from pathlib import Path

_name = "{id}"
if _name not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).parents[1] / "__init__.py")
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
globals().update({{_n: getattr(sys.modules[_name], _n) for _n in sys.modules[_name].__all__}})
__all__ = sys.modules[_name].__all__
'''

README = """---
license: apache-2.0
tags: [kernels]
---

The ops of VLM2Vec on packed sequences, in Triton, and in plain torch where Triton does not run: {ops}.

```python
from kernels import get_kernel, get_local_kernel

ops = get_local_kernel("this folder")  # or get_kernel("owner/name", version={version}, trust_remote_code=True)
y = ops.silu_mul(ops.rms_norm(x, weight, 1e-5))
out = ops.attention(q, k, v, cu_seqlens, max_seqlen, causal=True)
```
"""


def write_build(folder: str | Path) -> Path:
    """Writes README.md and build/torch-universal into `folder`, which is made if needed. Returns the latter's path.

    Raises FileExistsError where there is such a build already, or a README.md with another text; OSError where the
    folder cannot be made.
    """
    from . import __all__ as ops

    sources = {p.name: p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py")) if p.name not in LEFT_OUT}
    sources["py.typed"] = b""
    module = f"_{NAME}_{_sha256(*sources.values()).hex()[:8]}"
    files = sources | {f"{NAME}/__init__.py": OLD_LOADERS.format(id=module).encode()}
    metadata = {
        "id": module,
        "name": NAME.replace("_", "-"),
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": "cuda"},  # there is no word for all; without `archs` no card is refused
        "digest": {"algorithm": "sha256", "files": {k: _sha256_64(v) for k, v in files.items()}},
    }
    about = README.format(ops=", ".join(f"`{op}`" for op in ops), version=VERSION).encode()
    readme, build = Path(folder, "README.md"), Path(folder, "build", VARIANT)
    if build.exists():
        raise FileExistsError(f"{build} is there already: remove it first")
    if readme.exists() and readme.read_bytes() != about:
        raise FileExistsError(f"{readme} has another text, which would be lost: move it away")
    (build / NAME).mkdir(parents=True)
    for name, content in files.items():
        (build / name).write_bytes(content)
    (build / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    readme.write_bytes(about)
    return build


def _sha256(*contents: bytes) -> bytes:
    return hashlib.sha256(b"".join(contents)).digest()


def _sha256_64(content: bytes) -> str:
    return base64.b64encode(_sha256(content)).decode()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m minivlm2vec_kernels.hub", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where README.md and build/ are written")
    args = parser.parse_args()
    try:
        print(write_build(args.folder))
    except OSError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
