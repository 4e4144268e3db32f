"""The header of a record, which describes the process that wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

RECORD_VERSION = 7

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
"""The only environment variables that a header holds, because any other may be a secret."""


@dataclass(frozen=True)
class Header:
    """The first line of a record.

    Attributes:
        version: the version of the record's format.
        pid, parent_pid: the process ids of the process and of its parent.
        rank, world_size: the rank of the process in a distributed job, and the number of processes
            of that job; ``None``: the job is not distributed.
        started_unix_s: the wall-clock time when the record was started.
        started_ns: the same moment as a ``time.perf_counter_ns`` reading, the clock of the events.
        program: the base name of the script, or the name of the module after ``-m``.
        executable: the path of the Python interpreter.
        python, torch: the versions of Python and torch.
        threads: the number of torch's intra-op threads; ``None``: not known.
        cpu_capability: the instruction set that torch's own kernels use, such as ``AVX512``.
        accelerator: the device type of torch's accelerator, such as ``cuda``; ``None``: there is
            none.
        environment: the variables of ``ENVIRONMENT_NAMES`` that are set, with their values.
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
