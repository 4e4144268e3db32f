"""The command line itself: where the command begins, help, suggestions, completion, progress."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flatout import knobs
from flatout.cli import build_parser, main, pages
from flatout.cli.options import duration_s
from flatout.cli.verbs import verbs, verify
from flatout.wire.ratios import Ratio
from flatout.wire.record import RecordError, StepCounter, read_process

JOB_VERBS = [name for name, verb in verbs().items() if verb.TAKES_JOB]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLATOUT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FLATOUT_CACHE")
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("words", "own", "command"),
    [
        ("python train.py --steps 3", "", "python train.py --steps 3"),
        ("-- python train.py", "", "python train.py"),
        ("--budget 5m python x -- y", "--budget 5m", "python x -- y"),
        ("--budget=5m --quiet python -v", "--budget=5m --quiet", "python -v"),
        ("--seed -3 python", "--seed -3", "python"),
        ("-v -- -odd", "-v", "-odd"),
        ("--budget 5m", "--budget 5m", None),
        ("--", "", ""),
        ("", "", None),
    ],
)
def test_the_command_begins_at_the_first_word_that_is_no_option(
    words: str, own: str, command: str | None
) -> None:
    split = build_parser().verb("tune").split(words.split())
    assert split == (own.split(), None if command is None else command.split())


def test_a_command_runs_with_and_without_dashes(capfd: pytest.CaptureFixture[str]) -> None:
    job = [sys.executable, "-c", "import sys; print(sys.argv)", "--steps", "3", "--", "--json"]
    for words in (["run", "--", *job], ["run", *job], ["run", "--trust", *job]):
        assert main(words) == 0
        assert capfd.readouterr().out == "['-c', '--steps', '3', '--', '--json']\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tun", "python"], "there is no verb 'tun'; did you mean tune?"),
        (["python", "x.py"], "there is no verb 'python' (known: compare, completion, doctor, "),
        (["tune", "--budgte", "5m", "python"], "flatout tune has no option --budgte; did you mean"),
        (["tune", "--sett=x", "python"], "flatout tune has no option --sett"),
        (["knobs", "--pyton", "x"], "has no option --pyton; did you mean --python?"),
        (["knobs", "precison"], "there is no knob 'precison'; did you mean precision?"),
        (["run", "--set", "optimiser=onepass", "x"], "did you mean optimizer?"),
        (["run", "--set", "optimizer=onepas", "x"], "no setting 'onepas'; did you mean onepass?"),
        (["tune", "--exactness", "bitwize", "x"], "no class 'bitwize'; did you mean bitwise?"),
        (["tune", "--steps", "0", "x"], "--steps: '0' is not a positive integer"),
        (["verify", "--memory", "0.5", "x"], "--memory: '0.5' is less than 1"),
        (["verify", "--at-least", "fast", "x"], "--at-least: 'fast' is not a speedup such as 1.2"),
        (["doctor", "--budget", "soon", "x"], "'soon' is not a time such as 90s, 5m or 1h"),
        (["tune", "--steps"], "--steps: expected one argument"),
        (["tune"], "it stands at the end, as in: flatout tune python train.py"),
        (["report", "a", "b"], "unrecognized arguments: b"),
        (["report", "--", "b"], "flatout report takes no command"),
    ],
)
def test_a_mistake_is_one_sentence_that_helps(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("flatout: ")
    assert printed.err.count("\n") == 1
    assert said in printed.err


def help_of(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*words])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", verbs())
def test_help_has_examples_that_can_be_typed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of(name, "--help", capsys=capsys)
    assert help_of("help", name, capsys=capsys) == shown
    verb = verbs()[name]
    ending = "[--] COMMAND ..." if verb.TAKES_JOB else verb.ARGUMENT
    assert shown.splitlines()[0] == f"usage: flatout {name} [options] {ending}".rstrip()
    parser = build_parser()
    for example in verb.EXAMPLES:
        assert f"\n  {example}\n" in shown
        words = example.replace('eval "$(', "").split("#")[0].split("|")[0].rstrip(') "').split()
        assert words[:2] == ["flatout", name]
        own, command = parser.verb(name).split(words[2:])
        parser.verb(name).parse_args(own)
        assert bool(command) == verb.TAKES_JOB


def test_help_alone_tells_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of("help", capsys=capsys)
    assert help_of(capsys=capsys) == help_of("--help", capsys=capsys) == shown
    for name, verb in verbs().items():
        assert name in shown
        assert verb.SUMMARY[:30] in shown


def test_options_that_verbs_share_are_the_same() -> None:
    parser = build_parser()
    found: dict[str, dict[str, object]] = {}
    for name in verbs():
        for argument in parser.verb(name).arguments:
            for option in argument.option_strings:
                found.setdefault(option, {})[name] = (argument.metavar, argument.type)
    differing = {option for option, kinds in found.items() if len(set(kinds.values())) > 1}
    assert differing == {"--ranks"}  # of run, it may be ``env`` too
    assert found["--plan"].keys() == {"run", "tune", "verify"}
    assert found["--in-place"].keys() == found["--verbose"].keys() == {"doctor", "tune", "verify"}
    assert found["--steps"].keys() == found["--in-place"].keys()


def test_old_spellings_still_work() -> None:
    doctor = build_parser().verb("doctor")
    assert doctor.parse_args(["--seconds", "7.5"]).budget == 7.5
    assert "--seconds" not in doctor.format_help()


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("5m", 300), ("1h", 3600), ("45", 45), ("0.5m", 30)]
)
def test_times(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


def without_torch(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """flatout in a process that cannot import torch, and finds no Python that can."""
    code = (
        "import sys; from importlib.machinery import PathFinder; found = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *a: None if name == 'torch' else found(name, *a)\n"
        "sys.executable = 'no-python'\n"
        "from flatout.cli import main; raise SystemExit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "PATH": str(folder), "COLUMNS": "250"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_knobs_are_listed_without_torch(tmp_path: Path) -> None:
    done = without_torch(tmp_path, "knobs")
    assert (done.returncode, done.stderr) == (0, "")
    for name, knob in knobs.registry().items():
        for setting in knob.settings:
            assert f"{name} {setting} " in " ".join(done.stdout.split())
    assert "has not been measured yet" in done.stdout
    assert not (tmp_path / "home" / "cache" / "machine.json").exists()
    one = without_torch(tmp_path, "knobs", "gc")
    assert (one.returncode, one.stderr) == (0, "")


@pytest.mark.parametrize("typed", ["tu", "tune --bu", "tune python tr", "run --plan fl"])
def test_bash_completes(typed: str, tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    for name in ("train.py", "flatout.toml"):
        (tmp_path / name).touch()
    words = ["flatout", *typed.split()]
    script = (
        f'eval "$({sys.executable} -m flatout completion bash)"; COMP_WORDS=({" ".join(words)}); '
        f'COMP_CWORD={len(words) - 1}; _shtab_flatout; echo "${{COMPREPLY[*]}}"'
    )
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    wanted = {"tu": "tune", "--bu": "--budget", "tr": "train.py", "fl": "flatout.toml"}
    assert done.stdout.split() == [wanted[words[-1]]], done.stderr


def test_completion_without_shtab_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert "pip install 'flatout[completion]'" in capsys.readouterr().err


PROGRAM = """
import torch
net = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for _ in range(50):
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
"""


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of 50 steps."""
    folder = tmp_path_factory.mktemp("recorded")
    subprocess.run(
        [sys.executable, "-m", "flatout", "run", "--", sys.executable, "-c", PROGRAM],
        env={**os.environ, "FLATOUT_HOME": str(folder)},
        check=True,
        capture_output=True,
    )
    (found,) = folder.glob("runs/*/record-*.jsonl")
    return found


def test_steps_are_counted_as_they_come(record: Path, tmp_path: Path) -> None:
    whole = record.read_bytes()
    growing = tmp_path / record.name
    counter = StepCounter(tmp_path)
    assert counter.count() == 0
    counts = []
    for end in range(0, len(whole) + 97, 97):  # lines are torn in many places
        growing.write_bytes(whole[:end])
        counts.append(counter.count())
    assert counts == sorted(counts)
    recorded = len(read_process(record).steps)
    assert recorded == 50
    assert recorded - 1 <= counts[-1] <= recorded  # the last ends when the record does
    seen = [json.loads(line)["kind"] for line in whole.splitlines()]
    assert seen.count("trace") >= 1


def test_what_was_counted_is_not_read_again(record: Path, tmp_path: Path) -> None:
    growing = tmp_path / record.name
    growing.write_bytes(record.read_bytes())
    counter = StepCounter(tmp_path)
    before = counter.count()
    growing.write_bytes(b"x" * growing.stat().st_size)
    assert counter.count() == before
    with growing.open("ab") as file:
        file.write(b"no JSON\n")
    with pytest.raises(RecordError):
        counter.count()


def test_the_documentation_is_that_of_the_code(tmp_path: Path) -> None:
    pages.write_pages(tmp_path)
    docs = Path(__file__).parents[1] / "docs"
    for folder in ("knobs", "verbs"):
        names = {page.name for page in (tmp_path / folder).iterdir()}
        assert names == {page.name for page in (docs / folder).iterdir()}
        for name in names:
            written, kept = tmp_path / folder / name, docs / folder / name
            assert written.read_text("utf-8") == kept.read_text("utf-8"), "run: make docs"


@pytest.mark.parametrize(
    ("low", "at_least", "said"),
    [
        (1.2, None, None),
        (1.2, 1.2, None),
        (
            1.19,
            1.2,
            "the speedup of 1.30x (1.19 to 1.40, 5 pairs) is not shown to be at least 1.2x",
        ),
        (None, 1.5, "no speedup is proven, so it is not shown to be at least 1.5x"),
    ],
)
def test_verify_tells_whether_a_speedup_is_large_enough(
    low: float | None, at_least: float | None, said: str | None
) -> None:
    claim = None if low is None else Ratio(1.3, low, 1.4, 5)
    assert verify.find_shortfall(claim, at_least) == said
