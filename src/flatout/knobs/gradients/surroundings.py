"""Save and restore the settings of torch that the kernels of a backward pass depend on."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

_c: Any = torch._C


class Setting(NamedTuple):
    """The functions that read and write one of torch's settings."""

    get: Callable[[], Any]
    set: Callable[[Any], object]


def _get_deterministic() -> tuple[bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def _set_deterministic(state: tuple[bool, bool]) -> None:
    is_on, warns_only = state
    torch.use_deterministic_algorithms(is_on, warn_only=warns_only)


def _get_flush_denormal() -> bool:
    half = 0.5
    return sys.float_info.min * half == 0.0


def _get_matmul_precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the program has set the precision of each backend
        return None


def _set_matmul_precision(precision: str | None) -> None:
    if precision is not None:
        torch.set_float32_matmul_precision(precision)


def _c_setting(name: str) -> list[Setting]:
    """The setting ``name`` of ``torch._C``; an empty list if this torch does not have it."""
    get, put = getattr(_c, f"_get_{name}", None), getattr(_c, f"_set_{name}", None)
    return [Setting(get, put)] if get and put else []


def _float32_precision(backend: str, operation: str) -> Setting:
    """The internal precision of float32 operations of a backend.

    https://docs.pytorch.org/docs/stable/notes/cuda.html
    """
    return Setting(
        lambda: _c._get_fp32_precision_getter(backend, operation),
        lambda precision: _c._set_fp32_precision_setter(backend, operation, precision),
    )


_SETTINGS = (
    Setting(torch.get_num_threads, torch.set_num_threads),
    Setting(torch.get_default_dtype, torch.set_default_dtype),
    Setting(_get_deterministic, _set_deterministic),
    Setting(_get_flush_denormal, torch.set_flush_denormal),
    Setting(_get_matmul_precision, _set_matmul_precision),
    *_c_setting("mkldnn_enabled"),
    *_c_setting("mkldnn_deterministic"),
    *_c_setting("cudnn_enabled"),
    *_c_setting("cudnn_benchmark"),
    *_c_setting("cudnn_deterministic"),
    *(
        [
            _float32_precision(backend, operation)
            for backend in ("cuda", "mkldnn")
            for operation in ("matmul", "conv", "rnn")
        ]
        if hasattr(_c, "_get_fp32_precision_getter")
        else []
    ),
)


def save() -> tuple[Any, ...]:
    """The present values of all settings."""
    return tuple(setting.get() for setting in _SETTINGS)


@contextlib.contextmanager
def restored(saved: tuple[Any, ...]) -> Iterator[None]:
    """A context in which the settings have the values that ``save`` returned."""
    changed = [
        (setting, before, present)
        for setting, before, present in zip(_SETTINGS, saved, save(), strict=True)
        if before != present
    ]
    for setting, before, _ in changed:
        setting.set(before)
    try:
        yield
    finally:
        for setting, _, present in changed:
            setting.set(present)
