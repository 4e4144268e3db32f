"""Images of Pillow that are not decoded yet: what they will be made of."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import time
from collections.abc import Hashable
from typing import Any

from PIL import Image, ImageFile

SETTLED_S = 2.0
"""Age of the last change from which on a file's times tell another change from it: file systems
note them in steps of up to two seconds."""


def identity(image: Any) -> Hashable:
    """What an image that is not decoded yet will be made of; ``None``: not known."""
    if not {"load_prepare", "load_read", "load_end"}.isdisjoint(vars(image)):
        return None  # the program has its own for this image
    how = (
        *(image.mode, image.size, tuple(map(tuple, image.tile)), tuple(image.decoderconfig)),
        ImageFile.LOAD_TRUNCATED_IMAGES,
    )
    if type(image.fp) is io.BytesIO:
        with image.fp.getbuffer() as content:
            return (hashlib.blake2b(content, digest_size=16).digest(), how)
    if type(image.fp) is not io.BufferedReader or type(image.fp.raw) is not io.FileIO:
        return None
    status = os.fstat(image.fp.fileno())
    is_settled = time.time() - max(status.st_mtime, status.st_ctime) > SETTLED_S
    if not stat.S_ISREG(status.st_mode) or not is_settled:
        return None
    changed_ns = (status.st_mtime_ns, status.st_ctime_ns)
    return (status.st_dev, status.st_ino, status.st_size, changed_ns, how)


def finish(image: Any, pixels: Any) -> None:
    """Leave an image as Pillow does after it has decoded it."""
    image.im = pixels
    image.tile = []
    image.readonly = 0
    if image._exclusive_fp and image._close_exclusive_fp_after_loading:
        image.fp.close()
    image.fp = None


def path_of(image: Any) -> str | None:
    """Of the file that an image is read from; ``None``: it is none, or its path is not known."""
    path = getattr(image.fp, "name", None)
    return path if isinstance(path, str) else None


def is_small(image: Any, most_bytes: int) -> bool:
    """Whether its pixels, of four bytes, take no more than that, and Pillow would open it."""
    width, height = image.size
    most = Image.MAX_IMAGE_PIXELS
    return 4 * width * height <= most_bytes and (most is None or width * height <= most)
