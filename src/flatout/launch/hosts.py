"""Runs a command as one rank of several that a launcher has started, on one host or on several.

Rank 0 is the program, as for ``companions``. Every other rank runs in a copy-on-write view, with
its output in its own run directory; its flatout ends with the exit status of rank 0. All flatouts
are connected to that of rank 0, which passes on what ranks note for each other.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flatout import knobs, paths
from flatout.errors import UserError
from flatout.launch import companions, environment, launcher, meeting, process
from flatout.launch.companions import Companions
from flatout.launch.deaths import OWN_END_S, Deaths, output_file
from flatout.launch.launcher import Launched
from flatout.launch.lines import Line
from flatout.launch.notes import Notes, located, lost
from flatout.launch.runs import new_run_directory
from flatout.wire.request import ADDRESS_VARIABLE, RANK_VARIABLE, Request

INTERRUPTED_S = 25.0
"""Time that rank 0 gets after a signal that ends another rank: launchers send it to all ranks, and
the program may save its state first. Launchers themselves wait for 30 seconds."""

_POLL_S = 0.1


@dataclass(frozen=True)
class Ended:
    """How a run has ended, as one of its ranks sees it.

    Attributes:
        returncode: exit status of rank 0; if negative, the signal that killed it.
        sentence: about the rank that failed; ``None``: none did, or it is for others to say.
        run_directory: of this rank.
        lines: connections to other ranks. They end with this process, and the flatouts of the other
            ranks end after that of rank 0: launchers end all ranks once one has failed.
        was_interrupted: whether a signal that asks for an end has come.
    """

    returncode: int
    sentence: str | None
    run_directory: Path
    lines: Sequence[Line]
    was_interrupted: bool


def run_rank_0(
    command: Sequence[str],
    make_request: Callable[[], Request],
    launched: Launched,
    say: meeting.Say,
) -> Ended:
    """Run a command as rank 0 to its end.

    Args:
        command: program and arguments.
        make_request: returns what the agents of all ranks shall do, without ``ranks``.
        launched: the place of this process.
        say: tells the user something.

    Raises:
        UserError: the program cannot be executed, there is no request, or another rank cannot be
            run.
    """
    others = meeting.Host(launched, launcher.interpreter(command), say).wait_for_all()
    address, shares = meeting.assign(meeting.introduce(launched, ""), others)
    try:
        process.check_program(command[0])
        request = replace(make_request(), ranks=companions.seed_ranks(launched.size))
        run_directory = _make_run_directory(request)
    except UserError as error:
        for line, _ in others.values():
            line.send(refusal=f"rank 0, on {address}: {error}")
        raise
    meeting.send_assignments(others, request, address, shares)
    exchange = _Exchange(Notes(run_directory), {rank: line for rank, (line, _) in others.items()})
    deaths = Deaths(run_directory)

    def must_end() -> bool:
        exchange.pass_on()
        return deaths.must_rank_0_end()

    exited = process.run(
        command,
        {**_variables(request, run_directory, address), **shares[0].variables, RANK_VARIABLE: "0"},
        tick=must_end,
        processors=shares[0].processors,
    )
    exchange.pass_on()
    sentence = deaths.explain(exited.returncode)
    returncode = 1 if deaths.ended_rank_0 else exited.returncode
    exchange.end(returncode)
    lines = [line for line, _ in others.values()]
    return Ended(returncode, sentence, run_directory, lines, exited.was_interrupted)


def run_other(command: Sequence[str], launched: Launched, say: meeting.Say) -> Ended:
    """Run a command as another rank than 0, to the end of rank 0. No process of it is left then.

    Args:
        command: program and arguments.
        launched: the place of this process.
        say: tells the user something.

    Raises:
        UserError: the program cannot be executed, or the ranks cannot be run.
    """
    line, assignment = meeting.join(launched, _refusal(command), launcher.interpreter(command), say)
    rank = launched.rank
    run_directory = _make_run_directory(assignment.request)
    variables = _variables(assignment.request, run_directory, assignment.address)
    output = output_file(run_directory, rank)
    say(
        f"rank {rank} of {launched.size}; the program is rank 0, on {line.address}, and what this "
        f"rank prints is in {paths.shown(output)}"
    )
    with _noting_signals() as signals:
        this = Companions(command, variables, run_directory, {rank: assignment.share})
        membership = _Membership(line, Notes(run_directory), assignment.address, output)
        try:
            returncode = _wait_for_rank_0(membership, signals, say)
            sentence = _explain_here(run_directory, rank, returncode)
            if membership.ended is None:
                this.wait_for_end(OWN_END_S)
            elif membership.ended >= 0:
                this.wait_for_end()
        finally:
            this.end()
        until_s = time.monotonic() + companions.FOLLOWING_S
        while not line.is_lost and time.monotonic() < until_s:
            time.sleep(_POLL_S)
            line.receive()
    return Ended(returncode, sentence, run_directory, [line], bool(signals))


def _wait_for_rank_0(membership: _Membership, signals: Sequence[int], say: meeting.Say) -> int:
    """Return how rank 0 has ended; 1 if the connection to it is lost, and the negative signal if
    one has asked this rank to end."""
    until_s: float | None = None
    while membership.ended is None and not membership.line.is_lost:
        if signals and until_s is None:
            until_s = time.monotonic() + INTERRUPTED_S
            where = membership.line.address
            say(f"rank 0, on {where}, decides; this rank ends within {INTERRUPTED_S:.0f} s")
        if until_s is not None and time.monotonic() > until_s:
            membership.ended = -signals[0]
        time.sleep(_POLL_S)
        membership.pass_on()
    return 1 if membership.ended is None else membership.ended


def _explain_here(run_directory: Path, rank: int, returncode: int) -> str | None:
    """A sentence about the rank that failed first, if that is this one, or rank 0 is lost."""
    deaths = Deaths(run_directory)
    first = deaths.first()
    return deaths.explain(returncode) if first is not None and first.rank in (0, rank) else None


class _Exchange:
    """Rank 0's connections to the other ranks while they run.

    Args:
        notes: in the run directory of rank 0.
        lines: the connections, by rank.
    """

    def __init__(self, notes: Notes, lines: Mapping[int, Line]) -> None:
        self._notes = notes
        self._lines = lines

    def pass_on(self) -> None:
        """Copy notes from each rank to all others, and note which ranks cannot be reached."""
        for name, text in self._notes.take_new().items():
            self._send(name, text)
        for rank, line in self._lines.items():
            for message in line.receive():
                self._take(rank, str(message.get("note")), str(message.get("text")))
            if line.is_lost:
                self._take(rank, *lost(rank, line.address))

    def end(self, returncode: int) -> None:
        """Let the other ranks end.

        Args:
            returncode: how rank 0 has ended.
        """
        for line in self._lines.values():
            line.send(ended=returncode)

    def _take(self, rank: int, name: str, text: str) -> None:
        if self._notes.add(name, text):
            self._send(name, text, but=rank)

    def _send(self, name: str, text: str, but: int = 0) -> None:
        for rank, line in self._lines.items():
            if rank != but:
                line.send(note=name, text=text)


class _Membership:
    """The connection of another rank to rank 0 while they run.

    Args:
        line: the connection.
        notes: in the run directory of this rank.
        address: of this host.
        output: the file that holds what this rank prints.

    Attributes:
        line: as given.
        ended: how rank 0 has ended; ``None``: it has not.
    """

    def __init__(self, line: Line, notes: Notes, address: str, output: Path) -> None:
        self.line = line
        self.ended: int | None = None
        self._notes = notes
        self._address = address
        self._output = output

    def pass_on(self) -> None:
        """Copy notes to rank 0 and from it."""
        for name, text in self._notes.take_new().items():
            self.line.send(note=name, text=located(name, text, self._address, self._output))
        for message in self.line.receive():
            if isinstance(message.get("ended"), int):
                self.ended = message["ended"]
            else:
                self._notes.add(str(message.get("note")), str(message.get("text")))
        if self.line.is_lost and self.ended is None:
            self._notes.add(*lost(0, self.line.address))


def _refusal(command: Sequence[str]) -> str | None:
    """Why a command cannot be run on this host as another rank than 0; ``None``: it can."""
    try:
        process.check_program(command[0])
        companions.check_view()
    except UserError as error:
        return str(error)
    return None


def _make_run_directory(request: Request) -> Path:
    try:
        run_directory = new_run_directory()
        request.write(run_directory)
    except OSError as error:
        raise UserError(
            f"the record cannot be written to {paths.runs_directory()}: {error.strerror}; "
            "FLATOUT_HOME can name another place"
        ) from None
    return run_directory


def _variables(request: Request, run_directory: Path, address: str) -> dict[str, str]:
    """The environment of a rank, in which nothing tells the program of the launcher."""
    assert request.ranks is not None
    prepared = environment.job_environment(run_directory, knobs.prepare(request, os.environ))
    bare = launcher.without_ranks(prepared)
    common = companions.common_variables(bare, run_directory, request.ranks)
    return {**common, ADDRESS_VARIABLE: address}


@contextlib.contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """A context in which signals end nothing: only rank 0 reacts to those that launchers send to
    all ranks. Yields the numbers of those that have come and ask for an end."""
    noted: list[int] = []

    def note(number: int, _: object) -> None:
        if number not in (signal.SIGUSR1, signal.SIGUSR2):
            noted.append(number)

    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
    before = {name: signal.signal(getattr(signal, name), note) for name in names}
    try:
        yield noted
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
