"""Ctrl-C and SIGTERM at recorded moments: flatout ends soon and keeps what is proven."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flatout import launch, plan
from flatout.cli import main
from flatout.cli.verbs import tune
from flatout.launch import interruption, process
from flatout.plan import Plan
from flatout.tune import journal, pairs, statistics, trial, tuner
from flatout.tune.trial import Trial, Trials
from flatout.wire.header import Header
from flatout.wire.record import ProcessRecord, Step
from flatout.wire.request import Relay, Request

INTERRUPTIONS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLATOUT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def ignored() -> Iterator[None]:
    """SIGINT as a shell's background jobs have it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


STUBBORN = """
trap "" INT TERM HUP
sleep 600 &
(trap "" INT TERM HUP; exec sleep 600) &
echo > ready
while :; do sleep 600; done
"""


def interrupted_when_ready(
    number: signal.Signals, send: Callable[[], None] | None = None
) -> Callable[[], None]:
    """What a run is to call while it waits: sends the signal when the job says that it is there."""
    sent: list[signal.Signals] = []

    def tick() -> None:
        if not sent and os.path.exists("ready"):
            sent.append(number)
            if send is not None:
                send()
            else:
                os.kill(os.getpid(), number)

    return tick


@pytest.mark.usefixtures("ignored")
@pytest.mark.parametrize("number", INTERRUPTIONS)
def test_a_trial_that_ignores_everything_ends(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where SIGINT is ignored, as in a script's background."""
    monkeypatch.setattr(process, "_INTERRUPTED_GRACE_S", 0.2)
    monkeypatch.setattr(process, "TICK_S", 0.02)
    with interruption.note_signals():
        with pytest.raises(KeyboardInterrupt):
            process.run(
                ["sh", "-c", STUBBORN],
                os.environ,
                contained=True,
                tick=interrupted_when_ready(number),
            )
        assert interruption.exit_status() == 128 + number
        assert psutil.Process().children(recursive=True) == []
        with pytest.raises(KeyboardInterrupt):  # nothing else is begun
            process.run(["touch", "begun"], os.environ, contained=True)
    assert not os.path.exists("begun")
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("number", INTERRUPTIONS)
def test_a_signal_that_another_thread_gets_ends_the_trial(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A live display has a thread, in which no signal is blocked."""
    monkeypatch.setattr(process, "_INTERRUPTED_GRACE_S", 0.2)
    monkeypatch.setattr(process, "TICK_S", 0.02)
    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()
    to_thread: Callable[[], None] = interrupted_when_ready(
        number, lambda: signal.pthread_kill(other.ident or 0, number)
    )
    try:
        with interruption.note_signals(), pytest.raises(KeyboardInterrupt):
            process.run(["sh", "-c", STUBBORN], os.environ, contained=True, tick=to_thread)
    finally:
        over.set()
        other.join()
    assert psutil.Process().children(recursive=True) == []


def test_a_hangup_that_is_ignored_does_not_end_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``nohup`` wants it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(process, "TICK_S", 0.02)
    try:
        with interruption.note_signals():
            ended = process.run(
                ["sh", "-c", "echo > ready; while [ ! -e sent ]; do sleep 0.02; done; exit 3"],
                os.environ,
                contained=True,
                tick=lambda: (
                    (interrupted_when_ready(signal.SIGHUP)(), Path("sent").touch())[0]
                    if os.path.exists("ready")
                    else None
                ),
            )
            interruption.check()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert ended.returncode == 3


def test_a_signal_between_two_trials_is_noted_and_what_is_being_done_is_finished() -> None:
    done = []
    with interruption.note_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("decided")
        with pytest.raises(KeyboardInterrupt):
            interruption.check()
        with pytest.raises(KeyboardInterrupt), interruption.at_once():
            done.append("measured")
    assert done == ["decided"]
    interruption.check()  # the next verb of this process knows nothing of it
    with interruption.note_signals(), pytest.raises(KeyboardInterrupt):
        left_at_once()


def left_at_once() -> None:
    with interruption.at_once():
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it goes on")


RELAY = Relay("", 0, block_steps=4, discard_steps=1, warmup_steps=2, blocks=3)

WAITING = """
import os, time
open("ready", "w").close()
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_trials_that_take_turns_end_without_a_traceback(
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(process, "_INTERRUPTED_GRACE_S", 0.5)
    monkeypatch.setattr(process, "TICK_S", 0.02)
    real = process.run

    def run(command: list[str], environment: dict[str, str], **options: object) -> process.Exit:
        tick = interrupted_when_ready(number)
        return real(command, environment, **{**options, "tick": tick})  # type: ignore[arg-type]

    monkeypatch.setattr(process, "run", run)
    (tmp_path / "program.py").write_text(WAITING)
    with interruption.note_signals(), pytest.raises(KeyboardInterrupt):
        launch.start_relay([sys.executable, "program.py"], (Request(), Request()), RELAY)
    assert psutil.Process().children(recursive=True) == []
    assert capfd.readouterr().err == ""
    for said in tmp_path.glob(f"home/runs/*/relay/{launch.OUTPUT_FILE}"):
        assert said.read_text() == ""


# Whole tunes, whose trials are made up: bare takes 16 ms a step, the allocator brings 1.6x.


def made_up(settings: dict[str, str], seed: int, steps: int = 60) -> Trial:
    """What a run under some settings would have recorded; the losses are those of its seed."""
    step_ms = 16.0 / 1.6 ** len(settings) * (1 + 0.02 * (seed % 3))
    header = Header(torch="2.13.0", threads=2, executable=sys.executable, program="train.py")
    made = [
        Step(
            index=number,
            at_s=1.0 + number * step_ms / 1e3,
            step_ms=step_ms,
            phases_ms=dict.fromkeys(("data", "forward", "backward", "optimizer", "other"), 1.0)
            | {"transfer": None, "loss": 0.1},
            losses=(2.0 - number / 100 + (seed * 7 + number) % 5 / 1e3,),
            forwards=1,
            backwards=1,
            updates=1,
            minor_faults=4000.0,
            major_faults=0.0,
            peak_rss_bytes=10**8,
            peak_device_bytes=None,
            arm=None,
            mark=None,
            grad=True,
        )
        for number in range(steps)
    ]
    return Trial(ProcessRecord(Path("record"), header, made), 2.0, False)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Trials, request: Request, timeout_seconds: float) -> Trial:
        interruption.check()
        return made_up(request.settings, request.seed or 0)

    def run_two(
        self: Trials, requests: tuple[Request, Request], relay: Relay, timeout_seconds: float
    ) -> tuple[Trial, Trial]:
        one, other = (run(self, request, timeout_seconds) for request in requests)
        return one, other

    monkeypatch.setattr(trial.Trials, "run", run)
    monkeypatch.setattr(trial.Trials, "run_two", run_two)
    monkeypatch.setattr(tune, "ceilings", lambda python: None)
    monkeypatch.setattr(statistics, "has_enough_pairs", lambda logs, most: len(logs) >= 12)
    Path("train.py").write_text("pass")


def tuned(at: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of a tune that is sent a signal when it says a line that begins like this,
    of several `` > ``-separated beginnings one after the other."""
    waiting = at.split(" > ")
    begin = tuner.Tuner.__init__

    def patched(
        self: tuner.Tuner,
        command: object,
        options: object,
        opened: object,
        say: Callable[[str], None],
        *others: object,
    ) -> None:
        def told(line: str) -> None:
            say(line)
            if waiting and line.startswith(waiting[0]):
                waiting.pop(0)
                if not waiting:
                    os.kill(os.getpid(), number)

        begin(self, command, options, opened, told, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(tuner.Tuner, "__init__", patched)
    words = ["tune", "--in-place", "--knobs", "allocator", "--steps", "60", "--budget", "10m"]
    return main([*words, "--", "python", "train.py"])


NOTHING_YET = ("running the bare", "bare: ", "allocator=keep on top > pair 1: ")
PROVEN = ("allocator=keep against > pair 5: ", "allocator=keep against > pair 12: ")


@pytest.mark.usefixtures("trials")
@pytest.mark.parametrize("moment", NOTHING_YET)
def test_before_anything_is_proven_there_is_no_plan_and_it_can_go_on(
    moment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tuned(moment, signal.SIGINT, monkeypatch) == 130
    said = capsys.readouterr().err
    assert "no plan written: it was interrupted before a plan was proven" in said
    options = "--in-place --knobs allocator --steps 60 --budget 10m"
    assert f"next: flatout tune --resume {options} -- python train.py" in said
    assert not Path("flatout.toml").exists()
    journal.resume("tune", ["python", "train.py"]).close()


@pytest.mark.usefixtures("trials", "ignored")
@pytest.mark.parametrize("number", INTERRUPTIONS)
def test_what_is_proven_is_written(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tuned(PROVEN[0], number, monkeypatch) == 128 + number
    said = capsys.readouterr().err
    assert "the plan, in flatout.toml, and what each knob does:" in said
    written = plan.read(Path("flatout.toml"))
    assert written.proven
    assert written.evidence is not None
    assert written.evidence.pairs == 5
    assert written.evidence.ratio == pytest.approx(1.6, rel=1e-3)
    journal.resume("tune", ["python", "train.py"]).close()


@pytest.mark.usefixtures("trials")
def test_a_signal_while_the_plan_is_written_comes_too_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = Plan.write

    def write(self: Plan, path: Path) -> None:
        for number in INTERRUPTIONS:
            os.kill(os.getpid(), number)
        real(self, path)

    monkeypatch.setattr(Plan, "write", write)
    assert tuned("never", signal.SIGINT, monkeypatch) == 0
    assert plan.read(Path("flatout.toml")).proven
    assert [entry.name for entry in Path().glob("flatout*")] == ["flatout.toml"]
    with pytest.raises(journal.JournalError):
        journal.resume("tune", ["python", "train.py"])


@pytest.mark.usefixtures("trials")
def test_verify_that_is_interrupted_leaves_the_plan_as_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tuned("never", signal.SIGINT, monkeypatch) == 0
    before = Path("flatout.toml").read_text()
    real = pairs.step_ms
    monkeypatch.setattr(
        pairs, "step_ms", lambda done: (os.kill(os.getpid(), signal.SIGTERM), real(done))[1]
    )
    assert main(["verify", "--in-place", "--seeds", "9", "--", "python", "train.py"]) == 143
    said = capsys.readouterr().err
    assert "flatout.toml stays as it was" in said
    assert "continue: flatout verify --resume --in-place --seeds 9 -- python train.py" in said
    assert Path("flatout.toml").read_text() == before
