"""The knob ``decode=parallel``: the same samples, their images decoded by other processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageFile, JpegImagePlugin
from torch.utils.data import DataLoader, Dataset, Subset

from flatout import knobs
from flatout.errors import RefusedError
from flatout.intercept.host import Host
from flatout.knobs.decode import decoder, parallel
from flatout.knobs.decode import images as undecoded
from flatout.knobs.decode.foresight import Foresight
from flatout.knobs.decode.parallel import Decoders
from tests.hosts import host_in


class Folder(Dataset):
    """Images with a list of their paths, as in torchvision, and a random number each."""

    def __init__(self, samples: Sequence[Any]) -> None:
        self.samples = list(samples)

    def path(self, index: int) -> Any:
        entry = self.samples[index]
        return entry[0] if isinstance(entry, tuple) else entry

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        with open(self.path(index), "rb") as file:
            pixels = Image.open(file).convert("RGB").tobytes()
        return torch.cat([torch.frombuffer(bytearray(pixels), dtype=torch.uint8), noise()])


class Numbered(Dataset):
    """Images whose paths are made of their numbers."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        pixels = Image.open(f"{self.folder}/{index}.jpg").tobytes()
        return torch.cat([torch.frombuffer(bytearray(pixels), dtype=torch.uint8), noise()])


def noise() -> torch.Tensor:
    return torch.randint(256, (1,), dtype=torch.uint8)


def raising(error: Exception) -> None:
    raise error


def told_to(host: Host) -> Decoders:
    """Decoders whose failures a host is told."""
    kind = JpegImagePlugin.JpegImageFile
    return Decoders(1, kind, lambda error: host.applied.withdraw("decode", error))


@pytest.fixture(autouse=True)
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were written long ago."""
    monkeypatch.setattr(undecoded, "SETTLED_S", -1.0)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    made = []
    for number in range(24):
        made.append(tmp_path / f"{number}.jpg")
        image = Image.linear_gradient("L").resize((40, 30)).point(lambda v, n=number: v * n % 256)
        Image.merge("RGB", (image, image.transpose(Image.Transpose.ROTATE_180), image)).save(
            made[-1]
        )
    return made


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    made = Decoders(2, JpegImagePlugin.JpegImageFile, raising)
    yield made
    made._is_installed = False
    made._end_idle()


@pytest.fixture
def own_decodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that Pillow has decoded in this process."""
    decoded: list[str] = []
    own = ImageFile.ImageFile.load

    def load(image: Any) -> Any:
        if image.tile:
            decoded.append(image.fp.name)
        return own(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    return decoded


def epoch(dataset: Any, seed: int = 0, **options: Any) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return list(DataLoader(dataset, 8, shuffle=True, **options))


def same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def used(decoders: Decoders, dataset: Any) -> tuple[int, int]:
    known = decoders._datasets.get(dataset)
    assert known is not None
    return known.used, known.wasted


@pytest.mark.parametrize("labelled", [True, False])
def test_samples_are_the_same_and_others_have_decoded_them(
    paths: list[Path], decoders: Decoders, own_decodings: list[str], labelled: bool
) -> None:
    dataset = Folder([(str(path), 0) if labelled else path for path in paths])
    bare = [epoch(dataset, seed) for seed in range(3)]
    own_decodings.clear()
    undo = decoders.install()
    plan = [epoch(dataset, seed) for seed in range(3)]
    undo()
    assert all(map(same, bare, plan))
    hits, misses = used(decoders, dataset)
    assert not misses
    assert hits >= 8 * 7  # the first batch shows where the paths are, of each the first is its own
    assert len(own_decodings) < 3 * len(paths)


def test_paths_that_are_made_of_numbers_are_known_from_the_last_epoch(
    paths: list[Path], decoders: Decoders
) -> None:
    dataset = Numbered(paths[0].parent, len(paths))
    bare = [epoch(dataset, seed) for seed in range(2)]
    undo = decoders.install()
    first = epoch(dataset, 0)
    assert used(decoders, dataset) == (0, 0)
    second = epoch(dataset, 1)
    undo()
    assert same(bare[0], first)
    assert same(bare[1], second)
    assert used(decoders, dataset) == (3 * 7, 0)


def test_it_leaves_no_trace(paths: list[Path], decoders: Decoders) -> None:
    from torch.utils.data import dataloader

    own = ImageFile.ImageFile.load, dataloader._BaseDataLoaderIter._next_index
    undo = decoders.install()
    epoch(Folder(paths))
    undo()
    assert (ImageFile.ImageFile.load, dataloader._BaseDataLoaderIter._next_index) == own
    processes = [process._process for process in decoders._processes]
    assert processes
    decoders._end_idle()
    assert all(process.returncode is not None for process in processes)


def test_an_epoch_that_is_left_costs_nothing_later(paths: list[Path], decoders: Decoders) -> None:
    dataset = Folder(paths)
    bare = epoch(dataset, 1)
    undo = decoders.install()
    epoch(dataset)
    for _ in range(6):
        for _ in DataLoader(dataset, 8):
            break
    assert same(epoch(dataset, 1), bare)
    assert not decoders._by_path
    assert all(len(process.free_slots) == parallel.SLOTS for process in decoders._processes)
    undo()


def test_a_file_that_changes_meanwhile_is_decoded_again(
    paths: list[Path], decoders: Decoders
) -> None:
    class Rewriting(Folder):
        def __getitem__(self, index: int) -> torch.Tensor:
            if index == 3:
                for path in paths[4:]:
                    Image.new("RGB", (40, 30), (200, 100, 0)).save(path)
                    os.utime(path, ns=(0, 12345))
            return super().__getitem__(index)

    dataset = Rewriting(paths)
    undo = decoders.install()
    list(DataLoader(dataset, 3))
    found = next(iter(DataLoader(dataset, 8)))
    undo()
    assert all(abs(int(sample[0]) - 200) < 5 for sample in found[4:])


def test_how_the_program_decodes_counts(paths: list[Path], decoders: Decoders) -> None:
    class Draft(Folder):
        def __getitem__(self, index: int) -> torch.Tensor:
            with Image.open(self.samples[index]) as image:
                image.draft("L", (20, 15))
                return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)

    dataset = Draft(paths)
    bare = epoch(dataset)
    undo = decoders.install()
    assert same(epoch(dataset), bare)
    undo()
    assert used(decoders, dataset)[0] == 0


def test_what_is_never_of_use_is_given_up(
    paths: list[Path], decoders: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "JUDGED_AFTER", 8)
    dataset = Folder(paths)
    undo = decoders.install()
    epoch(dataset)
    known = decoders._datasets.get(dataset)
    assert known is not None
    known.used, known.wasted = 0, 8
    epoch(dataset)
    assert (known.used, known.wasted) == (0, 8)
    assert not decoders._by_path
    undo()


def test_a_broken_file_is_the_programs_error(paths: list[Path], decoders: Decoders) -> None:
    paths[13].write_bytes(paths[13].read_bytes()[:-100])
    undo = decoders.install()
    with pytest.raises(OSError, match="truncated"):
        list(DataLoader(Folder(paths), 8))
    undo()


def test_grey_images_and_others(paths: list[Path], decoders: Decoders) -> None:
    class Modes(Folder):
        def __getitem__(self, index: int) -> torch.Tensor:
            image = Image.open(self.samples[index])
            data = image.tobytes()
            return torch.tensor([len(data), sum(data)])

    for number, path in enumerate(paths):
        with Image.open(path) as image:
            image.convert(("L", "CMYK", "RGB")[number % 3]).save(path)
    dataset = Modes(paths)
    bare = epoch(dataset)
    undo = decoders.install()
    assert same(epoch(dataset), bare)
    undo()
    assert used(decoders, dataset) == (2 * 7, 0)


def test_images_that_are_too_large_for_a_slot(
    paths: list[Path], decoders: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "SLOT_BYTES", 4096)
    dataset = Folder(paths)
    bare = epoch(dataset)
    undo = decoders.install()
    assert same(epoch(dataset), bare)
    undo()


@pytest.mark.parametrize("trouble", ["it is killed", "it does not answer"])
def test_a_process_in_trouble_is_given_up_and_the_images_are_there(
    trouble: str, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_killed = trouble == "it is killed"
    if not is_killed:
        monkeypatch.setattr(parallel, "STALLED_S", 0.0)
    host = host_in(tmp_path)
    decoders = told_to(host)
    dataset = Folder(paths)
    bare = [epoch(dataset, seed) for seed in range(2)]
    undo = decoders.install()
    assert same(epoch(dataset, 0), bare[0])
    if is_killed:
        os.kill(decoders._processes[0]._process.pid, signal.SIGKILL)
    assert same(epoch(dataset, 1), bare[1])
    undo()
    assert list(host.applied.failures) == ["decode"]


def test_a_process_that_cannot_be_started_is_no_error_of_the_programs(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    host = host_in(tmp_path)
    decoders = told_to(host)
    undo = decoders.install()
    assert len(epoch(Folder(paths))) == 3
    undo()
    assert list(host.applied.failures) == ["decode"]


def test_a_fork_that_lives_on_does_not_keep_processes(
    paths: list[Path], decoders: Decoders
) -> None:
    undo = decoders.install()
    epoch(Folder(paths))
    waiting, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(told)
        os.read(waiting, 1)
        os._exit(0)
    undo()
    decoders._end_idle()
    assert not decoders._processes
    os.close(told)
    os.close(waiting)
    os.waitpid(pid, 0)


def test_files_that_may_end_early(
    paths: list[Path], decoders: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    paths[13].write_bytes(paths[13].read_bytes()[:-100])
    dataset = Folder(paths)
    bare = epoch(dataset)
    undo = decoders.install()
    assert same(epoch(dataset), bare)
    undo()
    assert used(decoders, dataset) == (2 * 7, 0)


def test_numbers_that_are_no_places_in_a_list(paths: list[Path], decoders: Decoders) -> None:
    class Keyed(Folder):
        def __getitem__(self, index: int) -> torch.Tensor:
            return super().__getitem__(index % 100)

        def __len__(self) -> int:
            raise NotImplementedError

    dataset = Keyed(paths)
    keys = [100 * number + number for number in range(24)]
    undo = decoders.install()
    torch.manual_seed(0)
    first = list(DataLoader(dataset, 8, sampler=keys))
    torch.manual_seed(0)
    second = list(DataLoader(dataset, 8, sampler=keys))
    undo()
    assert same(first, second)
    assert used(decoders, dataset) == (3 * 7, 0)  # remembered, one by one


def test_a_method_that_the_program_has_wrapped_is_not_called_by_itself(
    paths: list[Path], decoders: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    undo = decoders.install()
    wrapped = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: wrapped(image))
    undo()
    undo = decoders.install()
    assert len(epoch(Folder(paths))) == 3
    undo()


def test_a_fork_decodes_for_itself(paths: list[Path], decoders: Decoders) -> None:
    dataset = Folder(paths)
    bare = epoch(dataset, 1)
    undo = decoders.install()
    epoch(dataset)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if same(epoch(dataset, 1), bare) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert same(epoch(dataset, 1), bare)
    undo()


class Equal(Folder):
    """Says that it is like any other, and asks what is asked of it."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def test_datasets_are_told_apart_by_what_they_are(paths: list[Path], decoders: Decoders) -> None:
    one, other = Equal(paths[:6]), Equal(paths[6:])
    bare = [epoch(dataset, seed) for seed in range(2) for dataset in (one, other)]
    undo = decoders.install()
    found = [epoch(dataset, seed) for seed in range(2) for dataset in (one, other)]
    undo()
    assert all(map(same, found, bare))
    assert len(decoders._datasets) == 2


def test_a_dataset_is_not_asked_for_its_length(paths: list[Path], decoders: Decoders) -> None:
    class Long(Folder):
        asked = 0

        def __len__(self) -> int:
            Long.asked += 1
            return super().__len__()

    epoch(Long(paths), 0)
    bare, Long.asked = Long.asked, 0
    undo = decoders.install()
    epoch(Long(paths), 0)
    undo()
    assert Long.asked == bare


def test_with_workers_and_with_processes_that_fetch_ahead(
    paths: list[Path], decoders: Decoders
) -> None:
    class Calm(Folder):
        def __getitem__(self, index: int) -> torch.Tensor:
            return super().__getitem__(index)[:-1]

    dataset = Calm(paths)
    bare = [epoch(dataset, seed) for seed in range(3)]
    undo = decoders.install()
    assert same(epoch(dataset, 0, num_workers=2), bare[0])
    prefetch = knobs.get("loader").apply(host_in(paths[0].parent), "prefetch")
    assert same(epoch(dataset, 1), bare[1])
    assert same(epoch(dataset, 2), bare[2])
    prefetch()
    undo()


def test_it_is_refused_on_one_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatout.machine.usable_cores", lambda: 1.0)
    with pytest.raises(RefusedError, match="one core"):
        knobs.get("decode").apply(host_in(tmp_path), "parallel")


# Foresight


def entries(kind: str, names: Sequence[str]) -> list[Any]:
    ways: dict[str, Callable[[str], Any]] = {
        "path": lambda name: Path("/data") / name,
        "name": lambda name: name,
        "pair": lambda name: (f"/data/{name}", 3),
        "mapping": lambda name: {"label": "data", "file": name},
    }
    return [ways[kind](name) for name in names]


@pytest.mark.parametrize("kind", ["path", "name", "pair", "mapping"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_lists_of_paths_are_found(kind: str, wrapped: bool) -> None:
    names = [f"{number}.jpg" for number in range(10)]
    dataset: Any = Folder(entries(kind, names))
    dataset.labels = ["cat.jpg"] * 10
    if wrapped:
        dataset = Subset(Subset(dataset, range(9, -1, -1)), [0, 2, 4])
    foresight = Foresight(dataset)
    assert foresight.files([1]) == []
    foresight.learn(
        [0, 2], ["/data/9.jpg", "/data/5.jpg"] if wrapped else ["/data/0.jpg", "/data/2.jpg"]
    )
    assert foresight.files([1, 2]) == (
        ["/data/7.jpg", "/data/5.jpg"] if wrapped else ["/data/1.jpg", "/data/2.jpg"]
    )


def test_two_files_for_a_sample() -> None:
    dataset = Folder([f"images/{number}.jpg" for number in range(4)])
    dataset.masks = [f"masks/{number}.jpg" for number in range(4)]  # type: ignore[attr-defined]
    foresight = Foresight(dataset)
    foresight.learn([2, 1], ["images/2.jpg", "masks/2.jpg", "images/1.jpg", "masks/1.jpg"])
    assert foresight.files([0]) == ["images/0.jpg", "masks/0.jpg"]


def test_a_dataset_is_not_kept_alive() -> None:
    dataset = Folder(["a.jpg"])
    foresight = Foresight(dataset)
    del dataset
    foresight.learn([0], ["a.jpg"])
    assert foresight.files([0]) == ["a.jpg"]


def test_a_sample_that_opens_no_file_or_another_number_of_them_teaches_nothing() -> None:
    foresight = Foresight(Numbered(Path(), 4))
    foresight.learn([0, 1], ["x.jpg"])
    foresight.learn([0, 1], [])
    foresight.learn([], ["x.jpg"])
    assert foresight.files([0, 1]) == []


def test_pillow_can_decode_into_foreign_memory() -> None:
    """What ``decoder.py`` relies on."""
    for mode, mapped in decoder.MAPPED.items():
        memory = bytearray(4 * 6)
        image = Image.frombuffer(mapped, (3, 2), memory, "raw", mapped, 0, 1)
        memory[0] = 77
        first = image.getpixel((0, 0))
        assert (first if mode == "L" else first[0]) == 77
