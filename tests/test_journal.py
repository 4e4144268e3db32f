"""The journal of a tune: what is on disk when it is killed, and how it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flatout.plan.program import observe_program
from flatout.tune import journal
from flatout.tune.journal import Entry, Journal, JournalError
from flatout.tune.ledger import Options
from flatout.wire.request import Comparison, Relay, Request

COMMAND = ["python", "train.py"]
ASKED = Request(settings={"gc": "seldom"}, stop_steps=5, seed=3)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATOUT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def entry(opened: Journal, run: str, spent_s: float = 7.0) -> Entry:
    (opened.runs / run).mkdir()
    return Entry(run, seconds=2.5, ended=False, failure=None, tail="", spent_s=spent_s)


def begun(*requests: Request) -> Path:
    """A journal with these trials, as a tune that was killed leaves it."""
    opened = journal.begin("tune", COMMAND)
    for number, request in enumerate(requests, 1):
        opened.add([request], [entry(opened, f"run-{number}", spent_s=7.0 * number)])
    opened.close()
    return opened.path


def test_a_tune_that_goes_on_is_given_its_trials_again() -> None:
    arms = Request(comparison=Comparison(arms=({}, {"gc": "seldom"})))
    begun(ASKED, arms)
    again = journal.resume("tune", COMMAND)
    first, second = again.take_next(ASKED), again.take_next(arms)
    assert first is not None
    assert [(one.run, one.seconds) for one in first] == [("run-1", 2.5)]
    assert second is not None
    assert 14.0 <= again.spent_s < 15.0
    assert again.take_next(ASKED) is None
    again.close()


def test_a_torn_last_line_is_cut_off_and_its_trial_run_again() -> None:
    path = begun(ASKED)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "trial", "requ')
    assert len(journal.read(path)) == 2
    again = journal.resume("tune", COMMAND)
    assert again.take_next(ASKED) is not None
    assert again.take_next(ASKED) is None
    again.add([ASKED], [entry(again, "run-2")])
    again.close()
    assert [line["kind"] for line in journal.read(path)] == ["job", "trial", "trial"]
    assert path.read_bytes().startswith(whole)


def test_what_follows_another_request_is_dropped() -> None:
    path = begun(ASKED, ASKED)
    again = journal.resume("tune", COMMAND)
    assert again.take_next(ASKED) is not None
    assert again.take_next(Request(seed=99)) is None
    assert again.take_next(ASKED) is None
    again.close()
    assert len(journal.read(path)) == 2


def test_a_trial_whose_record_is_gone_is_run_again() -> None:
    path = begun(ASKED)
    (path.parent / journal.RUNS_FOLDER / "run-1").rmdir()
    assert journal.resume("tune", COMMAND).take_next(ASKED) is None


def test_without_an_interrupted_tune_there_is_nothing_to_resume() -> None:
    nothing = "no tune has been interrupted; leave --resume out"
    with pytest.raises(JournalError, match=nothing):
        journal.resume("tune", COMMAND)
    opened = journal.begin("tune", COMMAND)
    opened.finish("{}")
    opened.close()
    with pytest.raises(JournalError, match=nothing):
        journal.resume("tune", COMMAND)


def test_a_tune_of_another_job_says_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.py").write_text("pass")
    begun(ASKED)
    for command, difference in (
        (["python", "other.py"], "the arguments were train.py, are other.py"),
        ([*COMMAND, "--lr", "1"], r"unfinished one: --lr 1 is new\); leave --resume out"),
    ):
        with pytest.raises(JournalError, match=difference):
            journal.resume("tune", command)
    with pytest.raises(JournalError, match="no verify has been interrupted"):
        journal.resume("verify", COMMAND)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(JournalError, match=f"it was started in {tmp_path}"):
        journal.resume("tune", ["python", "../train.py"])
    monkeypatch.chdir(tmp_path)
    again = journal.resume("tune", ["python3", "./train.py"])  # the same in other words
    with pytest.raises(JournalError, match="still running"):
        journal.resume("tune", COMMAND)
    again.close()


def test_other_options_are_said(tmp_path: Path) -> None:
    options = Options(budget_seconds=60, steps=30)
    journal.open_journal("tune", COMMAND, options, False, pytest.fail).close()
    journal.open_journal("tune", COMMAND, options, True, pytest.fail).close()
    said: list[str] = []
    other = Options(budget_seconds=90, steps=30, knobs=("gc",))
    journal.open_journal("tune", COMMAND, other, True, said.append).close()
    (line,) = said
    assert "--budget was 60, is 90; --knobs was None, is ['gc']" in line
    in_place = Options(budget_seconds=90, steps=30, knobs=("gc",), isolate=False)
    journal.open_journal("tune", COMMAND, in_place, True, said.append).close()
    assert "--in-place was False, is True" in said[-1]


def test_the_command_that_resumes_has_the_same_options_and_is_quoted_for_a_shell() -> None:
    options = ["--resume", "--plan=my plan.toml", "--budget", "20m"]
    words = journal.format_resume_command("tune", options, ["python", "train.py", "--name", "a b"])
    assert words == (
        "flatout tune --resume '--plan=my plan.toml' --budget 20m -- python train.py --name 'a b'"
    )


def test_a_changed_program_does_not_go_on(tmp_path: Path) -> None:
    script, net = tmp_path / "train.py", tmp_path / "net.py"
    script.write_text("import net")
    net.write_text("def forward(x):\n    return x\n")

    def held(again: Journal) -> None:
        try:
            again.take_next(ASKED)
            again.record_or_check_program(observe_program(COMMAND, [str(net)]))
        finally:
            again.close()

    path = begun(ASKED, ASKED)
    held(journal.resume("tune", COMMAND))
    net.write_text("def forward(x):  # the same\n    return x\n")
    held(journal.resume("tune", COMMAND))
    net.write_text("def forward(x):\n    return -x\n")
    why = r"changed since the tune began: net.py: forward has changed; leave"
    with pytest.raises(JournalError, match=why):
        held(journal.resume("tune", COMMAND))
    again = journal.resume("tune", COMMAND)
    assert again.take_next(Request(seed=99)) is None  # nothing of before is used
    again.record_or_check_program(observe_program(COMMAND, [str(net)]))
    again.close()
    kinds = [line["kind"] for line in journal.read(path)]
    assert kinds == ["job", "program"]


def test_two_tunes_of_one_job_have_a_folder_each() -> None:
    one, other = journal.begin("tune", COMMAND), journal.begin("tune", COMMAND)
    assert one.folder != other.folder
    one.add([ASKED], [entry(one, "run-1")])
    assert len(journal.read(other.path)) == 1
    one.close()
    other.close()


def test_a_spoilt_journal_is_one_sentence() -> None:
    path = begun(ASKED)
    path.write_bytes(b"not json\n" + path.read_bytes())
    with pytest.raises(JournalError, match="line 1 is not JSON"):
        journal.read(path)
    path.write_text(json.dumps([1]) + "\n")
    with pytest.raises(JournalError, match="line 1 is not a JSON object"):
        journal.resume("tune", COMMAND)
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(JournalError, match="line 1 is not JSON"):
        journal.resume("tune", COMMAND)


def test_a_spoilt_journal_is_not_in_the_way_of_another() -> None:
    first = begun(ASKED)
    other = begun(ASKED)
    newest = max(first, other)
    newest.write_text("not json\n")
    assert journal.resume("tune", COMMAND).path == min(first, other)


@pytest.mark.parametrize("wrong", [{"run": "../x"}, {"run": 3}, {"seconds": "x"}, {"tail": None}])
def test_a_spoilt_trial_is_one_sentence(wrong: dict[str, object]) -> None:
    path = begun(ASKED)
    job, trial = path.read_text().splitlines()
    spoilt = json.loads(trial)
    spoilt["entries"][0].update(wrong)
    path.write_text(f"{job}\n{json.dumps(spoilt)}\n")
    again = journal.resume("tune", COMMAND)
    with pytest.raises(JournalError, match="holds an invalid trial"):
        again.take_next(ASKED)
    again.close()


def test_two_trials_of_a_relay_are_one_entry() -> None:
    opened = journal.begin("tune", COMMAND)
    both = [Request(relay=Relay("", place)) for place in (0, 1)]
    opened.add(both, [entry(opened, "run-1"), entry(opened, "run-2")])
    opened.close()
    again = journal.resume("tune", COMMAND)
    found = again.take_next(*both)
    assert found is not None
    assert [one.run for one in found] == ["run-1", "run-2"]
    again.close()
    (opened.runs / "run-2").rmdir()
    again = journal.resume("tune", COMMAND)
    assert again.take_next(*both) is None
    again.close()


def test_what_is_done_once_on_a_machine_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("flatout.tune.journal.time.monotonic", lambda: now_s)
    opened = journal.begin("tune", COMMAND)
    now_s += 3.0
    with opened.uncounted():
        now_s += 40.0
    now_s += 2.0
    assert opened.spent_s == pytest.approx(5.0)
    opened.close()
