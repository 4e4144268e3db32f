"""How the flatouts of ranks that a launcher has started meet: all at rank 0's, before any rank
begins.

Each tells rank 0 where it is. Rank 0's sends back the request, the address and the cores of each.
The connections stay: they carry notes (``notes.py``), and their end is the end of a rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flatout import __version__
from flatout.errors import UserError
from flatout.launch import agent_store, lines
from flatout.launch.companions import Share
from flatout.launch.launcher import Launched
from flatout.launch.lines import Line
from flatout.machine import accelerators, cores
from flatout.wire import codec
from flatout.wire.request import Request

MEET_SECONDS = 600.0
"""How long the flatouts wait for each other: hosts may be allotted one after the other."""

_PATIENCE_SECONDS = 10.0
"""How long they wait before they say so."""

_POLL_SECONDS = 0.05

Say = Callable[[str], None]
"""Tells the user something."""


@dataclass(frozen=True)
class Introduction:
    """What a rank tells rank 0.

    Attributes:
        version: of flatout.
        run: see ``Launched``.
        rank, size: see ``Launched``.
        address: of this end of the connection.
        kernel: the same for all ranks that share processors.
        nodes: the processors that the rank may use, see ``cores.nodes``.
        accelerators: those that it may use, see ``accelerators.visible``.
        refusal: why the rank cannot be run; ``None``: it can.
    """

    version: str
    run: str
    rank: int
    size: int
    address: str
    kernel: str
    nodes: list[list[list[int]]]
    accelerators: dict[str, list[str]]
    refusal: str | None = None


@dataclass(frozen=True)
class Assignment:
    """What rank 0 tells a rank.

    Attributes:
        request: for the agent.
        address: of the rank's host, at which other ranks reach it.
        share: of its host.
    """

    request: Request
    address: str
    share: Share


def introduce(launched: Launched, address: str, refusal: str | None = None) -> Introduction:
    """Return what this process tells rank 0."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        kernel = socket.gethostname()
    found = cores.nodes(cores.allowed_processors()), accelerators.visible(os.environ)
    place = launched.rank, launched.size
    return Introduction(__version__, launched.run, *place, address, kernel, *found, refusal)


class Host:
    """Rank 0's end of the meeting.

    Args:
        launched: the place of this process, which is rank 0.
        python: an interpreter with torch.
        say: tells the user what it waits for.

    Raises:
        UserError: the port is in use.
    """

    def __init__(self, launched: Launched, python: str, say: Say) -> None:
        self._launched = launched
        self._say = say
        self._listener = lines.listen(0 if launched.has_agent_store else launched.port)
        self._listener.settimeout(_POLL_SECONDS)
        self._run = launched.run
        if launched.has_agent_store:
            self._run = secrets.token_hex(8)
            port = self._listener.getsockname()[1]
            _use_agent_store(launched, python, f"{port} {self._run}")

    def wait_for_all(self) -> dict[int, tuple[Line, Introduction]]:
        """Return the connections to all other ranks, and what these have told.

        Raises:
            UserError: a rank has not come, cannot be run, or does not belong here.
        """
        began_s, has_said = time.monotonic(), False
        strangers: list[Line] = []
        ranks: dict[int, tuple[Line, Introduction]] = {}
        with self._listener:
            while len(ranks) < self._launched.size - 1:
                strangers += self._accept()
                strangers = [line for line in strangers if not self._meet(line, ranks)]
                for rank in [rank for rank, (line, _) in ranks.items() if _has_left(line)]:
                    del ranks[rank]
                waited_s = time.monotonic() - began_s
                missing = sorted(set(range(1, self._launched.size)) - ranks.keys())
                if waited_s > MEET_SECONDS:
                    raise UserError(
                        f"{_named(missing)} did not come to rank 0 within {MEET_SECONDS:.0f} s"
                    )
                if waited_s > _PATIENCE_SECONDS and not has_said:
                    self._say(f"waiting for {_named(missing)}")
                    has_said = True
        return ranks

    def _accept(self) -> list[Line]:
        """Return the connections to those who have come, after a short time in which nobody has."""
        come: list[Line] = []
        while True:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                return come
            except ConnectionAbortedError:
                continue  # it has left at once
            except OSError as error:
                raise UserError(f"rank 0 can take no more connections: {error.strerror}") from None
            with contextlib.suppress(OSError):  # it has left since
                come.append(Line(connection))

    def _meet(self, line: Line, ranks: dict[int, tuple[Line, Introduction]]) -> bool:
        """Return whether a stranger is one no longer: it is a rank, or has left."""
        messages = line.receive()
        if not messages:
            return line.is_lost
        try:
            told = codec.decode(Introduction, messages[0])
        except codec.MismatchError:
            line.close()
            return True
        launched = self._launched
        where = f"rank {told.rank} on {line.address}"
        if told.run != self._run or told.size != launched.size:
            line.send(refusal="rank 0 belongs to another run")
            line.close()
            return True
        refusal = told.refusal and f"{where}: {told.refusal}"
        if told.version != __version__:
            refusal = f"{where} has flatout {told.version}, and rank 0 has {__version__}"
        elif not 0 < told.rank < launched.size or told.rank in ranks:
            refusal = f"{where} is not the only one that was told to be this rank"
        if refusal:
            for other in [line, *(line for line, _ in ranks.values())]:
                other.send(refusal=refusal)
            raise UserError(refusal)
        ranks[told.rank] = line, told
        return True


def assign(
    own: Introduction, others: Mapping[int, tuple[Line, Introduction]]
) -> tuple[str, list[Share]]:
    """Return the address of rank 0, and the share of each rank.

    Ranks of one host that may use the same processors share them out, and so with accelerators. All
    ranks get as many processors, because the number of threads decides how sums are rounded.
    """
    told = [own, *(others[rank][1] for rank in sorted(others))]
    processors: list[list[int]] = [[] for _ in told]
    for ranks in _group(told, lambda one: (one.kernel, one.nodes)):
        parts = cores.share_out(told[ranks[0]].nodes, len(ranks))
        for rank, part in zip(ranks, parts, strict=True):
            processors[rank] = part
    variables: list[dict[str, str]] = [{} for _ in told]
    for ranks in _group(told, lambda one: (one.kernel, one.accelerators)):
        for number, rank in enumerate(ranks):
            variables[rank] = accelerators.share_out(told[rank].accelerators, number)
    fewest = min(map(len, processors))
    addresses = (line.own_address for line, _ in others.values())
    reached = (address for address in addresses if not lines.is_of_this_host_only(address))
    pairs = zip(processors, variables, strict=True)
    return next(reached, "127.0.0.1"), [Share(part[:fewest], found) for part, found in pairs]


def _group(
    told: Sequence[Introduction], key: Callable[[Introduction], object]
) -> Collection[list[int]]:
    """Return the ranks that say the same, in groups."""
    groups: dict[str, list[int]] = {}
    for one in told:
        groups.setdefault(repr(key(one)), []).append(one.rank)
    return groups.values()


def send_assignments(
    others: Mapping[int, tuple[Line, Introduction]],
    request: Request,
    address: str,
    shares: Sequence[Share],
) -> None:
    """Tell all other ranks what they need to begin.

    Args:
        others: their connections.
        request: for their agents.
        address: of rank 0, also of ranks that have reached it by an address of its host only.
        shares: of each rank.
    """
    for rank, (line, told) in others.items():
        own = address if lines.is_of_this_host_only(told.address) else told.address
        line.send(**codec.encode(Assignment(request, own, shares[rank])))


def join(launched: Launched, refusal: str | None, python: str, say: Say) -> tuple[Line, Assignment]:
    """Meet rank 0.

    Args:
        launched: the place of this process, which is not rank 0.
        refusal: why this rank cannot be run; ``None``: it can.
        python: an interpreter with torch.
        say: tells the user what it waits for.

    Raises:
        UserError: rank 0 does not answer, or the ranks cannot be run.
    """
    lines.resolve(launched.address)
    port, run = launched.port, launched.run
    if launched.has_agent_store:
        text, run = _use_agent_store(launched, python).split()
        port = int(text)
    where = f"rank 0 at {launched.address}, port {port}"
    began_s, has_said = time.monotonic(), False
    line: Line | None = None
    while True:
        if line is None and (line := lines.connect(launched.address, port)) is not None:
            told = introduce(launched, line.own_address, refusal)
            line.send(**codec.encode(dataclasses.replace(told, run=run)))
            if refusal is not None:
                line.close()
                raise UserError(refusal)
        for answer in [] if line is None else line.receive():
            if "refusal" in answer:
                raise UserError(str(answer["refusal"]))
            assert line is not None
            return line, codec.decode(Assignment, answer, codec.STRICT_JSON)
        if line is not None and line.is_lost:
            raise UserError(f"{where}, has ended before all ranks had come")
        waited_s = time.monotonic() - began_s
        if waited_s > MEET_SECONDS:
            raise UserError(f"{where}, has not answered within {MEET_SECONDS:.0f} s")
        if waited_s > _PATIENCE_SECONDS and not has_said:
            say(f"waiting for {where}{', and the other ranks' * (line is not None)}")
            has_said = True
        time.sleep(_POLL_SECONDS)


def _use_agent_store(launched: Launched, python: str, *texts: str) -> str:
    """Put a text into the store of torchrun's agents; without one, wait for it and return it.

    Raises:
        UserError: the interpreter has no torch, or the store does not answer.
    """
    script = [python, agent_store.__file__]
    where = [launched.address, str(launched.port), str(MEET_SECONDS)]
    key = f"flatout {launched.run}"
    done = subprocess.run(
        [*script, *where, key, *texts], capture_output=True, text=True, check=False
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise UserError(f"the store of torchrun cannot be used: {why}")
    return done.stdout.strip()


def _has_left(line: Line) -> bool:
    line.receive()
    return line.is_lost


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
