"""Limits of control groups, wherever on the way up they stand, and what the processor says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flatout import machine
from flatout.machine import system


def groups(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("files", "own", "quota"),
    [
        ({"a/b/cpu.max": "150000 100000", "a/cpu.max": "max 100000"}, "0::/a/b", 1.5),
        ({"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000"}, "0::/a/b", 2.0),
        ({"a/cpu.max": "max 100000"}, "0::/a", None),
        ({"cpu.max": "50000 100000"}, "0::/gone/../../outside", 0.5),
        ({"cpu.max": "0 0"}, "0::/", None),
        ({"cpu.max": "spoilt"}, "not a line\n::\n0::/", None),
        ({}, "0::/gone", None),
        (
            {"cpu/x/cpu.cfs_quota_us": "50000", "cpu/x/cpu.cfs_period_us": "100000"},
            "4:memory:/x\n3:cpu,cpuacct:/x",
            0.5,
        ),
        (
            {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"},
            "3:cpu,cpuacct:/x",
            None,
        ),
    ],
)
def test_the_smallest_quota_on_the_way_up_counts(
    files: dict[str, str], own: str, quota: float | None, tmp_path: Path
) -> None:
    groups(tmp_path, files)
    assert system.cpu_quota(tmp_path, own) == quota


V1_UNLIMITED = str(2**63 - 4096)


@pytest.mark.parametrize(
    ("files", "own", "limit"),
    [
        ({"a/b/memory.max": "max", "a/memory.max": "1000", "memory.max": "5000"}, "0::/a/b", 1000),
        ({"a/b/memory.max": "700", "a/memory.max": "1000"}, "0::/a/b", 700),
        ({"a/b/memory.max": "max"}, "0::/a/b", None),
        (
            {
                "memory/a/b/memory.limit_in_bytes": V1_UNLIMITED,
                "memory/a/memory.limit_in_bytes": "4000\n",
                "memory.max": "10",  # of no group of this process
            },
            "9:cpu:/z\n5:memory:/a/b",
            4000,
        ),
        ({"memory/memory.limit_in_bytes": "300"}, "5:memory:/docker/0123", 300),
        (
            {"a/memory.max": "900", "memory/b/memory.limit_in_bytes": "800"},
            "0::/a\n5:memory:/b",
            800,
        ),
    ],
)
def test_the_smallest_memory_limit_on_the_way_up_counts(
    files: dict[str, str], own: str, limit: int | None, tmp_path: Path
) -> None:
    groups(tmp_path, files)
    assert system.memory_limit_bytes(tmp_path, own) == limit


def test_what_a_group_leaves_counts_its_cached_files(tmp_path: Path) -> None:
    groups(
        tmp_path,
        {
            "a/b/memory.max": "max",
            "a/b/memory.current": "10",
            "a/memory.max": "1000",
            "a/memory.current": "900",
            "a/memory.stat": "anon 100\ninactive_file 300\nspoilt\n",
        },
    )
    assert system.available_bytes(tmp_path, "0::/a/b") == 400
    (tmp_path / "a" / "memory.current").write_text("2000")
    assert system.available_bytes(tmp_path, "0::/a/b") == 0
    of_machine = system.available_bytes(tmp_path, "0::/elsewhere")
    assert of_machine is None or of_machine > 0


def test_a_limit_of_the_machine_is_no_more_than_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = machine.memory_limit_bytes()
    monkeypatch.setattr(system, "memory_limit_bytes", lambda: int(V1_UNLIMITED))
    unlimited = machine.memory_limit_bytes()
    assert whole <= unlimited < int(V1_UNLIMITED)
    monkeypatch.setattr(system, "memory_limit_bytes", lambda: 2**20)
    assert machine.memory_limit_bytes() == 2**20


def test_cores_are_those_of_the_mask_within_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "cpu_quota", lambda: None)
    assert machine.usable_cores() == len(os.sched_getaffinity(0))
    monkeypatch.setattr(system, "cpu_quota", lambda: 0.5)
    assert machine.usable_cores() == 0.5


def test_the_first_processor_is_read(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(
        "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Some: CPU\n"
        "flags\t\t: avx2 amx_bf16\n"
        "empty\t:\n\nprocessor\t: 1\nmodel name\t: Other\nonly here\t: 1\n"
    )
    fields = system.cpu_fields(file)
    assert fields["model name"] == "Some: CPU"
    assert fields["vendor_id"] == "GenuineIntel"
    assert fields["flags"].split() == ["avx2", "amx_bf16"]
    assert (fields["empty"], "only here" in fields) == ("", False)
    file.write_text("processor : 0\nBogoMIPS : 50\nFeatures : asimd sve\n")
    assert system.cpu_fields(file)["Features"] == "asimd sve"
    assert system.cpu_fields(tmp_path / "gone") == {}
