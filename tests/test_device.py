"""Which accelerator there is: torch built for one, on machines of every kind."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flatout.intercept import device
from flatout.machine import probe

CUDA = torch.device("cuda")


class FakeDriver:
    """``libcuda``: of one version of CUDA."""

    def __init__(self, version: int) -> None:
        self.version = version

    def cuDriverGetVersion(self, place: Any) -> int:  # noqa: N802 - NVIDIA's name
        place._obj.value = self.version
        return 0


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A torch built for CUDA 13.0; the list has each question that keeps children from CUDA."""
    poisons: list[str] = []

    def poison() -> bool:
        poisons.append("is_available")
        return False

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: CUDA)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", poison)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    device._driver_serves.cache_clear()
    yield poisons
    device._driver_serves.cache_clear()


def with_driver(monkeypatch: pytest.MonkeyPatch, version: int | None) -> None:
    def load(name: str) -> FakeDriver:
        assert "cuda" in name
        if version is None:
            raise OSError(f"{name}: cannot open shared object file")
        return FakeDriver(version)

    monkeypatch.setattr(ctypes, "CDLL", load)


@pytest.mark.parametrize(
    ("version", "devices", "found"),
    [
        pytest.param(None, 0, None, id="no driver"),
        pytest.param(12040, 1, None, id="a driver that is too old"),
        pytest.param(13000, 0, None, id="no visible device"),
        pytest.param(13000, 1, CUDA, id="a device"),
        pytest.param(14010, 2, CUDA, id="a newer driver"),
    ],
)
def test_an_accelerator_counts_where_it_can_be_used(
    monkeypatch: pytest.MonkeyPatch,
    asked: list[str],
    version: int | None,
    devices: int,
    found: torch.device | None,
) -> None:
    with_driver(monkeypatch, version)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    assert device.accelerator() == found
    assert device.has_cuda() == (found is not None)
    assert device.accelerator_in_use() is None
    assert asked == []  # forked children of the program may still use CUDA


def test_one_that_the_program_uses_counts_whatever_else_is_known(
    monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    with_driver(monkeypatch, None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert device.accelerator() == device.accelerator_in_use() == CUDA


def test_the_child_of_a_process_that_used_it_has_none(
    monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    with_driver(monkeypatch, 13000)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    assert device.accelerator() is None


def test_a_build_for_rocm_asks_no_driver_of_nvidia(
    monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    with_driver(monkeypatch, None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert device.accelerator() == CUDA


def test_one_that_does_not_tell_whether_it_is_used_counts_if_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mps = SimpleNamespace(type="mps")
    answers = itertools.cycle([True, False])
    backend = SimpleNamespace(is_available=lambda: next(answers))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: mps)
    monkeypatch.setattr(torch, "get_device_module", lambda _: backend)
    assert device.accelerator() is mps
    assert device.accelerator_in_use() is None


@pytest.mark.parametrize(
    ("available", "why"),
    [
        (False, "torch was built for cuda, and finds no such device"),
        (True, "torch cannot compute on cuda: no kernel image is available for this device"),
    ],
)
def test_the_probe_says_why_an_accelerator_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, available: bool, why: str
) -> None:
    def ones(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("no kernel image is available for this device\nmore of it")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: CUDA)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: available)
    monkeypatch.setattr(torch, "ones", ones)
    assert probe.usable_accelerator() == (None, why)
