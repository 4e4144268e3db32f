"""A process that decodes JPEG files into memory which it shares with the program.

Started as a script, without flatout, torch or the program's environment. A line on standard input
names a file and a place in the memory, a line on standard output says what is there now. It ends
when standard input does.
"""

from __future__ import annotations

import json
import mmap
import signal
import sys
from typing import Any

MAPPED = {"RGB": "RGBX", "L": "L", "CMYK": "CMYK"}
"""Modes of JPEG images, and those of the same layout that Pillow can have in foreign memory."""


def main(descriptor: int, place_bytes: int, settled_s: float, *folders: str) -> None:
    """Decode what is asked for.

    Args:
        descriptor: of the shared memory.
        place_bytes: of each place in it.
        settled_s: see ``images.SETTLED_S``.
        folders: of Pillow and of ``images.py``.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program decides what ends it
    sys.path += folders
    import images  # type: ignore[import-not-found]

    images.SETTLED_S = settled_s
    memory = memoryview(mmap.mmap(descriptor, 0))
    for line in sys.stdin:
        place, path = json.loads(line)
        try:
            made = _decoded(path, memory[place * place_bytes : (place + 1) * place_bytes])
        except Exception:  # noqa: BLE001 - the program meets it when it opens the file itself
            made = None
        print(json.dumps(made), flush=True)


def _decoded(path: str, place: memoryview) -> tuple[str, str, Any] | None:
    """Decode a file; its identity, its mode and its size, ``None``: not here."""
    from images import identity
    from PIL import Image
    from PIL.JpegImagePlugin import JpegImageFile

    with open(path, "rb") as file:
        image = JpegImageFile(file)
        key = identity(image)
        mapped = MAPPED.get(image.mode)
        width, height = image.size
        most = Image.MAX_IMAGE_PIXELS
        if key is None or mapped is None or 4 * width * height > len(place):
            return None
        if most is not None and width * height > most:
            return None
        target = Image.frombuffer(mapped, image.size, place, "raw", mapped, 0, 1).im  # type: ignore[arg-type]
        image.load_prepare = lambda: setattr(image, "im", target)  # type: ignore[method-assign]
        image.load()
        return repr(key), image.mode, image.size


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:])
