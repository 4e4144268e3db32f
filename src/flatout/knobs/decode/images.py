"""Identify Pillow images that are not decoded yet, and finish them with decoded pixels."""

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
"""Once a file's last change is older than this, a later change is sure to change its times: file
systems record times in steps of up to two seconds."""


def identity(image: Any) -> Hashable:
    """A key of what an image will be decoded to: its content and how Pillow decodes it.

    ``None`` means that this is not known.
    """
    if not {"load_prepare", "load_read", "load_end"}.isdisjoint(vars(image)):
        return None  # the program has replaced these methods for this image
    decoding = (
        *(image.mode, image.size, tuple(map(tuple, image.tile)), tuple(image.decoderconfig)),
        ImageFile.LOAD_TRUNCATED_IMAGES,
    )
    if type(image.fp) is io.BytesIO:
        with image.fp.getbuffer() as content:
            return (hashlib.blake2b(content, digest_size=16).digest(), decoding)
    if type(image.fp) is not io.BufferedReader or type(image.fp.raw) is not io.FileIO:
        return None
    status = os.fstat(image.fp.fileno())
    is_settled = time.time() - max(status.st_mtime, status.st_ctime) > SETTLED_S
    if not stat.S_ISREG(status.st_mode) or not is_settled:
        return None
    changed_ns = (status.st_mtime_ns, status.st_ctime_ns)
    return (status.st_dev, status.st_ino, status.st_size, changed_ns, decoding)


def finish(image: Any, pixels: Any) -> None:
    """Give an image its decoded pixels, and leave it as Pillow does after decoding."""
    image.im = pixels
    image.tile = []
    image.readonly = 0
    if image._exclusive_fp and image._close_exclusive_fp_after_loading:
        image.fp.close()
    image.fp = None


def path_of(image: Any) -> str | None:
    """The path of the file that an image is read from; ``None`` if it is no file or not known."""
    path = getattr(image.fp, "name", None)
    return path if isinstance(path, str) else None


def is_small(image: Any, most_bytes: int) -> bool:
    """Whether the pixels, of four bytes each, fit into ``most_bytes``, and Pillow allows the
    size."""
    width, height = image.size
    most_pixels = Image.MAX_IMAGE_PIXELS
    is_allowed = most_pixels is None or width * height <= most_pixels
    return 4 * width * height <= most_bytes and is_allowed
