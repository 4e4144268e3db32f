"""Which files a dataset will open for the samples that a loader asks it for.

Most datasets of images have a list with an entry for each sample, and in the entry the file's path,
as ``torchvision.datasets.ImageFolder`` has. Where that is, the first batch shows. Of other datasets
it is remembered which files each sample has opened, for the next epoch. A wrong guess costs the
time for a file that no one asks for, nothing else.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PosixPath
from typing import Any, NamedTuple

from torch.utils import data

MOST_REMEMBERED = 100_000
"""Samples whose files are remembered one by one."""

DEEPEST = 3
"""Datasets within datasets that are looked into."""

MOST_TRIES = 3
"""Batches in which such a list is looked for."""


class Rule(NamedTuple):
    """Where in a dataset the path of a sample's file is written.

    Attributes:
        entries: the list that has an entry for each sample.
        key: of the path within an entry; ``None``: the entry is the path.
        folder: what comes before it.
    """

    entries: Sequence[Any]
    key: Any
    folder: str

    def path(self, index: int) -> str | None:
        """Of the file of a sample; ``None``: there is none by this rule."""
        try:
            found = dict(_paths(self.entries[index])).get(self.key)
        except IndexError:  # the sampler's numbers are not places in the list
            return None
        return None if found is None else self.folder + found


class Foresight:
    """What is known of one dataset.

    Args:
        dataset: map-style; it is not kept alive.

    Raises:
        TypeError: it is a list, or another type that knows no weak references.
    """

    def __init__(self, dataset: Any) -> None:
        self._subsets: list[Sequence[int]] = []
        while type(dataset) is data.Subset:
            self._subsets.append(dataset.indices)
            dataset = dataset.dataset
        self._dataset = weakref.ref(dataset)
        self._rules: list[Rule] = []
        self._tries = 0
        self._remembered: dict[int, tuple[str, ...]] = {}

    def files(self, indices: Sequence[int]) -> list[str]:
        """The paths of the files that these samples will open, in that order, as far as known."""
        found: list[str] = []
        for index in self._inner(indices):
            if self._rules:
                found += filter(None, (rule.path(index) for rule in self._rules))
            else:
                found += self._remembered.get(index, ())
        return found

    def learn(self, indices: Sequence[int], opened: Sequence[str]) -> None:
        """These samples have opened these files, one after the other, all the same number."""
        each, rest = divmod(len(opened), max(len(indices), 1))
        if self._rules or not indices or not each or rest:
            return
        inner = self._inner(indices)
        of = [tuple(opened[at : at + each]) for at in range(0, len(opened), each)]
        if self._tries < MOST_TRIES:
            self._tries += 1
            found = [self._rule(inner, [paths[place] for paths in of]) for place in range(each)]
            rules = [rule for rule in found if rule is not None]
            if len(rules) == each:
                self._rules = rules
                self._remembered.clear()
                return
        if len(self._remembered) < MOST_REMEMBERED:
            self._remembered.update(zip(inner, of, strict=True))

    def _inner(self, indices: Sequence[int]) -> Sequence[int]:
        """Their indices in the dataset that all subsets are of."""
        for chosen in self._subsets:
            indices = [chosen[index] for index in indices]
        return indices

    def _rule(self, indices: Sequence[int], opened: Sequence[str]) -> Rule | None:
        """One by which these samples have opened these files."""
        if min(indices) < 0:
            return None
        for entries in _lists(self._dataset(), max(indices) + 1, DEEPEST):
            for key, path in _paths(entries[indices[0]]):
                if path and opened[0].endswith(path):
                    rule = Rule(entries, key, opened[0][: -len(path)])
                    if [rule.path(index) for index in indices] == list(opened):
                        return rule
        return None


def _lists(dataset: Any, least: int, depth: int) -> Iterator[Sequence[Any]]:
    """The lists of at least so many entries that a dataset has, or one that it has."""
    values = list(getattr(dataset, "__dict__", {}).values())
    for value in values:
        if type(value) in (list, tuple) and len(value) >= least:
            yield value
    for value in values:
        if depth and isinstance(value, data.Dataset):
            yield from _lists(value, least, depth - 1)


def _paths(entry: Any) -> Iterator[tuple[Any, str]]:
    """What may be a path in an entry, by its key."""
    if type(entry) is dict:
        parts: Iterable[tuple[Any, Any]] = entry.items()
    elif isinstance(entry, (list, tuple)) and type(entry).__iter__ in _ITERATIONS:
        parts = enumerate(entry)
    else:
        parts = [(None, entry)]
    for key, part in parts:
        if type(part) in (str, PosixPath):
            yield key, os.fspath(part)


_ITERATIONS = (list.__iter__, tuple.__iter__)
"""What a program has written to iterate by is not called: it may do more."""
