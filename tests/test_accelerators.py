"""Which accelerators the ranks of a host use, by what the environment and drivers show."""

from __future__ import annotations

from pathlib import Path

import pytest

from flatout.machine import accelerators


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


NVIDIA = {"proc/driver/nvidia/gpus/0000:01:00.0/information": "", "dev/nvidia0": ""}
CONTAINER = {"dev/nvidia3": "", "dev/nvidia7": "", "dev/nvidiactl": "", "dev/nvidia-uvm": ""}
AMD = {
    "sys/class/kfd/kfd/topology/nodes/0/properties": "cpu_cores_count 64\nsimd_count 0\n",
    "sys/class/kfd/kfd/topology/nodes/1/properties": "cpu_cores_count 0\nsimd_count 304\n",
    "sys/class/kfd/kfd/topology/nodes/2/properties": "cpu_cores_count 0\nsimd_count 304\n",
}
INTEL = {
    "sys/class/drm/renderD128/device/vendor": "0x8086\n",
    "sys/class/drm/renderD129/device/vendor": "0x1a03\n",
}


@pytest.mark.parametrize(
    ("files", "variables", "expected"),
    [
        ({}, {}, {}),
        (NVIDIA, {}, {"CUDA_VISIBLE_DEVICES": ["0"]}),
        (CONTAINER, {}, {"CUDA_VISIBLE_DEVICES": ["0", "1"]}),
        (AMD, {}, {"HIP_VISIBLE_DEVICES": ["0", "1"]}),
        (INTEL, {}, {"ZE_AFFINITY_MASK": ["0"]}),
        (CONTAINER, {"CUDA_VISIBLE_DEVICES": "1"}, {"CUDA_VISIBLE_DEVICES": ["1"]}),
        ({}, {"CUDA_VISIBLE_DEVICES": "2, 3"}, {"CUDA_VISIBLE_DEVICES": ["2", "3"]}),
        (AMD, {"HIP_VISIBLE_DEVICES": ""}, {}),
        (CONTAINER, {"CUDA_VISIBLE_DEVICES": "-1"}, {}),
        (CONTAINER, {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, {}),
        (CONTAINER, {"CUDA_VISIBLE_DEVICES": "0,-1,1"}, {"CUDA_VISIBLE_DEVICES": ["0"]}),
        (
            AMD,
            {"CUDA_VISIBLE_DEVICES": "1"},
            {"CUDA_VISIBLE_DEVICES": ["1"], "HIP_VISIBLE_DEVICES": ["1"]},
        ),
        (AMD, {"ROCR_VISIBLE_DEVICES": "1"}, {"HIP_VISIBLE_DEVICES": ["0"]}),
        ({}, {"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b"}, {"CUDA_VISIBLE_DEVICES": ["MIG-a", "MIG-b"]}),
    ],
)
def test_visible_accelerators(
    tmp_path: Path,
    files: dict[str, str],
    variables: dict[str, str],
    expected: dict[str, list[str]],
) -> None:
    write(tmp_path, files)
    assert accelerators.visible(variables, tmp_path) == expected


def test_each_process_has_one() -> None:
    found = {"CUDA_VISIBLE_DEVICES": ["4", "6"], "HIP_VISIBLE_DEVICES": ["0"]}
    shares = [accelerators.share_out(found, number) for number in range(3)]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["4", "6", "4"]
    assert [share["HIP_VISIBLE_DEVICES"] for share in shares] == ["0"] * 3
    assert (accelerators.count(found), accelerators.count({})) == (2, 0)
