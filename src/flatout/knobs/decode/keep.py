"""Keep decoded images in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from typing import Any

from PIL import ImageFile
from torch.utils.data import get_worker_info

from flatout.intercept import handled_calls
from flatout.intercept.patch import Undo, wrap_function
from flatout.knobs.decode.images import finish, identity
from flatout.knobs.loader.cache import available_bytes


class DecodedImages:
    """Replaces ``PIL.ImageFile.ImageFile.load`` and copies the pixels of images decoded before.

    What a JPEG file decodes to depends on its bytes and on Pillow's settings. A file is identified
    by its device, inode, size and times of last change, and bytes in memory by their digest.

    Args:
        kind: the class of images that are kept, without its subclasses.
        on_failure: called with the exception if this fails; Pillow then decodes the image.
        budget_bytes: the memory for all images together; ``None``: this process's share of the
            available memory.
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
        self._creator_pid = os.getpid()
        self._pid: int | None = None
        self._images: dict[Hashable, Any] = {}

    def install(self) -> Undo:
        """Replace Pillow's method; returns the undo."""
        return wrap_function(ImageFile.ImageFile, "load", self._on_failure, self.load)

    def load(self, original: Callable[[Any], Any], image: Any) -> Any:
        """Decode an image with Pillow's method ``original``, or copy its pixels from memory."""
        if type(image) is not self._kind or not image.tile:
            return original(image)
        key = identity(image)
        if key in self._images:
            handled_calls.counts["decode"] += 1
            finish(image, self._images[key].copy())
            return original(image)
        access = original(image)
        if key is not None:
            self._keep(key, image.im)
        return access

    def _keep(self, key: Hashable, pixels: Any) -> None:
        if self._pid != os.getpid():  # a forked process has its parent's images and its own share
            self._pid = os.getpid()
            is_fork, budget = self._pid != self._creator_pid, self._budget_bytes
            self._left_bytes = _share_bytes(is_fork) if budget is None else budget
        width, height = pixels.size
        size_bytes = width * height * (1 if pixels.mode == "L" else 4)
        if size_bytes <= self._left_bytes:
            self._left_bytes -= size_bytes
            self._images[key] = pixels.copy()


def _share_bytes(is_fork: bool) -> int:
    """This process's share of the memory; workers and ranks keep images for themselves, too."""
    worker = get_worker_info()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if worker is not None:
        processes *= worker.num_workers
    elif is_fork:  # assume a pool with a process for each core
        processes *= os.cpu_count() or 1
    return available_bytes() // processes
