"""For all tests."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator

import pytest

# Two processes of tests on two cores would wait for each other's OpenMP threads, which spin. Set
# before torch is imported, and for all programs that the tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A shell that starts the tests in the background has them ignore SIGINT, and so every child; nohup
# has them ignore SIGHUP.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def no_subreaper() -> Iterator[None]:
    """Flatout adopts what a trial leaves behind; the process of the tests is as others are."""
    yield
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
