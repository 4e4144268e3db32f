"""A process that decodes JPEG files into memory that it shares with the program.

It is started as a script, without flatout and torch. It reads requests from a socket, one JSON line
each: the number of the request, a slot in the shared memory, the path of a file, and whether
truncated files are allowed. It answers each with a line: the number, and what is now in the slot.
It ends when the program closes the socket or ends.
"""

from __future__ import annotations

import json
import mmap
import signal
import socket
import sys
from typing import Any

MAPPED = {"RGB": "RGBX", "L": "L", "CMYK": "CMYK"}
"""For each mode of JPEG images, the mode of the same layout for which Pillow can use shared
memory."""


def main(line: int, memory: int, slot_bytes: int, settled_s: float, *folders: str) -> None:
    """Answer requests until the program closes the socket.

    Args:
        line: the file descriptor of a socket to the program.
        memory: the file descriptor of the shared memory.
        slot_bytes: the size of each slot in it.
        settled_s: see ``images.SETTLED_S``.
        folders: the folders that contain ``images.py`` and Pillow.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program decides what ends it
    sys.path[:0] = folders
    import images  # type: ignore[import-not-found]
    from PIL import ImageFile

    images.SETTLED_S = settled_s
    slots = memoryview(mmap.mmap(memory, 0))
    # Two files, because one text file would lose what it has read ahead when it is written to.
    connection = socket.socket(fileno=line)
    with connection, connection.makefile("r") as lines, connection.makefile("w") as answers:
        for line_read in lines:
            number, slot, path, allow_truncated = json.loads(line_read)
            ImageFile.LOAD_TRUNCATED_IMAGES = allow_truncated
            try:
                result = _decode(path, slots[slot * slot_bytes : (slot + 1) * slot_bytes])
            except Exception:  # noqa: BLE001 - the program gets it when it opens the file itself
                result = None
            print(json.dumps((number, result)), file=answers, flush=True)


def _decode(path: str, slot: memoryview) -> tuple[str, str, Any] | None:
    """Decode a file into a slot; returns its identity, mode and size.

    ``None`` means that the file cannot be decoded into a slot.
    """
    from images import identity, is_small
    from PIL import Image
    from PIL.JpegImagePlugin import JpegImageFile

    with open(path, "rb") as file:
        image = JpegImageFile(file)
        key = identity(image)
        mapped = MAPPED.get(image.mode)
        if key is None or mapped is None or not is_small(image, len(slot)):
            return None
        target = Image.frombuffer(mapped, image.size, slot, "raw", mapped, 0, 1).im  # type: ignore[arg-type]
        image.load_prepare = lambda: setattr(image, "im", target)  # type: ignore[method-assign]
        image.load()
        return repr(key), image.mode, image.size


if __name__ == "__main__":
    socket_fd, memory_fd, size, settled, *paths = sys.argv[1:]
    main(int(socket_fd), int(memory_fd), int(size), float(settled), *paths)
