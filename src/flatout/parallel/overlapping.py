"""Averaging gradients while a backward call still computes others, where that takes long: between
hosts and between accelerators.

Gradients are averaged in buckets, in the order in which they were ready in the last backward call,
if that was the same on all ranks (Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating
Data Parallel Training", https://arxiv.org/abs/2006.15704). A bucket is begun when all of its
gradients are ready. A rank need not have a gradient that others have: after the backward call the
ranks meet, and those that have begun fewer buckets begin the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flatout.intercept.gradients import stored_gradient
from flatout.parallel.channel import Group
from flatout.parallel.header import Header, digest
from flatout.parallel.team import Team

FIRST_BUCKET_BYTES = 1 << 20
BUCKET_BYTES = 25 << 20
"""Most bytes of a bucket with several gradients, as in ``DistributedDataParallel``: a small one
first, to begin early."""


@dataclass(frozen=True)
class _Bucket:
    """Gradients that are averaged together.

    Attributes:
        numbers: of their leaves.
        channel: by which they are averaged.
    """

    numbers: tuple[int, ...]
    channel: Group


class Overlap:
    """The averaging beside backward calls, as one rank does it.

    Args:
        team: the ranks.
    """

    def __init__(self, team: Team) -> None:
        self._team = team
        self._leaves: Mapping[int, Any] = {}
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[int, int] = {}
        self._order: dict[int, None] = {}
        self._missing: list[int] = []
        self._begun: list[Callable[[Sequence[torch.Tensor]], None]] = []
        self._is_spoiled = False
        self._are_in_order = False

    @contextlib.contextmanager
    def watching(self, leaves: Mapping[int, torch.Tensor]) -> Iterator[None]:
        """A context around a backward call that accumulates gradients.

        Args:
            leaves: those whose gradients are averaged, by their numbers.
        """
        self._leaves = leaves
        self._order, self._begun, self._is_spoiled = {}, [], False
        self._missing = [len(bucket.numbers) for bucket in self._buckets]
        handles: list[Any] = []
        for number, leaf in leaves.items():
            if leaf.requires_grad and leaf.is_leaf:
                node: Any = torch.autograd.graph.get_gradient_edge(leaf).node
                handles.append(node.register_hook(functools.partial(self._note_ready, number)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add_progress(self, header: Header) -> Header:
        """Return a header that says what this rank has begun, once the backward call is over: the
        order in which gradients were ready, and the number of buckets, with a bit that says whether
        something else is to be averaged."""
        planned = [number for bucket in self._buckets for number in bucket.numbers]
        is_spoiled = self._is_spoiled or not all(map(self._fits, planned))
        bits = len(self._begun) << 1 | is_spoiled
        return dataclasses.replace(header, structure=digest(list(self._order)), bits=bits)

    def learn(self, headers: Sequence[Header]) -> None:
        """Learn what the other ranks have begun."""
        self._is_spoiled = any(header.bits & 1 for header in headers)
        self._are_in_order = len({header.structure for header in headers}) == 1
        with torch.no_grad():
            for _ in range(len(self._begun), max(header.bits >> 1 for header in headers)):
                self._begin()

    def finish(self) -> set[int]:
        """Wait for the means of what any rank has begun to average; returns the numbers of the
        leaves whose gradients they are."""
        done = self._finish()
        self._plan()
        self._leaves, self._begun, self._order = {}, [], {}
        return done

    def _finish(self) -> set[int]:
        is_spoiled = self._is_spoiled
        done: set[int] = set()
        for bucket, finish in zip(self._buckets, self._begun, strict=False):
            means = [self._gradient_or_zeros(number) for number in bucket.numbers]
            with self._team.summing(means):
                finish([torch.empty_like(mean) for mean in means] if is_spoiled else means)
            if not is_spoiled:
                for number, mean in zip(bucket.numbers, means, strict=True):
                    leaf = self._leaves[number]
                    if stored_gradient.__get__(leaf) is None:
                        leaf.grad = mean
                done.update(bucket.numbers)
        return done

    def _note_ready(self, number: int, *_: Any) -> None:
        """Note that a gradient is ready, in the thread that computes gradients."""
        try:
            with torch.no_grad():
                self._note(number)
        except Exception as error:  # noqa: BLE001 - it is none of the program's
            self._team.ending.failed(error)

    def _note(self, number: int) -> None:
        if number in self._order:
            self._is_spoiled = True  # more was added to what may be on its way
            return
        self._order[number] = None
        if number not in self._bucket_of:
            return
        self._missing[self._bucket_of[number]] -= 1
        while len(self._begun) < len(self._buckets) and not self._missing[len(self._begun)]:
            if not all(map(self._fits, self._buckets[len(self._begun)].numbers)):
                self._missing[len(self._begun)] = -1
                return
            self._begin()

    def _begin(self) -> None:
        """Begin to average the next bucket."""
        bucket = self._buckets[len(self._begun)]
        gradients = [self._gradient_or_zeros(number) for number in bucket.numbers]
        self._begun.append(bucket.channel.begin_average([g.contiguous() for g in gradients]))

    def _gradient_or_zeros(self, number: int) -> torch.Tensor:
        """Return a gradient as it is stored, without a version that autograd counts; zeros if there
        is none that fits."""
        leaf = self._leaves[number]
        gradient = stored_gradient.__get__(leaf)
        return gradient.data if self._fits(number) and gradient is not None else _zeros(leaf)

    def _fits(self, number: int) -> bool:
        """Whether a leaf has no gradient, or a dense one that is no part of a graph."""
        leaf = self._leaves.get(number)
        if leaf is None:
            return False
        gradient = stored_gradient.__get__(leaf)
        return gradient is None or (
            gradient.layout is torch.strided
            and not (gradient.requires_grad or gradient.is_complex())
            and (gradient.shape, gradient.dtype) == (leaf.shape, leaf.dtype)
        )

    def _plan(self) -> None:
        """Form the buckets of the next backward call, the same on all ranks."""
        self._buckets = []
        if self._are_in_order and not self._is_spoiled:
            for numbers in self._divide():
                channel = self._team.find_channel_beside(self._leaves[numbers[0]])
                if channel is not None:
                    self._buckets.append(_Bucket(tuple(numbers), channel))
        numbered = enumerate(self._buckets)
        self._bucket_of = {number: i for i, bucket in numbered for number in bucket.numbers}

    def _divide(self) -> list[list[int]]:
        """Divide the gradients, in their order, into those that are averaged together."""
        found: list[list[int]] = []
        room, kind_before = 0, None
        for number in self._order:
            leaf = self._leaves[number]
            kind, size = (leaf.dtype, leaf.device), leaf.numel() * leaf.element_size()
            if leaf.is_complex():
                continue
            if kind != kind_before or size > room:
                room = BUCKET_BYTES if found else FIRST_BUCKET_BYTES
                found.append([])
            found[-1].append(number)
            room, kind_before = room - size, kind
        return found


def _zeros(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf, requires_grad=False)
