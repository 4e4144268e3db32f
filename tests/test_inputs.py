"""How the inputs of a program's modules are describe, whatever they come in."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flatout.agent import inputs
from flatout.agent.inputs import FirstInputs, describe
from flatout.wire.lines import Inputs, Line
from flatout.wire.signature import matches
from tests.hosts import host_in


@dataclasses.dataclass
class Batch:
    images: torch.Tensor
    labels: list[torch.Tensor]
    name: str = "digits"


CONTAINERS: dict[str, tuple[Any, list[str]]] = {
    "a mapping that is no dict": (UserDict(x=torch.ones(2, 3)), ["float32[2,3]"]),
    "a dataclass": (
        Batch(torch.ones(4, 1, 8, 8), [torch.ones(4, dtype=torch.long)]),
        ["float32[4,1,8,8]", "int64[4]"],
    ),
    "a class of dataclasses": (Batch, []),
    "one number": (torch.tensor(1.0), ["float32[]"]),
    "a nested tensor, which has no shape": (
        torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(5, 3)]),
        ["float32[*]"],
    ),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_tensors_are_found_in(container: str) -> None:
    value, words = CONTAINERS[container]
    assert list(describe(((value,), {}))) == words
    assert matches(words, words)


def called(module: Any, *args: Any) -> None:
    """A forward pass."""


def test_sizes_that_differ_between_the_first_calls_are_open(tmp_path: Path) -> None:
    host = host_in(tmp_path)
    written: list[Line] = []
    host.record = SimpleNamespace(write=written.append)  # type: ignore[assignment]
    watch = FirstInputs(host)
    host.forward_wrappers.append(watch)
    net, other = torch.nn.Identity(), torch.nn.Identity()
    for length in (5, 5, 7, 5):
        watch(called, net, (torch.ones(length, 2),), {})
        watch(called, other, (torch.ones(length, length, length),), {})
    seen = [line.tensors for line in written if isinstance(line, Inputs)]
    assert seen == [("float32[5,2]",), ("float32[*,2]",)]
    for _ in range(inputs.WATCHED_CALLS - 8):
        assert watch in host.forward_wrappers
        watch(called, net, (torch.ones(1, 2),), {})
    assert watch not in host.forward_wrappers
