"""Tensors in nested sequences, mappings and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch


def mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """``value`` with ``function`` applied to every tensor in it.

    Looks into tuples, lists, dicts and dataclasses (and so into the outputs of Hugging Face
    models). A container is copied only where a tensor in it changes; others are returned as such.
    """
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        items = [mapped(function, item) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        kind: Any = type(value)
        return kind(*items) if hasattr(value, "_fields") else kind(items)
    if isinstance(value, dict):
        changed = {
            key: new for key, old in value.items() if (new := mapped(function, old)) is not old
        }
        if changed:
            value = copy.copy(value)
            for key, new in changed.items():
                value[key] = new
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        values = {name: mapped(function, old) for name, old in fields.items()}
        if any(values[name] is not fields[name] for name in fields):
            value = copy.copy(value)
            for name, new in values.items():
                object.__setattr__(value, name, new)
        return value
    return value


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested sequences, mappings and dataclasses, in the order in which they lie."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))
