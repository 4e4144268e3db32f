"""Which distinct calls a step makes, and which settings act on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from flatout import knobs
from flatout.agent.bench import Bench, Key, Settings
from flatout.agent.calls import Call, StepForm, TensorForm
from flatout.agent.standins import Prepared, size_bytes
from flatout.errors import RefusedError
from flatout.intercept import handled_calls
from flatout.knob import Inside
from flatout.wire.replay import BARE, label

ENOUGH_SHARE = 0.97
"""The calls that make up this share of the time are replayed."""

SHORT_MS = 2.0
"""A call that takes less is made three times, and the shortest time counts."""

Setting = tuple[str, str]


class Group(NamedTuple):
    """Calls of the same form whose tensors are changed in the same way by all settings.

    Attributes:
        keys: the call bare, and under each of ``Bench.changing`` that acts on it, by label.
        calls: the number of these calls in a step.
        ms: the time of one of these calls, bare.
        acting: the settings of ``Bench.counting`` that act on it.
    """

    keys: Mapping[str, Key]
    calls: int
    ms: float
    acting: tuple[Setting, ...] = ()

    @property
    def step_ms(self) -> float:
        """The time of these calls in a step, bare."""
        return self.ms * self.calls


class _Probe(NamedTuple):
    """What a call has shown; ``outputs`` are the forms of what it returns."""

    outputs: tuple[TensorForm, ...]
    ms: float


def find_groups(bench: Bench) -> list[Group]:
    """Make each distinct call a few times, to find which settings act on it.

    Settings that cannot be applied are dropped from ``bench``.
    """
    exploration = _Exploration(bench)
    paths = {BARE: exploration.follow({})}
    for settings in bench.changing[1:]:
        if bench.is_half_over:
            bench.failed[label(settings)] = "there was no time left"
            continue
        try:
            paths[label(settings)] = exploration.follow(settings)
        except RefusedError as why:
            bench.failed[label(settings)] = str(why)
    bench.changing = [settings for settings in bench.changing if label(settings) in paths]
    counts = Counter(zip(*paths.values(), strict=True))
    for form, count in bench.log.steps.items():
        if exploration.probe({}, Inside(), Key(form)) is not None:
            counts[(Key(form),) * len(paths)] += count
    groups = [
        Group(
            keys=dict(exploration.find_changed(paths, keys, keys[0])),
            calls=count,
            ms=exploration.bare_ms(keys[0]),
        )
        for keys, count in counts.items()
        if keys[0] is not None
    ]
    groups = _take_largest(groups)
    acting = exploration.find_acting({group.keys[BARE] for group in groups})
    return [group._replace(acting=tuple(acting[group.keys[BARE]])) for group in groups]


def _take_largest(groups: list[Group]) -> list[Group]:
    """Return the groups that make up ``ENOUGH_SHARE`` of the time, the largest first."""
    groups = sorted(groups, key=lambda group: -group.step_ms)
    enough_ms = ENOUGH_SHARE * sum(group.step_ms for group in groups)
    taken_ms = 0.0
    for count, group in enumerate(groups):
        if taken_ms >= enough_ms:
            return groups[:count]
        taken_ms += group.step_ms
    return groups


class _Exploration:
    """Follows the calls of a step under settings.

    Args:
        bench: makes the calls.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._probes: dict[tuple[str, Key], _Probe | None] = {}
        self._prepared: dict[Key, Prepared] = {}
        self._kept_bytes = 0
        self._everywhere: set[str] = set()

    def follow(self, settings: Settings) -> list[Key | None]:
        """Go through the calls of the step, passing on what settings change about tensors.

        Returns for each call what it is under the settings; ``None``: it cannot be replayed.

        Raises:
            RefusedError: the settings cannot be applied.
        """
        changed: dict[int, tuple[TensorForm, TensorForm]] = {}
        keys: list[Key | None] = []
        with self._bench.applied(settings) as inside:
            if inside.is_everywhere:
                self._everywhere.add(label(settings))
            for call in self._bench.log.calls:
                bare = Key(call.form, call.form.tensors, call.is_head)
                key = bare._replace(tensors=tuple(_find_tensors(call, changed)))
                if settings and self._probes[BARE, bare] is None:
                    keys.append(None)
                    continue
                probe = self.probe(settings, inside, key)
                keys.append(None if probe is None else key)
                expected = self._probes[BARE, bare]
                if settings and probe is not None and expected is not None:
                    forms = zip(call.outputs, expected.outputs, probe.outputs, strict=False)
                    for number, old, new in forms:
                        changed.pop(number, None)
                        if old != new:
                            changed[number] = old, new
        return keys

    def probe(self, settings: Settings, inside: Inside, key: Key) -> _Probe | None:
        """Make a call a few times, all but the first by the clock; ``None``: it fails."""
        place = label(settings), key
        if place not in self._probes:
            self._probes[place] = None
            try:
                prepared = self._prepare(key)
                outputs = self._bench.outputs(key, prepared, inside)
                ms = self._bench.visit(key, prepared, inside)
                if ms < SHORT_MS:  # what disturbs it would be a large part
                    ms = min(ms, *(self._bench.visit(key, prepared, inside) for _ in range(2)))
                self._probes[place] = _Probe(outputs, ms)
            except Exception as error:  # noqa: BLE001 - recorded, see ``Replayed.skipped``
                why = f"{key.form.name}: {type(error).__name__}: {error}"
                self._bench.skipped[why[:200]] += 1
        return self._probes[place]

    def _prepare(self, key: Key) -> Prepared:
        """Prepare a call, and keep it as long as there is memory."""
        if key not in self._prepared:
            prepared = self._bench.prepare(key)
            self._kept_bytes += size_bytes(key.form)
            if not self._bench.has_memory_for(self._kept_bytes):
                return prepared
            self._prepared[key] = prepared
        return self._prepared[key]

    def bare_ms(self, key: Key) -> float:
        """Return the time of a call, bare."""
        probe = self._probes[BARE, key]
        assert probe is not None
        return probe.ms

    def find_changed(
        self, names: Collection[str], keys: tuple[Key | None, ...], bare: Key
    ) -> Iterator[tuple[str, Key]]:
        """Yield the call bare, and under each of the settings that act on it, with their labels.

        Args:
            names: the labels.
            keys: the call under the settings of each.
            bare: the first of them.
        """
        for name, key in zip(names, keys, strict=True):
            if name == BARE or (key is not None and self._is_changed(name, key, bare)):
                assert key is not None
                yield name, key

    def _is_changed(self, name: str, key: Key, bare: Key) -> bool:
        if isinstance(key.form, StepForm):
            return False
        probe, bares = self._probes[name, key], self._probes[BARE, bare]
        assert probe is not None
        assert bares is not None
        if key != bare or probe.outputs != bares.outputs:
            return True
        if name not in self._everywhere:
            return False
        inside = [setting.partition("=")[0] for setting in name.split(",")]
        replaced = [word for knob in inside for word in knobs.get(knob).replaces]
        return any(word in f"aten::{key.form.name}" for word in replaced)

    def find_acting(self, calls: Collection[Key]) -> dict[Key, list[Setting]]:
        """Find the settings that act on calls, by counting these."""
        bench = self._bench
        acting: dict[Key, list[Setting]] = {key: [] for key in calls}
        found: dict[str, list[Key]] = {}
        for name, setting in list(bench.counting):
            try:
                with bench.applied({name: setting}) as inside:
                    if name not in found:  # all settings of a knob act on the same calls
                        found[name] = [key for key in calls if self._acts(name, key, inside)]
            except RefusedError as why:
                bench.failed[f"{name}={setting}"] = str(why)
                bench.counting.remove((name, setting))
                continue
            for key in found[name]:
                acting[key].append((name, setting))
        return acting

    def _acts(self, name: str, key: Key, inside: Inside) -> bool:
        before = handled_calls.counts[name]
        try:
            self._bench.outputs(key, self._prepare(key), inside)
        except Exception as error:  # noqa: BLE001 - recorded, see ``Replayed.skipped``
            why = f"{name}: {key.form.name}: {type(error).__name__}: {error}"
            self._bench.skipped[why[:200]] += 1
            return False
        return handled_calls.counts[name] > before


def _find_tensors(
    call: Call, changed: Mapping[int, tuple[TensorForm, TensorForm]]
) -> Iterator[TensorForm]:
    """Yield the forms of a call's tensors, given what was changed about tensors before."""
    for number, form in zip(call.inputs, call.form.tensors, strict=True):
        old, new = changed.get(number, (form, form))
        if (old.shape, old.dtype) == (form.shape, form.dtype) and old != new:
            form = TensorForm(
                form.shape,
                new.strides,
                new.dtype,
                form.device,
                form.requires_grad,
                form.is_parameter,
            )
        yield form
