"""The state of torch, beside its tensors, that the kernels of a backward pass look at."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

_c: Any = torch._C


class State(NamedTuple):
    """One of the settings, read and written."""

    get: Callable[[], Any]
    set: Callable[[Any], object]


def _deterministic() -> tuple[bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def _set_deterministic(state: tuple[bool, bool]) -> None:
    is_on, warns_only = state
    torch.use_deterministic_algorithms(is_on, warn_only=warns_only)


def _flushes_denormals() -> bool:
    half = 0.5
    return sys.float_info.min * half == 0.0


def _product_precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the program has set each backend's
        return None


def _set_product_precision(precision: str | None) -> None:
    if precision is not None:
        torch.set_float32_matmul_precision(precision)


def _of_c(name: str) -> list[State]:
    """A setting that torch has a pair of functions for, unless this torch has not."""
    get, put = getattr(_c, f"_get_{name}", None), getattr(_c, f"_set_{name}", None)
    return [State(get, put)] if get and put else []


def _precision(backend: str, operation: str) -> State:
    """Of products in float32 (https://docs.pytorch.org/docs/stable/notes/cuda.html)."""
    return State(
        lambda: _c._get_fp32_precision_getter(backend, operation),
        lambda precision: _c._set_fp32_precision_setter(backend, operation, precision),
    )


_STATES = (
    State(torch.get_num_threads, torch.set_num_threads),
    State(torch.get_default_dtype, torch.set_default_dtype),
    State(_deterministic, _set_deterministic),
    State(_flushes_denormals, torch.set_flush_denormal),
    State(_product_precision, _set_product_precision),
    *_of_c("mkldnn_enabled"),
    *_of_c("mkldnn_deterministic"),
    *_of_c("cudnn_enabled"),
    *_of_c("cudnn_benchmark"),
    *_of_c("cudnn_deterministic"),
    *(
        [
            _precision(backend, operation)
            for backend in ("cuda", "mkldnn")
            for operation in ("matmul", "conv", "rnn")
        ]
        if hasattr(_c, "_get_fp32_precision_getter")
        else []
    ),
)


def now() -> tuple[Any, ...]:
    """As it is."""
    return tuple(state.get() for state in _STATES)


@contextlib.contextmanager
def like(then: tuple[Any, ...]) -> Iterator[None]:
    """As it was, for a while."""
    changed = [
        (state, there, here)
        for state, there, here in zip(_STATES, then, now(), strict=True)
        if there != here
    ]
    for state, there, _ in changed:
        state.set(there)
    try:
        yield
    finally:
        for state, _, here in changed:
            state.set(here)
