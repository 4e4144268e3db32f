"""Runs trials: single runs of the user's command (the *job*), most of which are stopped early.

The *agent* is flatout's code inside the job. It stops the job, and writes the record of the run. In
a *relay*, two trials are alive at the same time and alternate in blocks of steps.
"""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flatout import launch
from flatout.errors import UserError
from flatout.launch import interruption
from flatout.tune import quiet, unwatched
from flatout.tune.journal import Entry, Journal
from flatout.tune.neighbours import Neighbours
from flatout.tune.unwatched import Sample
from flatout.wire.disturbance import TAKEN_LIMIT
from flatout.wire.record import ProcessRecord, RecordError, RunRecord, read_run
from flatout.wire.request import Relay, Request

_TAIL_LINES = 12
"""Number of lines of a failed program's output that are kept."""

_SAMPLES_FILE = "faults.json"
"""The file in a run directory that holds the page faults of a run without the agent."""

_TERMINATED = f"killed by signal {int(signal.SIGTERM)}"
"""The failure message of a run ends with this if the run was stopped because the other run of its
relay failed."""


class TrialFailedError(Exception):
    """A trial gave no usable record; the message says why.

    Attributes:
        process: the record of the job's main process up to the failure; ``None`` if there is no
            record.
        tail: the last lines of the program's output.
    """

    def __init__(self, why: str, process: ProcessRecord | None, tail: str) -> None:
        super().__init__(why)
        self.process = process
        self.tail = tail

    @property
    def is_due_to_others(self) -> bool:
        """Whether other processes may have caused the failure. Such a failure tells nothing about
        the settings."""
        return is_due_to_others(str(self))


class RelayFailedError(Exception):
    """One of two trials that alternate has failed.

    Attributes:
        place: the place of the failed trial among the two, 0 or 1.
        failure: the failure of that trial.
    """

    def __init__(self, place: int, failure: TrialFailedError) -> None:
        super().__init__(str(failure))
        self.place = place
        self.failure = failure


@dataclass(frozen=True)
class Trial:
    """The result of a trial.

    Attributes:
        process: the record of the job's main process.
        seconds: the wall time of the whole command.
        ended: whether the program came to its end by itself.
        modules: the files that the job's processes have imported, see ``wire.record``.
    """

    process: ProcessRecord
    seconds: float
    ended: bool
    modules: frozenset[str] = frozenset()


class Trials:
    """Runs the trials of one tune, and writes the result of each into the journal.

    Args:
        command: the command line of the job.
        journal: the journal of the tune.
        isolate: whether trials run in a copy-on-write view of the file system.
        tick: is called twice a second while a trial runs.
        neighbours: waits until other processes are quiet; ``None``: trials start at once.
    """

    def __init__(
        self,
        command: Sequence[str],
        journal: Journal,
        isolate: bool,
        tick: Callable[[], None] | None = None,
        neighbours: Neighbours | None = None,
    ) -> None:
        self._progress = None if tick is None else lambda _: tick()
        self._command = command
        self._journal = journal
        self._isolate = isolate
        self._neighbours = neighbours

    def run(self, request: Request, timeout_seconds: float) -> Trial:
        """Run the job once, or take the result from the journal if it is there.

        Args:
            request: the request to the agent, which should include a stop condition.
            timeout_seconds: the time limit for the whole command.

        Raises:
            KeyboardInterrupt: the user ends the tune; the journal gets nothing of this trial.
            TrialFailedError: the trial failed, hung, or recorded nothing.
            UserError: the trial could not be started, or its record or the journal cannot be
                written or read.
        """

        def start() -> tuple[launch.Finished]:
            finished = launch.start(
                self._command,
                request,
                isolate=self._isolate,
                output="capture",
                timeout_seconds=timeout_seconds,
                progress=self._progress,
                runs=self._journal.runs,
            )
            return (finished,)

        return self._read(self._obtain((request,), start, timeout_seconds)[0])

    def sample_unwatched(self, lasts_s: float) -> list[Sample]:
        """Run the job for some time without the agent, and count the job's page faults from
        outside.

        Args:
            lasts_s: the time after which the job is ended, in seconds.

        Returns the samples. There are none if the system does not report page faults of a process.

        Raises:
            KeyboardInterrupt: the user ends the tune.
            UserError: the job could not be started, or the journal cannot be written or read.
        """
        request = Request(stop_seconds=lasts_s)
        entries = self._journal.take_next(request)
        if entries is None:
            interruption.check()
            observer = unwatched.Observer(lasts_s)
            finished = launch.start(
                self._command,
                request,
                isolate=self._isolate,
                output="discard",
                timeout_seconds=2 * lasts_s,
                progress=observer,
                runs=self._journal.runs,
                watched=False,
            )
            samples = json.dumps(unwatched.encode(observer.samples))
            (Path(finished.run_directory) / _SAMPLES_FILE).write_text(samples)
            name = Path(finished.run_directory).name
            entries = (Entry(name, finished.seconds, False, None, "", self._journal.spent_s),)
            self._journal.add((request,), entries)
        path = self._journal.runs / entries[0].run / _SAMPLES_FILE
        return unwatched.decode(json.loads(path.read_text()))

    def run_two(
        self, requests: tuple[Request, Request], relay: Relay, timeout_seconds: float
    ) -> tuple[Trial, Trial]:
        """Run the job twice at the same time, as a relay (``agent/relay.py``).

        Args:
            requests: the requests for the agents of the two runs.
            relay: the blocks of steps in which the runs alternate.
            timeout_seconds: the time limit for both runs together.

        Raises:
            RelayFailedError: one of the runs failed, hung, or recorded nothing.
            UserError: see ``run``.
        """
        asked = tuple(
            dataclasses.replace(request, relay=dataclasses.replace(relay, place=place))
            for place, request in enumerate(requests)
        )

        def start() -> tuple[launch.Finished, launch.Finished]:
            return launch.start_relay(
                self._command,
                requests,
                relay,
                isolate=self._isolate,
                timeout_seconds=timeout_seconds,
                progress=self._progress,
                runs=self._journal.runs,
            )

        entries = self._obtain(asked, start, timeout_seconds)
        done: list[Trial] = []
        terminated: list[RelayFailedError] = []
        for place, entry in enumerate(entries):
            try:
                done.append(self._read(entry))
            except TrialFailedError as failure:
                failed = RelayFailedError(place, failure)
                if entry.failure is None or not entry.failure.endswith(_TERMINATED):
                    raise failed from failure
                terminated.append(failed)
        if terminated:  # neither run failed by itself: something else has stopped them
            raise terminated[0]
        return done[0], done[1]

    def _obtain(
        self,
        requests: tuple[Request, ...],
        start: Callable[[], Sequence[launch.Finished]],
        timeout_seconds: float,
    ) -> tuple[Entry, ...]:
        """Take the entries of trials from the journal, or make them by running the trials.

        If a trial was killed from outside (by a user, or by the kernel when memory ran out), it is
        run once more. The journal then gets only the second attempt, because the first says little
        about the program.
        """
        entries = self._journal.take_next(*requests)
        if entries is None:
            interruption.check()
            if self._neighbours is not None:
                self._neighbours.before_trial()
            finished = start()
            if any(one.returncode == -signal.SIGKILL and not one.timed_out for one in finished):
                finished = start()
            taken = None if self._neighbours is None else self._neighbours.after_trial()
            entries = tuple(
                _to_entry(one, timeout_seconds, self._journal.spent_s, taken) for one in finished
            )
            self._journal.add(requests, entries)
        return entries

    def _read(self, entry: Entry) -> Trial:
        try:
            record = read_run(self._journal.runs / entry.run)
        except RecordError as error:
            raise UserError(f"the record cannot be read: {error}") from None
        return _to_trial(entry, record)


def run(
    command: Sequence[str], request: Request, *, isolate: bool, timeout_seconds: float
) -> Trial:
    """Run the job once, outside of any tune; see ``Trials.run``."""
    finished = launch.start(
        command, request, isolate=isolate, output="capture", timeout_seconds=timeout_seconds
    )
    entry = _to_entry(finished, timeout_seconds, finished.seconds)
    return _to_trial(entry, finished.read_record())


def is_due_to_others(failure: str) -> bool:
    """Return whether other processes may be the cause of a trial's failure."""
    return failure.startswith(quiet.NOT_MEASURABLE)


def _to_entry(
    finished: launch.Finished, timeout_seconds: float, spent_s: float, taken: float | None = None
) -> Entry:
    """Describe a trial that has ended, for the journal.

    Args:
        finished: the trial.
        timeout_seconds: the time limit of the trial.
        spent_s: how long the tune has taken so far, in seconds.
        taken: the share of the CPUs that other processes used during the trial; ``None``: not
            measured.
    """
    process = finished.read_record().main
    failure = parted = None
    if process is not None:
        parted = collect_reasons(process, "stopped").get("ranks") or finished.rank_failure
    if finished.timed_out:
        failure = f"it was stopped after {timeout_seconds:.0f} s, far longer than expected"
        if taken is not None and taken > TAKEN_LIMIT:
            failure = f"{quiet.NOT_MEASURABLE}: {failure}, and {quiet.describe_others(taken)}"
    elif parted is not None:
        failure = parted
    elif finished.returncode < 0:
        failure = f"it was killed by signal {-finished.returncode}"
    elif finished.returncode > 0:
        failure = f"it failed with exit code {finished.returncode}"
    elif process is None:
        failure = (
            "flatout could not attach: it found no Python process of this command that imported "
            "torch"
        )
    end = None if process is None else process.end
    tail = "\n".join((finished.output or "").splitlines()[-_TAIL_LINES:])
    return Entry(
        run=Path(finished.run_directory).name,
        seconds=finished.seconds,
        ended=end is None or end.reason != "stopped",
        failure=failure,
        tail=tail if failure else "",
        spent_s=spent_s,
    )


def _to_trial(entry: Entry, record: RunRecord) -> Trial:
    process = record.main
    if entry.failure is not None or process is None:
        raise TrialFailedError(entry.failure or "its record is empty", process, entry.tail)
    return Trial(process, entry.seconds, entry.ended, frozenset(record.imported_files))


def collect_reasons(process: ProcessRecord, *what: str) -> dict[str, str]:
    """Return the reason of each of the agent's events of the given kinds, by the event's subject.

    If several of these events have the same subject, the last one counts.

    Args:
        process: the record with the events. The subject of an event is what it is about: a knob,
            ``KNOB=SETTING`` or ``arm N``.
        what: the kinds of events, such as ``"failed"`` and ``"skipped"``.
    """
    return {event.subject: event.why for event in process.events if event.what in what}
