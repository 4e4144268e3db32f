"""How the inputs of a program's modules are described, whatever they come in."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from typing import Any

import pytest
import torch

from flatout.agent.inputs import described
from flatout.signature import matches


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
    assert list(described(((value,), {}))) == words
    assert matches(words, words)
