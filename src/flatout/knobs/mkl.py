"""Which instructions MKL takes on processors that are not Intel's."""

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

ASKED = "mkl_serv_intel_cpu_true"
"""The function of MKL that knows whether the processor is Intel's."""
MARK = "flatout_mkl_is_preloaded"

PRODUCTS = (
    *("::mm", "::addmm", "::bmm", "::baddbmm", "::mv", "::addmv", "::dot", "_fft"),
    *("linalg_solve", "linalg_inv", "linalg_lu", "linalg_chol", "linalg_qr", "linalg_svd", "_eig"),
)
"""Parts of the names of operators that call MKL in float32 and float64."""

SAVED = 0.6
"""Of their time, at most: products in 512 bits take half of that in 256, small ones less."""

FLAGS = {"avx512f", "avx512dq", "avx512bw", "avx512vl"}
"""What MKL's AVX-512 kernels need."""


def match(facts: Facts) -> Match:
    """Needs AVX-512 on a processor that is not Intel's, products in the step, and a compiler."""
    from flatout import machine

    if sys.platform != "linux":
        return Match((), "preloading a library is for Linux")
    if machine.cpu_vendor() in (None, "GenuineIntel"):
        return Match((), "MKL uses all of this processor, or it is not known whose it is")
    if not machine.has_cpu_flags(FLAGS):
        return Match((), "this processor has no AVX-512")
    if facts.main_dtype not in (None, "float32", "float64"):
        return Match((), f"its products are in {facts.main_dtype}, which do not go to MKL")
    if facts.lack(*PRODUCTS):
        return Match((), "there are no matrix products in its steps")
    if kernels.find_compiler() is None:
        return Match((), "there is no C compiler")
    share = facts.share(*PRODUCTS)
    return Match(("avx512",), share=None if share is None else SAVED * share)


def is_product(operator: str) -> bool:
    """Whether an operator calls MKL in float32 and float64."""
    return any(part in operator for part in PRODUCTS)


def is_preloaded_in(environment: Mapping[str, str]) -> bool:
    """Whether a program with these variables was started with the library."""
    return "/mkl-" in environment.get("LD_PRELOAD", "")


def variables(setting: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The library is preloaded beside what the user preloads."""
    try:
        library = str(kernels.build("mkl"))
    except kernels.KernelError:
        return {}
    if " " in library or ":" in library:  # by which the loader splits the variable
        return {}
    present = environment.get("LD_PRELOAD")
    return {"LD_PRELOAD": f"{present}:{library}" if present else library}


def apply(host: Host, setting: str) -> Undo:
    """See whether this process was started as asked, and whether this torch's MKL asks."""
    import ctypes
    from pathlib import Path

    import torch

    if not hasattr(ctypes.CDLL(None), MARK):
        raise RefusedError(
            f"the program was not started with the library: LD_PRELOAD is "
            f"{os.environ.get('LD_PRELOAD')!r}"
        )
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not library.exists() or not hasattr(ctypes.CDLL(str(library)), ASKED):
        raise RefusedError(f"torch {torch.__version__} has no MKL that asks for the vendor")
    return lambda: None


KNOB = Knob(
    name=NAME,
    summary="MKL takes AVX-512 on processors that are not Intel's",
    settings=("avx512",),
    exactness={"avx512": "reordered"},
    hot=False,
    platforms=("cpu",),
    card=Card(
        what="torch's float32 and float64 matrix products on x86 go to MKL, which looks at the "
        "vendor of the processor and leaves AVX-512 to Intel's. The program is started with a "
        "library of one function preloaded that answers the question with yes, for MKL alone. "
        "The arithmetic is the same, sums are taken in another order. Needs Linux, a C compiler, "
        "and a torch that carries MKL, as those from PyPI do.",
        helps="Linear layers, attention and all other matrix products in float32 on AMD's Zen 4 "
        "and Zen 5: `flatout tune --knobs mkl -- python examples/language/train.py` gave 1.58 "
        "(1.53 to 1.64, 5 pairs) on a Zen 5. Convolutions and bfloat16 go to oneDNN, which does "
        "not ask.",
        hurts="Nothing is known. `LD_PRELOAD` is seen by the programs that the program starts, "
        "where it does nothing.",
        by_hand="`int mkl_serv_intel_cpu_true(void) { return 1; }` in `mkl.c`, `cc -shared -fPIC "
        "-o libmkl.so mkl.c`, `LD_PRELOAD=./libmkl.so python train.py`",
        sources=(
            "https://github.com/pytorch/builder/pull/1245",
            "https://github.com/pytorch/builder/issues/504",
        ),
    ),
    match=match,
    apply=apply,
    kernels=("mkl",),
    variables=variables,
)
