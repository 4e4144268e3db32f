"""The knob ``decode``: the same pixels, decoded once."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFile, JpegImagePlugin

from flatout import knobs, machine
from flatout.errors import RefusedError
from flatout.knob import Facts
from flatout.knobs import decode
from flatout.knobs.decode import images as undecoded
from flatout.knobs.decode import keep
from flatout.knobs.decode.keep import DecodedImages
from flatout.wire.request import Request
from tests.hosts import host_in


class Counted:
    """Pillow's way of decoding, and for how many images it was taken."""

    def __init__(self) -> None:
        self.own: Callable[[Any], Any] = ImageFile.ImageFile.load
        self.decoded = 0

    def __call__(self, image: Any) -> Any:
        self.decoded += bool(image.tile)
        return self.own(image)


def raising(error: Exception) -> None:
    raise error


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.fixture
def images(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> DecodedImages:
    return kept(counted, monkeypatch, 1 << 20)


def kept(
    counted: Counted, monkeypatch: pytest.MonkeyPatch, budget_bytes: int | None
) -> DecodedImages:
    """Images that are kept from now on, those that are decoded counted."""
    made = DecodedImages(JpegImagePlugin.JpegImageFile, raising, budget_bytes)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: made.load(counted, image))
    return made


@pytest.fixture(autouse=True)
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were written long ago."""
    monkeypatch.setattr(undecoded, "SETTLED_S", -1.0)


def draw(path: Path | io.BytesIO, shade: int = 100, **options: Any) -> Any:
    image = Image.linear_gradient("L").resize((40, 30))
    Image.merge("RGB", (image, image, image.point(lambda v: (v + shade) % 256))).save(
        path, options.pop("format", "JPEG"), **options
    )
    return path


def test_the_second_time_pixels_come_from_memory(
    tmp_path: Path, counted: Counted, images: DecodedImages
) -> None:
    path = draw(tmp_path / "a.jpg")
    with Image.open(path) as image:
        first = image.convert("RGB")
    with Image.open(path) as image:
        second = image.convert("RGB")
        assert image.fp is None
    with path.open("rb") as file:  # as torchvision's ImageFolder does
        third = Image.open(file).convert("RGB")
    assert first.tobytes() == second.tobytes() == third.tobytes()
    assert counted.decoded == 1


def test_a_program_may_paint_on_what_it_has_loaded(
    tmp_path: Path, counted: Counted, images: DecodedImages
) -> None:
    path = draw(tmp_path / "a.jpg")
    for _ in range(3):
        image = Image.open(path)
        access = image.load()
        assert access[5, 5] != (1, 2, 3)
        access[5, 5] = (1, 2, 3)
        image.paste((0, 0, 0), (0, 0, 5, 5))
    assert counted.decoded == 1


def test_a_file_that_was_written_again_is_decoded_again(
    tmp_path: Path, counted: Counted, images: DecodedImages
) -> None:
    path = draw(tmp_path / "a.jpg")
    before = Image.open(path).convert("RGB").tobytes()
    draw(path, shade=30)
    os.utime(path, ns=(0, 12345))
    assert Image.open(path).convert("RGB").tobytes() != before
    assert counted.decoded == 2


def test_a_file_that_was_written_just_now_is_not_kept(
    tmp_path: Path, counted: Counted, images: DecodedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could be written again without another time of last change."""
    monkeypatch.setattr(undecoded, "SETTLED_S", 3600.0)
    path = draw(tmp_path / "a.jpg")
    for _ in range(2):
        Image.open(path).load()
    assert counted.decoded == 2


def test_whether_files_may_end_early_counts(
    tmp_path: Path, counted: Counted, images: DecodedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = draw(tmp_path / "a.jpg", quality=95)
    path.write_bytes(path.read_bytes()[:-200])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for _ in range(2):
        Image.open(path).load()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    with pytest.raises(OSError, match="truncated"):
        Image.open(path).load()


def test_a_fork_has_a_share_of_its_own(
    tmp_path: Path, counted: Counted, images: DecodedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 5)
    kept(counted, monkeypatch, None)
    asked: list[bool] = []
    monkeypatch.setattr(keep, "_share_bytes", lambda is_fork: asked.append(is_fork) or 0)
    for pid in (5, 5, 6):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        Image.open(draw(tmp_path / "a.jpg")).load()
    assert asked == [False, True]


def test_how_it_is_to_be_decoded_counts(
    tmp_path: Path, counted: Counted, images: DecodedImages
) -> None:
    path = draw(tmp_path / "a.jpg")
    Image.open(path).load()
    for mode, size in (("L", (40, 30)), ("RGB", (20, 15))):
        image = Image.open(path)
        image.draft(mode, size)
        image.load()
    assert image.size == (20, 15)
    assert counted.decoded == 3


def test_bytes_in_memory_are_known_by_their_content(
    counted: Counted, images: DecodedImages
) -> None:
    one, other = (draw(io.BytesIO(), shade).getvalue() for shade in (100, 30))
    first, again, last = (Image.open(io.BytesIO(b)).tobytes() for b in (one, one, other))
    assert first == again != last
    assert counted.decoded == 2


def test_other_formats_are_decoded_as_ever(
    tmp_path: Path, counted: Counted, images: DecodedImages
) -> None:
    path = draw(tmp_path / "a.png", format="PNG")
    for _ in range(2):
        Image.open(path).load()
    assert counted.decoded == 2


def test_an_image_that_the_program_reads_in_its_own_way(
    tmp_path: Path, counted: Counted, images: DecodedImages
) -> None:
    path = draw(tmp_path / "a.jpg")
    ended = []
    for _ in range(3):
        image = Image.open(path)
        image.load_end = lambda: ended.append(1)
        image.load()
    assert len(ended) == counted.decoded == 3


def test_the_budget_is_kept(
    tmp_path: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(counted, monkeypatch, 3 * 40 * 30 * 4)
    paths = [draw(tmp_path / f"{number}.jpg", number) for number in range(5)]
    for path in 2 * paths:
        Image.open(path).load()
    assert counted.decoded == 5 + 2


def test_a_broken_file_is_the_programs_error(
    tmp_path: Path, counted: Counted, images: DecodedImages
) -> None:
    path = draw(tmp_path / "a.jpg", quality=95)
    path.write_bytes(path.read_bytes()[:-200])
    for _ in range(2):
        with pytest.raises(OSError, match="truncated"):
            Image.open(path).load()


def test_a_failure_of_ours_is_reported_and_the_image_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = host_in(tmp_path)
    path = draw(tmp_path / "a.jpg")
    bare = Image.open(path).convert("RGB").tobytes()
    undo = knobs.get("decode").apply(host, "keep")
    monkeypatch.setattr(undecoded, "os", None)
    assert Image.open(path).convert("RGB").tobytes() == bare
    undo()
    assert list(host.applied.failures) == ["decode"]


def test_what_is_known_stays_when_it_is_turned_off_and_on(
    tmp_path: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: counted(image))
    host = host_in(tmp_path)
    path = draw(tmp_path / "a.jpg")
    for _ in range(2):
        undo = knobs.get("decode").apply(host, "keep")
        Image.open(path).load()
        undo()
    assert counted.decoded == 1
    Image.open(path).load()
    assert counted.decoded == 2


def test_it_is_tried_where_images_are_decoded_and_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = Facts("cpu", data_share=0.4, opens_images=True)
    monkeypatch.setattr(machine, "usable_cores", lambda: 2.0)
    assert decode.match(known).settings == ("keep", "parallel")
    assert not decode.match(dataclasses.replace(known, opens_images=False)).settings
    assert not decode.match(dataclasses.replace(known, data_share=0.001)).settings
    monkeypatch.setattr(machine, "usable_cores", lambda: 1.5)
    assert decode.match(known).settings == ("keep",)


def test_a_run_that_learns_does_not_try_it_where_no_image_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = host_in(tmp_path, Request(learn=True))
    knobs.get("decode").apply(host, "keep")()
    monkeypatch.delitem(sys.modules, "PIL.JpegImagePlugin")
    with pytest.raises(RefusedError, match="no image"):
        knobs.get("decode").apply(host, "keep")
