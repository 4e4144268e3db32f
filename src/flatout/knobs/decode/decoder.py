"""A process that decodes JPEG files into memory which it shares with the program.

Started as a script, without flatout and torch. A line that it is sent names a job, a place in the
memory, a file and whether files may end early; a line that it sends says of the job what is there
now. It ends when the program does, or hangs up.
"""

from __future__ import annotations

import json
import mmap
import signal
import socket
import sys
from typing import Any

MAPPED = {"RGB": "RGBX", "L": "L", "CMYK": "CMYK"}
"""Modes of JPEG images, and those of the same layout that Pillow can have in foreign memory."""


def main(line: int, memory: int, place_bytes: int, settled_s: float, *folders: str) -> None:
    """Decode what is asked for.

    Args:
        line: descriptor of a socket to the program.
        memory: descriptor of the shared memory.
        place_bytes: of each place in it.
        settled_s: see ``images.SETTLED_S``.
        folders: of ``images.py`` and of Pillow.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program decides what ends it
    sys.path[:0] = folders
    import images  # type: ignore[import-not-found]
    from PIL import ImageFile

    images.SETTLED_S = settled_s
    places = memoryview(mmap.mmap(memory, 0))
    # Not one file for both: a text file forgets what it has read ahead when it is written to.
    connection = socket.socket(fileno=line)
    with connection, connection.makefile("r") as lines, connection.makefile("w") as answers:
        for asked in lines:
            number, place, path, may_end_early = json.loads(asked)
            ImageFile.LOAD_TRUNCATED_IMAGES = may_end_early
            try:
                made = _decoded(path, places[place * place_bytes : (place + 1) * place_bytes])
            except Exception:  # noqa: BLE001 - the program meets it when it opens the file itself
                made = None
            print(json.dumps((number, made)), file=answers, flush=True)


def _decoded(path: str, place: memoryview) -> tuple[str, str, Any] | None:
    """Decode a file; its identity, its mode and its size, ``None``: not here."""
    from images import identity, is_small
    from PIL import Image
    from PIL.JpegImagePlugin import JpegImageFile

    with open(path, "rb") as file:
        image = JpegImageFile(file)
        key = identity(image)
        mapped = MAPPED.get(image.mode)
        if key is None or mapped is None or not is_small(image, len(place)):
            return None
        target = Image.frombuffer(mapped, image.size, place, "raw", mapped, 0, 1).im  # type: ignore[arg-type]
        image.load_prepare = lambda: setattr(image, "im", target)  # type: ignore[method-assign]
        image.load()
        return repr(key), image.mode, image.size


if __name__ == "__main__":
    to_program, shared, each, settled, *others = sys.argv[1:]
    main(int(to_program), int(shared), int(each), float(settled), *others)
