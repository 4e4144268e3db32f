"""Decoded JPEG images, kept in memory."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import sys
import time
import weakref
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from flatout.knobs import Card, Facts, Knob, Match, RefusedError, Undo, loader

if TYPE_CHECKING:
    from flatout.agent.session import Session

NAME = "decode"

SETTLED_S = 2.0
"""Age of the last change from which on a file's times tell another change from it: file systems
note them in steps of up to two seconds."""


def match(facts: Facts) -> Match:
    """Needs a program that opens images while its steps wait."""
    if facts.opens_images is False:
        return Match((), "it opens no images by Pillow in its main process")
    if (why := loader.refusal(facts)) is not None:
        return Match((), why)
    return Match(("keep",), share=facts.data_share)


_kept: weakref.WeakKeyDictionary[Session, DecodedImages] = weakref.WeakKeyDictionary()


def apply(session: Session, setting: str) -> Undo:
    """Take the place of the method by which Pillow decodes, for JPEG files."""
    from flatout.agent.place import take_place

    if session.request.learn and "PIL.JpegImagePlugin" not in sys.modules:
        raise RefusedError("the program has opened no image by Pillow")
    try:
        from PIL import ImageFile, JpegImagePlugin
    except ImportError as error:
        raise RefusedError("the program has no Pillow to decode images with") from error

    # A comparison turns this on and off: each time, it goes on from what it knows.
    if session not in _kept:
        _kept[session] = DecodedImages(
            ImageFile.ImageFile.load,
            JpegImagePlugin.JpegImageFile,
            lambda error: session.contain(NAME, error),
        )
    images = _kept[session]
    images.own = ImageFile.ImageFile.load
    return take_place(ImageFile.ImageFile, "load", lambda image: images.load(image))


class DecodedImages:
    """Stands in for ``PIL.ImageFile.ImageFile.load``.

    What a JPEG file decodes to depends on its bytes and on how Pillow was told to decode them. A
    file is known by its device, inode, size and times of last change, bytes in memory by their
    digest.

    Args:
        own: Pillow's method.
        kind: the class whose images are kept, no class derived from it.
        on_failure: called when something here failed; the image is decoded as ever.
        budget_bytes: for all images together; ``None``: what may be used in the process.

    Attributes:
        own: Pillow's method.
    """

    def __init__(
        self,
        own: Callable[[Any], Any],
        kind: type[Any],
        on_failure: Callable[[Exception], None],
        budget_bytes: int | None = None,
    ) -> None:
        self.own = own
        self._kind = kind
        self._on_failure = on_failure
        self._budget_bytes = budget_bytes
        self._left_bytes = 0
        self._made_by = os.getpid()
        self._pid: int | None = None
        self._images: dict[Hashable, Any] = {}

    def load(self, image: Any) -> Any:
        """Decode an image, or take its pixels from memory."""
        if type(image) is not self._kind or not image.tile:
            return self.own(image)
        key = None
        try:
            known = identity(image)
            if known in self._images:
                _finish(image, self._images[known].copy())
            else:
                key = known
        except Exception as error:  # noqa: BLE001 - reported
            self._on_failure(error)
        access = self.own(image)
        if key is not None:
            try:
                self._keep(key, image.im)
            except Exception as error:  # noqa: BLE001 - reported
                self._on_failure(error)
        return access

    def _keep(self, key: Hashable, pixels: Any) -> None:
        if self._pid != os.getpid():  # a fork has the images of its parent, and a share of its own
            self._pid = os.getpid()
            is_fork, budget = self._pid != self._made_by, self._budget_bytes
            self._left_bytes = _share_bytes(is_fork) if budget is None else budget
        width, height = pixels.size
        size_bytes = width * height * (1 if pixels.mode == "L" else 4)
        if size_bytes <= self._left_bytes:
            self._left_bytes -= size_bytes
            self._images[key] = pixels.copy()


def identity(image: Any) -> Hashable:
    """What an image that is not decoded yet will be made of; ``None``: not known."""
    from PIL import ImageFile

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


def _finish(image: Any, pixels: Any) -> None:
    """Leave an image as Pillow does after it has decoded it."""
    image.im = pixels
    image.tile = []
    image.readonly = 0
    if image._exclusive_fp and image._close_exclusive_fp_after_loading:
        image.fp.close()
    image.fp = None


def _share_bytes(is_fork: bool) -> int:
    """What this process may use: each keeps images for itself, workers and ranks too."""
    from torch.utils.data import get_worker_info

    from flatout.knobs.loader.cache import available_bytes

    worker = get_worker_info()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if worker is not None:
        processes *= worker.num_workers
    elif is_fork:  # one of a pool, of as many as there may be
        processes *= os.cpu_count() or 1
    return available_bytes() // processes


KNOB = Knob(
    name=NAME,
    summary="decoded JPEG images kept in memory",
    settings=("keep",),
    exactness={"keep": "bitwise"},
    hot=True,
    platforms=("cpu", "cuda", "xpu", "mps"),
    card=Card(
        what="What a JPEG file was decoded to by Pillow (`PIL.Image.open`, which `torchvision`'s "
        "`ImageFolder` uses) is kept in memory, four bytes a pixel, up to a quarter of what is "
        "available; when the same file is loaded again, in the next epoch, its pixels are a "
        "copy of those. A file is the same while its inode, size and times of last change are (one "
        "that has changed within two seconds is decoded), an "
        "image in memory (`io.BytesIO`) while its bytes are. Random crops and flips are the "
        "program's, and as random as before. Other formats, and files within archives, are "
        "decoded as ever. Each worker of a loader keeps what it has decoded itself, "
        "in its share of the memory, as long as it lives.",
        helps="Training for several epochs on images that fit into memory once they are decoded, "
        "while the steps wait for the loader. A trial sees the gain from its second epoch on.",
        hurts="Larger sets of images: those that do not fit are decoded as ever, at the cost of "
        "looking them up. Workers that end with each epoch (without `persistent_workers`) keep "
        "images for nothing.",
        by_hand="Decode all files once before the training, and keep the images in a list, or "
        "store them decoded (`numpy.save`) at the size that the training needs.",
        sources=(
            "https://pillow.readthedocs.io/en/stable/reference/ImageFile.html",
            "https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.ImageFolder.html",
        ),
    ),
    match=match,
    apply=apply,
    claims=("the decoding of images",),
)
