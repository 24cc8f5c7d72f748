"""A process that opens and decodes the images of strangers, so that it can be killed; decoding.py starts it.

Each request on stdin is a line of JSON and the bytes of an image file; each answer on stdout is a line of JSON and, for
crops, their pixels. It imports no torch, takes no more memory than it was told, and ends with its stdin.
"""

import contextlib
import json
import os
import signal
import sys
from typing import Any, BinaryIO

from ..errors import InputError
from ..images import image_crops, image_size, open_image


def main() -> None:
    """Answers requests until stdin ends. argv[1]: the settings, in JSON (see `decoding.Decoder`)."""
    settings = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server ends this process
    stdin, stdout = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what a library prints is no answer
    _limit_memory(settings.pop("memory_bytes"))
    _send(stdout, {"ready": True})
    while line := stdin.readline():
        request = json.loads(line)
        answer, pixels = _answer(stdin.read(request.pop("length")), request, settings)
        _send(stdout, answer | {"length": len(pixels)}, pixels)


def _answer(data: bytes, request: dict[str, Any], settings: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Size or crops of an image, or what is wrong with it; nothing that an image may cause ends the process."""
    try:
        image = open_image(data, max_pixels=settings["max_pixels"])
        if request["want"] == "size":
            return {"size": image_size(image, exif_transpose=settings["exif_transpose"])}, b""
        crops, grid = image_crops(
            image,
            request["num_crops"],
            settings["crop_size"],
            fast_decode=settings["fast_decode"],
            exif_transpose=settings["exif_transpose"],
        )
        return {"grid": grid}, crops.tobytes()
    except InputError as e:
        return {"error": e.reason}, b""


def _limit_memory(size: int) -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # where the system has no such limit
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (size if most == resource.RLIM_INFINITY else min(size, most), most))


def _send(stdout: BinaryIO, answer: dict[str, Any], pixels: bytes = b"") -> None:
    stdout.write(json.dumps(answer).encode() + b"\n" + pixels)
    stdout.flush()


if __name__ == "__main__":
    main()
