"""For all tests."""

import atexit
import ctypes
import dataclasses
import importlib.metadata
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator

import pytest

from flatout import machine

# Two processes of tests on two cores would wait for each other's OpenMP threads, which spin. Set
# before torch is imported, and for all programs that the tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _write_ceilings() -> None:
    """Write rates of a machine of today into the cache.

    Rates that are measured beside other work are not kept, and other tests always run: each test of
    a verb that compares with them would measure them again. ``test_machine.py`` measures.
    """
    rates = {"float32": 2e11, "bfloat16": 6e11, "float16": 1e11, "int8": 2e11}
    cpu = {"matmul_flops_per_s": rates, "memory_bytes_per_s": 2e10, "reported": {}}
    ceilings = machine.Ceilings(
        python=sys.executable,
        torch=importlib.metadata.version("torch"),
        threads=os.cpu_count() or 1,
        matmul_flops_per_s=rates,
        memory_bytes_per_s=2e10,
        page_fault_us=0.5,
        devices={"cpu": cpu},
        measured_at_unix_s=time.time(),
        fingerprint=machine.fingerprint(),
    )
    key = machine._key(sys.executable)
    entry = {"key": key, "ceilings": dataclasses.asdict(ceilings)}
    machine._write_cache(machine._cache_file(), [entry])


# Kernels are compiled once for all tests with any FLATOUT_HOME. The first process of pytest makes
# the folder, and its workers inherit the variable.
if "FLATOUT_CACHE" not in os.environ:
    os.environ["FLATOUT_CACHE"] = tempfile.mkdtemp(prefix="flatout-tests-")
    atexit.register(shutil.rmtree, os.environ["FLATOUT_CACHE"], ignore_errors=True)
    _write_ceilings()

# A shell that starts the tests in the background has them ignore SIGINT, and so every child; nohup
# has them ignore SIGHUP.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


OF_RANKS = ("test_parallel_", "test_channel")
"""How the names of test files begin that start many processes of several ranks."""

ONLY_RANKS = ("test_doctor_ranks", "test_ranks", "test_scaling")
"""Likewise of those that the suite leaves out."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of ranks; the suite runs the first case of a test, ``make ranks`` all."""
    seen = set()
    for item in items:
        if item.path.name.startswith(ONLY_RANKS):
            item.add_marker(pytest.mark.ranks)
        elif item.path.name.startswith(OF_RANKS):
            item.add_marker(pytest.mark.ranks)
            test = item.nodeid.partition("[")[0]
            if test not in seen:
                item.add_marker(pytest.mark.short)
            seen.add(test)


@pytest.fixture(autouse=True)
def no_subreaper() -> Iterator[None]:
    """Flatout adopts what a trial leaves behind; the process of the tests is as others are."""
    yield
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
