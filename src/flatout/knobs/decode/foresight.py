"""Predict which files a dataset will open for the samples of a batch.

Most image datasets have a list with an entry for each sample that contains the path of its file, as
``torchvision.datasets.ImageFolder`` does. The first batch shows where this list is. For other
datasets, the files that each sample has opened are remembered for the next epoch. A wrong
prediction costs the time of decoding a file in vain, and nothing else.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PosixPath
from typing import Any, NamedTuple

from torch.utils import data

MOST_REMEMBERED = 100_000
"""Maximum number of samples whose files are remembered one by one."""

DEEPEST = 3
"""Depth to which nested datasets are searched for the list."""

MOST_TRIES = 3
"""The number of batches after which the list is searched for; then its search is given up."""


class Rule(NamedTuple):
    """Where a dataset stores the path of a sample's file.

    Attributes:
        entries: the list with an entry for each sample.
        key: the key or index of the path in an entry; ``None``: the entry itself is the path.
        folder: the prefix that has to be added to the path.
    """

    entries: Sequence[Any]
    key: Any
    folder: str

    def path(self, index: int) -> str | None:
        """The path of the file of a sample; ``None`` if this rule gives none."""
        try:
            path = dict(_paths(self.entries[index])).get(self.key)
        except IndexError:  # the sampler's numbers are no indices of the list
            return None
        return None if path is None else self.folder + path


class Foresight:
    """Predicts the files of one dataset.

    Args:
        dataset: a map-style dataset; it is not kept alive.

    Raises:
        TypeError: it is a list, or has another type that does not support weak references.
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
        """The paths of the files that these samples are expected to open, in order."""
        files: list[str] = []
        for index in self._resolve_subsets(indices):
            if self._rules:
                files += filter(None, (rule.path(index) for rule in self._rules))
            else:
                files += self._remembered.get(index, ())
        return files

    def learn(self, indices: Sequence[int], opened: Sequence[str]) -> None:
        """Learn from a batch, if all of its samples have opened the same number of files.

        Args:
            indices: the indices of the samples.
            opened: the paths of the files that they have opened one after the other.
        """
        files_per_sample, rest = divmod(len(opened), max(len(indices), 1))
        if self._rules or not indices or not files_per_sample or rest:
            return
        indices = self._resolve_subsets(indices)
        files = [
            tuple(opened[at : at + files_per_sample])
            for at in range(0, len(opened), files_per_sample)
        ]
        if self._tries < MOST_TRIES:
            self._tries += 1
            candidates = [
                self._find_rule(indices, [paths[number] for paths in files])
                for number in range(files_per_sample)
            ]
            rules = [rule for rule in candidates if rule is not None]
            if len(rules) == files_per_sample:
                self._rules = rules
                self._remembered.clear()
                return
        if len(self._remembered) < MOST_REMEMBERED:
            self._remembered.update(zip(indices, files, strict=True))

    def _resolve_subsets(self, indices: Sequence[int]) -> Sequence[int]:
        """Convert indices of the outermost subset to indices of the dataset inside of all
        subsets."""
        for subset_indices in self._subsets:
            indices = [subset_indices[index] for index in indices]
        return indices

    def _find_rule(self, indices: Sequence[int], opened: Sequence[str]) -> Rule | None:
        """A rule that gives exactly these files for these samples; ``None`` if there is none."""
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
    """The lists with at least ``least`` entries in a dataset, or in datasets inside of it."""
    values = list(getattr(dataset, "__dict__", {}).values())
    for value in values:
        if type(value) in (list, tuple) and len(value) >= least:
            yield value
    for value in values:
        if depth and isinstance(value, data.Dataset):
            yield from _lists(value, least, depth - 1)


def _paths(entry: Any) -> Iterator[tuple[Any, str]]:
    """The values in an entry that may be paths, with their keys or indices."""
    if type(entry) is dict:
        items: Iterable[tuple[Any, Any]] = entry.items()
    elif isinstance(entry, (list, tuple)) and type(entry).__iter__ in _ITERATIONS:
        items = enumerate(entry)
    else:
        items = [(None, entry)]
    for key, value in items:
        if type(value) in (str, PosixPath):
            yield key, os.fspath(value)


_ITERATIONS = (list.__iter__, tuple.__iter__)
"""Only these are called; an ``__iter__`` of the program may have side effects."""
