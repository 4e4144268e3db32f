"""The header of a record: which process wrote it, and under which Python and torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

RECORD_VERSION = 5

ENVIRONMENT_NAMES = (
    "CUDA_VISIBLE_DEVICES",
    "FLATOUT_RANK",
    "GLIBC_TUNABLES",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "LD_PRELOAD",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MALLOC_ARENA_MAX",
    "MALLOC_CONF",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_WAIT_POLICY",
    "OPENBLAS_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "RANK",
    "THP_MEM_ALLOC_ENABLE",
    "TORCH_DISTRIBUTED_DEBUG",
    "WORLD_SIZE",
)
"""The only environment variables that a header holds; any other may be a secret."""


@dataclass(frozen=True)
class Header:
    """The first line of a record.

    Attributes:
        version: version of the record's format.
        pid, parent_pid: of the process, and of the one that started it.
        rank, world_size: of the process in a distributed job; ``None`` outside of one.
        started_unix_s: wall-clock time at which the record was begun.
        started_ns: the same moment as a ``time.perf_counter_ns`` reading, the clock of the events.
        program: base name of the script, or name of the module after ``-m``.
        executable: path of the Python interpreter.
        python, torch: versions.
        threads: torch's intra-op threads; ``None``: not known.
        cpu_capability: the instruction set that torch's own kernels use, such as ``AVX512``.
        accelerator: device type of torch's accelerator, such as ``cuda``; ``None``: there is none.
        environment: the variables of ``ENVIRONMENT_NAMES`` that are set.
    """

    kind: ClassVar[str] = "header"

    version: int = RECORD_VERSION
    pid: int = 0
    parent_pid: int = 0
    rank: int | None = None
    world_size: int | None = None
    started_unix_s: float = 0.0
    started_ns: int = 0
    program: str = ""
    executable: str = ""
    python: str = ""
    torch: str = ""
    threads: int | None = None
    cpu_capability: str | None = None
    accelerator: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
