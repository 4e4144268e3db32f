"""Decoded images, kept in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from typing import Any

from PIL import ImageFile
from torch.utils.data import get_worker_info

from flatout.intercept import engagement
from flatout.intercept.patch import Undo, wrap_function
from flatout.knobs.decode.images import finish, identity
from flatout.knobs.loader.cache import available_bytes


class DecodedImages:
    """Stands in for ``PIL.ImageFile.ImageFile.load``.

    What a JPEG file decodes to depends on its bytes and on how Pillow was told to decode them. A
    file is known by its device, inode, size and times of last change, bytes in memory by their
    digest.

    Args:
        kind: the class whose images are kept, no class derived from it.
        on_failure: called when something here failed; the image is decoded as ever.
        budget_bytes: for all images together; ``None``: what may be used in the process.
    """

    def __init__(
        self,
        kind: type[Any],
        on_failure: Callable[[Exception], None],
        budget_bytes: int | None = None,
    ) -> None:
        self._kind = kind
        self._on_failure = on_failure
        self._budget_bytes = budget_bytes
        self._left_bytes = 0
        self._made_by = os.getpid()
        self._pid: int | None = None
        self._images: dict[Hashable, Any] = {}

    def install(self) -> Undo:
        """Take the place of Pillow's method; returns what ends that."""
        return wrap_function(ImageFile.ImageFile, "load", self._on_failure, self.load)

    def load(self, own: Callable[[Any], Any], image: Any) -> Any:
        """Decode an image by Pillow's method ``own``, or take its pixels from memory."""
        if type(image) is not self._kind or not image.tile:
            return own(image)
        key = identity(image)
        if key in self._images:
            engagement.calls["decode"] += 1
            finish(image, self._images[key].copy())
            return own(image)
        access = own(image)
        if key is not None:
            self._keep(key, image.im)
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


def _share_bytes(is_fork: bool) -> int:
    """What this process may use: each keeps images for itself, workers and ranks too."""
    worker = get_worker_info()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if worker is not None:
        processes *= worker.num_workers
    elif is_fork:  # one of a pool, of as many as there may be
        processes *= os.cpu_count() or 1
    return available_bytes() // processes
