"""The decoding of JPEG images: by all cores at once, or once and for all."""

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
    """Needs a program that opens images while its steps wait."""
    if facts.opens_images is False:
        return Match((), "it opens no images by Pillow in its main process")
    if (why := loader.refusal(facts)) is not None:
        return Match((), why)
    settings = ("keep", "parallel") if _other_cores() else ("keep",)
    return Match(settings, share=facts.data_share)


def apply(host: Host, setting: str) -> Undo:
    """Take the place of the method by which Pillow decodes, for JPEG files."""
    if host.request.learn and "PIL.JpegImagePlugin" not in sys.modules:
        raise RefusedError("the program has opened no image by Pillow")
    try:
        from PIL.JpegImagePlugin import JpegImageFile
    except ImportError as error:
        raise RefusedError("the program has no Pillow to decode images with") from error

    on_failure = host.applied.on_failure_of(NAME)
    # A comparison turns these on and off: each time, they go on from what they know.
    if setting == "keep":
        from flatout.knobs.decode.keep import DecodedImages

        images = host.keep(NAME, setting, lambda: DecodedImages(JpegImageFile, on_failure))
        return images.install()

    from flatout.knobs.decode.parallel import Decoders

    cores = _other_cores()
    if not cores:
        raise RefusedError("there is one core, and the program's own thread is on it")
    decoders = host.keep(NAME, setting, lambda: Decoders(cores, JpegImageFile, on_failure))
    return decoders.install()


def _other_cores() -> int:
    """Cores besides the one of the program's own thread, for each of its ranks here."""
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(0, int(machine.usable_cores() / ranks) - 1)


KNOB = Knob(
    name=NAME,
    summary="JPEG images decoded by all cores at once, or kept in memory once they are decoded",
    settings=("parallel", "keep"),
    exactness=dict.fromkeys(("parallel", "keep"), "bitwise"),
    hot=True,
    platforms=("cpu", "cuda", "xpu", "mps"),
    card=Card(
        what="For JPEG files that are opened by Pillow (`PIL.Image.open`, which `torchvision`'s "
        "`ImageFolder` uses). Random crops and flips are the program's, and as random as before. "
        "Other formats, and files within archives, are decoded as ever.\n\n"
        "`parallel`: when a loader without workers fetches a batch, other processes decode the "
        "files that its samples will open, one process for each core besides the program's own; "
        "the program opens them as ever, one after the other, and finds them decoded. Which files "
        "these are is read from the dataset, where it has a list of paths, or remembered from the "
        "last epoch. A process knows nothing but Pillow and the images that it has decoded, and is "
        "at most three of them ahead.\n\n"
        "`keep`: what a file was decoded to is kept in memory, four bytes a pixel, up to a quarter "
        "of what is available; when the same file is loaded again, in the next epoch, its pixels "
        "are a copy of those. Each worker of a loader keeps what it has decoded itself, in its "
        "share of the memory, as long as it lives.\n\n"
        "For both, a file is the same while its inode, size and times of last change are (one that "
        "has changed within two seconds is decoded as ever); for `keep`, an image in memory "
        "(`io.BytesIO`) while its bytes are.",
        helps="Steps that wait for a loader which decodes images: `parallel` with any number of "
        "files, `keep` from the second epoch on, if they fit into memory once they are decoded.",
        hurts="`parallel`: a program whose other threads have the cores already; small images. "
        "`keep`: larger sets of images, as those that do not fit are decoded as ever, at the cost "
        "of looking them up; workers that end with each epoch (without `persistent_workers`).",
        by_hand="`DataLoader(..., num_workers=N)`, with other random numbers and N copies of the "
        "program; or decode all files once before the training, and keep the images in a list, or "
        "store them decoded (`numpy.save`) at the size that the training needs.",
        sources=(
            "https://pillow.readthedocs.io/en/stable/reference/ImageFile.html",
            "https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.ImageFolder.html",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("the decoding of images",),
)
