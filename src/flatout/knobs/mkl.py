"""Make MKL use AVX-512 on processors that are not made by Intel."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from flatout import kernels
from flatout.errors import RefusedError
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "mkl"

VENDOR_CHECK = "mkl_serv_intel_cpu_true"
"""The function by which MKL asks itself whether Intel made the processor."""
MARKER = "flatout_mkl_is_preloaded"
"""A function of the preloaded library; a process that has it was started with the library."""

MATMUL_OPERATORS = (
    *("::mm", "::addmm", "::bmm", "::baddbmm", "::mv", "::addmv", "::dot", "_fft"),
    *("linalg_solve", "linalg_inv", "linalg_lu", "linalg_chol", "linalg_qr", "linalg_svd", "_eig"),
)
"""Parts of the names of operators that call MKL in float32 and float64."""

SAVED = 0.6
"""The largest share of these operators' time that AVX-512 saves: with vectors of 512 instead of 256
bits, large matmuls take half the time, and small ones less than half."""

FLAGS = {"avx512f", "avx512dq", "avx512bw", "avx512vl"}
"""The processor features that MKL's AVX-512 kernels need."""


def match(facts: Facts) -> Match:
    """Offer the setting for matmuls on a non-Intel processor with AVX-512, if there is a
    compiler."""
    from flatout import machine

    if sys.platform != "linux":
        return Match((), "a library can be preloaded only on Linux")
    if machine.cpu_vendor() in (None, "GenuineIntel"):
        return Match(
            (),
            "nothing to gain, MKL already uses this processor's full instruction set "
            "(or the vendor is unknown)",
        )
    if not machine.has_cpu_flags(FLAGS):
        return Match((), "this processor has no AVX-512")
    if facts.main_dtype not in (None, "float32", "float64"):
        return Match((), f"the matmuls are in {facts.main_dtype}, which MKL does not compute")
    if facts.lack(*MATMUL_OPERATORS):
        return Match((), "there are no matmuls in a step")
    if kernels.find_compiler() is None:
        return Match((), "there is no C compiler")
    share = facts.share(*MATMUL_OPERATORS)
    return Match(("avx512",), share=None if share is None else SAVED * share)


def is_product(operator: str) -> bool:
    """Whether an operator of this name calls MKL in float32 and float64."""
    return any(part in operator for part in MATMUL_OPERATORS)


def is_preloaded_in(environment: Mapping[str, str]) -> bool:
    """Whether a program with these environment variables was started with the library."""
    return "/mkl-" in environment.get("LD_PRELOAD", "")


def variables(setting: str, environment: Mapping[str, str]) -> dict[str, str]:
    """``LD_PRELOAD`` with the library appended to what the user preloads.

    It is empty where the library cannot be built, or its path cannot be written in the variable.
    """
    try:
        library = str(kernels.build("mkl"))
    except kernels.KernelError:
        return {}
    if " " in library or ":" in library:  # the loader splits the variable at these characters
        return {}
    present = environment.get("LD_PRELOAD")
    return {"LD_PRELOAD": f"{present}:{library}" if present else library}


def apply(host: Host, setting: str) -> Undo:
    """Check that this process was started with the library, and that torch's MKL calls it.

    Raises:
        RefusedError: it was not, or this torch has no such MKL.
    """
    import ctypes
    from pathlib import Path

    import torch

    if not hasattr(ctypes.CDLL(None), MARKER):
        raise RefusedError(
            f"the program was not started with the library: LD_PRELOAD is "
            f"{os.environ.get('LD_PRELOAD')!r}"
        )
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not library.exists() or not hasattr(ctypes.CDLL(str(library)), VENDOR_CHECK):
        raise RefusedError(f"torch {torch.__version__} has no MKL that checks the vendor")
    return lambda: None


KNOB = Knob(
    name=NAME,
    summary="make MKL use AVX-512 on processors that are not made by Intel",
    settings=("avx512",),
    exactness={"avx512": "reordered"},
    hot=False,
    platforms=("cpu",),
    card=Card(
        what="The knob preloads a small library that makes MKL believe it runs on an Intel "
        "processor. On x86, torch computes float32 and float64 matmuls with MKL, which "
        "uses AVX-512 only if Intel made the processor. The library replaces the function "
        "by which MKL checks the vendor, and nothing else. The arithmetic is the same; "
        "sums are taken in another order. The knob needs Linux, a C compiler, and a torch "
        "that contains MKL, as the wheels on PyPI do.",
        helps="The knob helps linear layers, attention and other matmuls in float32 on AMD's "
        "Zen 4 and Zen 5: `flatout tune --knobs mkl -- python examples/language/train.py` "
        "measured a speedup of 1.58 (1.53 to 1.64, 5 pairs) on a Zen 5. It does not "
        "affect convolutions and bfloat16, which oneDNN computes without checking the "
        "vendor.",
        hurts="No case is known. Other programs that the program starts inherit `LD_PRELOAD`; "
        "the library has no effect in them unless they use MKL.",
        by_hand="Write `int mkl_serv_intel_cpu_true(void) { return 1; }` into `mkl.c`, compile it "
        "by `cc -shared -fPIC -o libmkl.so mkl.c`, and run `LD_PRELOAD=./libmkl.so python "
        "train.py`.",
        sources=(
            "https://github.com/pytorch/builder/pull/1245",
            "https://github.com/pytorch/builder/issues/504",
        ),
    ),
    match=match,
    apply=apply,
    kernels=("mkl",),
    variables=variables,
    replaces=MATMUL_OPERATORS,
)
