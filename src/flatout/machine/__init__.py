"""The peak rates of this machine, measured once with the job's interpreter and cached.

No number is from a data sheet. ``machine/probe.py`` measures the rates in a separate process, which
imports torch; this module does not. A rate that could not be measured is ``None``.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flatout import paths
from flatout.errors import UserError
from flatout.machine import system, usage

CACHE_VERSION = 3
PROBE_SECONDS = 180
"""Time limit of the measurement; it takes about ten seconds for each type of device."""

OTHERS_LIMIT = 0.05
"""The share of the CPUs that others may take while rates are measured that are kept."""

SHORTEST_S = 1.0
"""The shortest measurement, in seconds, of which the time that others took is known."""

_MOST_THREADS = 2**20
"""No machine computes with more threads."""

_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
"""Environment variables that hide accelerators."""

_FLAGS = (
    *("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "bf16", "i8mm", "sve"),  # Arm
)


@dataclass(frozen=True)
class Ceilings:
    """The peak rates of the machine.

    Attributes:
        python: path of the interpreter that they were measured with.
        torch: version of its torch.
        threads: number of intra-op threads that torch uses by default.
        matmul_flops_per_s: best rate of a matmul, by dtype name, on the accelerator if there is
            one, else on the CPU.
        memory_bytes_per_s: best rate of a copy on the same device, bytes read plus bytes written.
        page_fault_us: time of the first write to a 4 KiB page.
        devices: rates and reported properties of each device type.
        measured_at_unix_s: when they were measured.
        fingerprint: the properties of the machine for which they hold.
        no_accelerator: why torch cannot use its accelerator; ``None`` if it can, or if torch was
            built for none.
        others_share: the share of the CPUs that other processes took meanwhile; ``None``: not
            measured.
    """

    python: str
    torch: str
    threads: int
    matmul_flops_per_s: Mapping[str, float | None]
    memory_bytes_per_s: float | None
    page_fault_us: float | None
    devices: Mapping[str, Mapping[str, Any]]
    measured_at_unix_s: float
    fingerprint: Mapping[str, str | int | float]
    no_accelerator: str | None = None
    others_share: float | None = None

    @property
    def is_disturbed(self) -> bool:
        """Whether other processes took so much that the rates are too low."""
        return self.others_share is not None and self.others_share > OTHERS_LIMIT


def ceilings(python: str, refresh: bool = False) -> Ceilings:
    """Return the peak rates of the machine for programs that an interpreter runs.

    Rates that were measured beside other work are not kept: they are measured again the next time.

    Args:
        python: path of an interpreter that can import torch.
        refresh: measure even if there are cached rates.

    Raises:
        UserError: the interpreter cannot be run, has no torch, or cannot measure.
    """
    key = _key(python)
    cached = _read_cache(_cache_file())
    if not refresh and (found := _cached(cached, key)) is not None:
        return found
    measured = _measure(str(key["python"]))
    if measured.is_disturbed:
        return measured
    entries = [entry for entry in cached if entry["key"] != key]
    entries.append({"key": key, "ceilings": asdict(measured)})
    _write_cache(_cache_file(), entries)
    return measured


def known_ceilings(python: str) -> Ceilings | None:
    """The same, ``None`` where they have not been measured yet or ``python`` has no torch."""
    try:
        return _cached(_read_cache(_cache_file()), _key(python))
    except UserError:
        return None


def fingerprint() -> dict[str, str | int | float]:
    """Return what identifies the machine: processor, usable cores, memory and system."""
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_gib": round(memory_limit_bytes() / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_model() -> str:
    """Return the name of the processor, as the system reports it."""
    return system.cpu_fields().get("model name") or platform.processor() or platform.machine()


def cpu_vendor() -> str | None:
    """Return the vendor of the processor, such as ``GenuineIntel``, ``None`` if it is not known."""
    return system.cpu_fields().get("vendor_id")


def cpu_flags() -> list[str]:
    """Return the instruction sets of the processor that matter for speed."""
    return [flag for flag in _FLAGS if has_cpu_flags({flag})]


def has_cpu_flags(flags: Collection[str]) -> bool:
    """Whether the processor has all of these instruction sets."""
    fields = system.cpu_fields()
    return set(flags) <= set((fields.get("flags") or fields.get("Features", "")).split())


def usable_cores() -> float:
    """Return how many cores this process may use, by its affinity mask (which reflects its cpuset)
    and by the CPU quota of its control groups."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    quota = system.cpu_quota()
    return allowed if quota is None else min(float(allowed), quota)


def memory_limit_bytes() -> int:
    """Return the memory of the machine, or the limit of this process's control groups if
    smaller."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = system.memory_limit_bytes()
    return total if limit is None else min(total, limit)


def huge_pages() -> str | None:
    """Return the mode of transparent huge pages: ``always``, ``madvise`` or ``never``."""
    text = system.text(Path("/sys/kernel/mm/transparent_hugepage/enabled")) or ""
    chosen = re.search(r"\[(\w+)\]", text)
    return chosen.group(1) if chosen else None


def allocator() -> str:
    """Return the C allocator that a job would get, and the variables that configure it."""
    preloaded = os.environ.get("LD_PRELOAD", "")
    for name in ("jemalloc", "tcmalloc", "mimalloc"):
        if name in preloaded:
            return name
    try:
        version = os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError, AttributeError):
        version = None
    variables = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name == "GLIBC_TUNABLES" or (name.startswith("MALLOC_") and name != "MALLOC_CONF")
    ]
    return " ".join([version or "the system's", *variables])


def compiler() -> str | None:
    """Return a C++ compiler that finds ``Python.h``, as ``torch.compile`` needs it on a CPU."""
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if found is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <Python.h>\nint main() { return PY_MAJOR_VERSION - 3; }\n")
        include = sysconfig.get_paths()["include"]
        built = subprocess.run(
            [found, f"-I{include}", "-fsyntax-only", str(source)],
            capture_output=True,
            check=False,
        )
    return found if built.returncode == 0 else None


def default_python() -> str:
    """Return the interpreter that a job would most likely use: the one on PATH, or flatout's.

    It is the first of them that has torch, if any.
    """
    on_path = shutil.which("python") or shutil.which("python3")
    candidates = [on_path, sys.executable] if on_path is not None else [sys.executable]
    for python in candidates:
        with contextlib.suppress(UserError):
            _torch_version(python)
            return python
    return candidates[0]


def _torch_version(python: str) -> str:
    """Return the version of an interpreter's torch, without importing torch.

    Raises:
        UserError: the interpreter cannot be run, or it has no torch.
    """
    code = "import importlib.metadata as m; print(m.version('torch'))"
    try:
        answer = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{python} cannot be run: {error}") from None
    if answer.returncode != 0:
        raise UserError(
            f"{python} has no torch to measure with: name the job's interpreter with --python"
        )
    return answer.stdout.strip()


def _key(python: str) -> dict[str, Any]:
    """What must be the same for cached figures to hold.

    Raises:
        UserError: the interpreter cannot be run, or it has no torch.
    """
    python = os.path.abspath(shutil.which(python) or python)  # one name for one interpreter
    key = {**fingerprint(), "python": python, "torch_installed": _torch_version(python)}
    return key | {name: value for name in _VISIBLE if (value := os.environ.get(name)) is not None}


def _cache_file() -> Path:
    return paths.cache_directory() / "machine.json"


def _cached(entries: list[dict[str, Any]], key: Mapping[str, Any]) -> Ceilings | None:
    return next((Ceilings(**e["ceilings"]) for e in entries if e["key"] == key), None)


def _measure(python: str) -> Ceilings:
    script = Path(__file__).with_name("probe.py")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FLATOUT_")}
    environment["PYTHONSAFEPATH"] = (
        "1"  # Python 3.11 and later; the script handles earlier versions
    )
    before = usage.read()
    try:
        answer = subprocess.run(
            [python, str(script)],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"measuring the machine took more than {PROBE_SECONDS} s") from None
    if answer.returncode != 0:
        reason = answer.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise UserError(f"the machine could not be measured with {python}: {reason[0]}")
    after = usage.read()
    is_long = after.at_ns - before.at_ns > SHORTEST_S * 1e9
    report = json.loads(answer.stdout)
    devices = report["devices"]
    main_device = devices[next(reversed(devices))]
    return Ceilings(
        python=python,
        torch=report["torch"],
        threads=report["threads"],
        matmul_flops_per_s=main_device["matmul_flops_per_s"],
        memory_bytes_per_s=main_device["memory_bytes_per_s"],
        page_fault_us=report["page_fault_us"],
        devices=devices,
        no_accelerator=report["no_accelerator"],
        measured_at_unix_s=time.time(),
        fingerprint=fingerprint(),
        others_share=usage.taken_between(before, after) if is_long else None,
    )


def _read_cache(file: Path) -> list[dict[str, Any]]:
    try:
        document = json.loads(file.read_text())
        if document["version"] != CACHE_VERSION:
            return []
        for entry in document["entries"]:
            _check_entry(entry)
        return list(document["entries"])
    except FileNotFoundError:
        return []
    except (
        *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
        RecursionError,
    ):
        print(f"flatout: {file} cannot be read: the machine is measured again", file=sys.stderr)
        return []


def _check_entry(entry: Any) -> None:
    """Check that an object is a valid entry of the cache.

    Raises:
        TypeError, ValueError, LookupError, AttributeError, OverflowError: it is not.
    """
    found = Ceilings(**entry["ceilings"])
    rates = [found.memory_bytes_per_s, found.page_fault_us, found.measured_at_unix_s]
    rates += found.matmul_flops_per_s.values()
    for device in found.devices.values():
        rates += [*device["matmul_flops_per_s"].values(), device["memory_bytes_per_s"]]
    for rate in rates:
        if rate is not None and not 0 < float(rate) < float("inf"):
            raise ValueError(f"{rate} is not a rate")
    if found.others_share is not None and not 0 <= float(found.others_share) <= 1:
        raise ValueError(f"{found.others_share} is not a share")
    tables = (entry["key"], found.fingerprint, *(d["reported"] for d in found.devices.values()))
    words = (found.python, found.torch)
    if type(found.threads) is not int or not (
        0 < found.threads <= _MOST_THREADS
        and all(isinstance(word, str) for word in words)
        and all(isinstance(table, dict) for table in tables)
    ):
        raise TypeError("a number or a name has a wrong type")


def _write_cache(file: Path, entries: list[dict[str, Any]]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"version": CACHE_VERSION, "entries": entries}, indent=1))
        temporary.replace(file)
    except OSError as error:
        print(f"flatout: {file} cannot be written: {error.strerror}", file=sys.stderr)
