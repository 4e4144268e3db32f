"""Decode JPEG images on all cores at once, or keep decoded images in memory."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from flatout import machine
from flatout.errors import RefusedError
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match
from flatout.knobs import loader

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "decode"


def match(facts: Facts) -> Match:
    """Offer the settings where the program opens images with Pillow and steps wait for data."""
    if facts.opens_images is False:
        return Match((), "the program's main process has not imported Pillow's JPEG plugin")
    if (why := loader.refusal(facts)) is not None:
        return Match((), why)
    settings = ("keep", "parallel") if _other_cores() else ("keep",)
    return Match(settings, share=facts.data_share)


def apply(host: Host, setting: str) -> Undo:
    """Replace the method by which Pillow decodes JPEG files.

    Raises:
        RefusedError: the program does not use Pillow, or there is no core to decode on.
    """
    if host.request.learn and "PIL.JpegImagePlugin" not in sys.modules:
        raise RefusedError("the program has opened no image with Pillow")
    try:
        from PIL.JpegImagePlugin import JpegImageFile
    except ImportError as error:
        raise RefusedError("Pillow is not installed") from error

    on_failure = host.applied.on_failure_of(NAME)
    # A comparison applies and undoes these repeatedly; what they have learned is kept.
    if setting == "keep":
        from flatout.knobs.decode.keep import DecodedImages

        images = host.keep(NAME, setting, lambda: DecodedImages(JpegImageFile, on_failure))
        return images.install()

    from flatout.knobs.decode.parallel import Decoders

    cores = _other_cores()
    if not cores:
        raise RefusedError("there is only one core, and the program itself needs it")
    decoders = host.keep(NAME, setting, lambda: Decoders(cores, JpegImageFile, on_failure))
    return decoders.install()


def _other_cores() -> int:
    """The cores that each rank on this machine has besides the one that its main thread uses."""
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(0, int(machine.usable_cores() / ranks) - 1)


KNOB = Knob(
    name=NAME,
    summary="decode JPEG images on all cores at once, or keep decoded images in memory",
    settings=("parallel", "keep"),
    exactness=dict.fromkeys(("parallel", "keep"), "bitwise"),
    hot=True,
    platforms=("cpu", "cuda", "xpu", "mps"),
    card=Card(
        what="The knob speeds up the decoding of JPEG files that the program opens with Pillow "
        "(`PIL.Image.open`, which `torchvision`'s `ImageFolder` uses). Random crops and "
        "flips stay as random as before. Pillow itself decodes other formats, and files "
        "inside archives.\n\n"
        "`parallel`: when a loader without workers fetches a batch, other processes "
        "decode the files that its samples will open. There is one process for each core "
        "that the program's main thread does not use. The program opens the files one "
        "after the other as before, and finds them already decoded. The knob finds these "
        "files in the dataset's list of paths, if it has one, or remembers them from the "
        "last epoch. The processes have imported only Pillow, and each of them decodes at "
        "most three images ahead.\n\n"
        "`keep`: decoded images are kept in memory, four bytes per pixel, up to a quarter "
        "of the memory that is available. If the program loads the same file again in the "
        "next epoch, its pixels are copied from memory. Each worker of a loader keeps the "
        "images that it has decoded itself, in its share of the memory, as long as the "
        "worker lives.\n\n"
        "A file counts as unchanged as long as its inode, its size and its times of last "
        "change are the same. A file that was changed in the last two seconds is decoded "
        "by Pillow. For `keep`, an image in memory (`io.BytesIO`) counts as unchanged as "
        "long as its bytes are the same.",
        helps="The knob helps steps that wait for a loader which decodes images: `parallel` "
        "with any number of files, `keep` from the second epoch on, if the decoded images "
        "fit into memory.",
        hurts="`parallel` slows down programs whose other threads already use the cores, and "
        "gains nothing for small images. `keep` slows down programs whose images do not "
        "fit into memory, because looking up an image that is not kept takes time. It "
        "gains nothing if the workers end with each epoch (without `persistent_workers`).",
        by_hand="Use `DataLoader(..., num_workers=N)`, which draws other random numbers and needs "
        "N copies of the program; or decode all files once before the training, and keep the "
        "images in a list or store them decoded (`numpy.save`) at the size that the training "
        "needs.",
        sources=(
            "https://pillow.readthedocs.io/en/stable/reference/ImageFile.html",
            "https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.ImageFolder.html",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("the decoding of images",),
    memory_settings=("keep",),
)
