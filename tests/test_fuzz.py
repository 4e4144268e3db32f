"""Files that a user or a killed run may have left, spoilt in ten thousand ways: one sentence each.

Real documents are mutated: values, keys, lines, bytes, depth and length. Either the reader takes
the result, or it says in one line, fit for a terminal, what is wrong.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flatout import machine, plan, text
from flatout.launch import environment, process
from flatout.plan import Check, Evidence, LossEvidence, Plan, PlanError
from flatout.plan.program import Program
from flatout.report import page
from flatout.tune import journal
from flatout.tune.document import Document, DocumentError
from flatout.tune.journal import Entry, JournalError
from flatout.wire.lines import Learned
from flatout.wire.record import RecordError, read_run, read_step_times
from flatout.wire.request import (
    Comparison,
    GuardRequest,
    Inspection,
    ProvenConditions,
    ProvenLoss,
    Relay,
    Request,
    RequestError,
)
from flatout.wire.writer import reason_record_incomplete
from tests.tune_documents import nothing_helps

Mutation = tuple[int, int, int, int]

MUTATIONS = st.lists(st.tuples(*(st.integers(0, 2**16) for _ in range(4))), min_size=1, max_size=3)
"""What is done, where, with what, how: each is taken modulo what there is."""


def fuzzed(examples: int) -> Any:
    """Settings under which every run tries the same examples."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def chosen(of: Sequence[Any], number: int) -> Any:
    return of[number % len(of)]


def is_one_sentence(error: Exception) -> None:
    said = str(error)
    assert said
    assert said.isprintable(), said
    assert len(said) < 2000


TOML_VALUES = (
    *("nan", "-inf", "inf", "-1", "0", "1e999", "9" * 500, "-" + "9" * 400, "0x" + "f" * 60),
    *("true", '""', '"\\u001b[2J"', '"\\u0000"', "'x'", '"\x1b[31m"', "1979-05-27", "07:32:00"),
    *("[]", "{}", "[1, 'x']", "[[1]]", "{a = 1}", "{a = {b = nan}}", '["\\u001b"]', '"../../etc"'),
    *(
        "[" * 60 + "]" * 60,
        "{a=" * 60 + "1" + "}" * 60,
        '"""',
        "'''\nx\n'''",
        '"',
        "[",
        "=",
        "\x00",
    ),
    *('"passed"', '"seeds"', "0.5", "3", '["float32[*,2]"]', '{gc = "seldom"}', "{gc = 1.5}"),
)
TOML_KEYS = (
    *("x", '""', '"\\u001b[31m"', "version", "a.b", '"a.b"', "ratio", "steps", "settings", "plan"),
    *("'\x1b'", "__init__", '"../../etc/passwd"', "\u043a", "a" * 300, "[x]", "[[x]]", "bytes"),
)

PROVEN = Plan(
    settings={"precision": "bf16", "gc": "seldom"},
    command=("python", "train.py", "--lr", "1"),
    program=Program({"train.py": {"bytes": "0" * 12, "module": "1" * 12}}, {"HOME": "unset"}),
    inputs=("float32[*,2]",),
    machine={"cpu": "Some CPU", "cores": 2},
    evidence=Evidence(
        settings={"precision": "bf16"},
        ratio=1.2,
        ratio_low=1.1,
        ratio_high=1.3,
        pairs=3,
        bare_step_ms=2.0,
        plan_step_ms=1.0,
        steps=10,
        seeds=3,
        bare_repeats=True,
        verdict="non-inferior",
        in_process={"precision": 1.5},
        losses=(LossEvidence(1.0, 1.0, 0.0, 0.1, "seeds", (2.0, 1.0), (2.0, 1.0)),),
        checks=(Check("losses", "passed", "they agree", {"limit": 0.01}),),
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def plans(folder: Path) -> list[list[bytes]]:
    """The lines of some plans: a whole one, and parts of it, which are read sooner."""
    path = folder / "flatout.toml"
    PROVEN.write(path)
    whole = path.read_bytes().splitlines(keepends=True)
    Plan(settings={"gc": "seldom"}, learned={"gc": 1.2}).write(path)
    learned = path.read_bytes().splitlines(keepends=True)
    at = whole.index(b"[evidence]\n")
    short = b'[plan]\ngc = "seldom"\n'.splitlines(keepends=True)
    old = b'version = 1\n[plan]\n[job]\nprogram_sha256 = "00"\n'.splitlines(keepends=True)
    return [whole, whole[3:at], short + whole[at : at + 14], learned, short, old]


def mutated_lines(lines: list[bytes], mutations: Iterable[Mutation]) -> bytes:
    """A TOML document with some changes."""
    lines = list(lines)
    for what, where, which, how in mutations:
        if not lines:
            break
        at = where % len(lines)
        key, equals, value = lines[at].partition(b" = ")
        new_value, new_key = chosen(TOML_VALUES, which).encode(), chosen(TOML_KEYS, which).encode()
        action = what % 9
        if action <= 2:
            lines[at] = key.rstrip() + b" = " + new_value + b"\n"
        elif action == 3:
            lines[at] = new_key + (equals + value or b"\n")
        elif action == 4:
            del lines[at]
        elif action == 5:
            lines.insert(how % len(lines), lines[at])
        elif action == 6:
            lines[at] = b"[" + lines[at].strip() + b"]\n"
        elif action == 7:
            lines[at] = spoilt_bytes(lines[at], which, how)
        else:
            lines = b"".join(lines)[: which % 2000].splitlines(keepends=True)
    return b"".join(lines)


def spoilt_bytes(data: bytes, at: int, how: int) -> bytes:
    """One byte of it is another, and what follows may be cut off."""
    spoilt = bytearray(data or b" ")
    spoilt[at % len(spoilt)] = how % 256
    return bytes(spoilt[: at % len(spoilt)] if how % 3 == 0 else spoilt)


@pytest.mark.long
@fuzzed(10_000)
@given(which=st.integers(0, 5), mutations=MUTATIONS)
def test_plans(
    folder: Path, plans: list[list[bytes]], which: int, mutations: list[Mutation]
) -> None:
    path = folder / "spoilt.toml"
    path.write_bytes(mutated_lines(plans[which], mutations))
    try:
        read = plan.read(path)
    except PlanError as error:
        is_one_sentence(error)
    else:
        read.differences(["python", "train.py"], {"cores": 2, "cpu": "x"})
        if read.evidence is not None:
            assert read.evidence.ratio > 0


@pytest.mark.parametrize(
    "content",
    [
        "version = 2\nplan = " + "[" * 3000 + "]" * 3000 + "\n",
        "[plan]\n[machine]\nx = " + "{a=" * 2000 + "1" + "}" * 2000 + "\n",
        "[plan]\n[machine]\nx = " + "9" * 5000 + "\n",
        "[plan]\n" + "a" * 100_000 + ' = "x"\n',
        "[plan]\nplan.gc.x = 1\nplan.gc = 1\n",
        "\ufeff[plan]\n",
        "[plan",
    ],
)
def test_plans_that_are_deep_or_long(folder: Path, content: str) -> None:
    path = folder / "deep.toml"
    path.write_text(content)
    with pytest.raises(PlanError) as caught:
        plan.read(path)
    is_one_sentence(caught.value)


JSON_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**30, 10**400, -(2**63), 1.5, float("nan"), float("inf"), 1e308),
    *("x", "", "\x1b[2J", "\x00\r\n", "A" * 20, "\ud800", "../../x", "2026"),
    *([], {}, [[]], [{}], {"x": []}, [1, "x"], ["\x1b[31m"], {"\x1b": "\x07"}, [None] * 3),
    base64.b64encode(bytes(range(256))).decode(),
    base64.b64encode(b"\xff" * 4000).decode(),
    base64.b64encode(b"\x00\x7f" * 40).decode(),
)


def mutated(document: Any, mutations: Iterable[Mutation]) -> Any:
    """A JSON document with some values, keys and items changed."""
    document = json.loads(json.dumps(document))
    for what, where, which, how in mutations:
        places = _places(document) if isinstance(document, (dict, list)) else []
        if not places:
            break
        container, key = chosen(places, where)
        action = what % 6
        if action <= 2:
            container[key] = chosen(JSON_VALUES, which)
        elif action == 3:
            del container[key]
        elif action == 4:
            for _ in range(how % 40):
                container[key] = [container[key]]
        elif isinstance(container, dict):
            container[str(chosen(JSON_VALUES, which))] = container[key]
        else:
            container.append(chosen(JSON_VALUES, which))
    return document


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every container and key in a document."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        container = waiting.pop()
        keys = container.keys() if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                waiting.append(container[key])
    return found


def spoilt_lines(documents: Sequence[Any], mutations: Sequence[Mutation]) -> bytes:
    """A file of JSON lines with some changes."""
    kept = list(documents)
    data: bytes | None = None
    for mutation in mutations:
        what, where, which, how = mutation
        action = what % 10
        if data is not None or action == 9:
            data = spoilt_bytes(data or _as_lines(kept), which * how, how)
        elif action <= 5:
            kept[where % len(kept)] = mutated(
                kept[where % len(kept)], [(which, how, where + which, what)]
            )
        elif action == 6:
            kept.insert(where % len(kept), kept[which % len(kept)])
        elif action == 7:
            kept[where % len(kept)] = chosen(JSON_VALUES, which)
        else:
            other = how % len(kept)
            kept[where % len(kept)], kept[other] = kept[other], kept[where % len(kept)]
    return _as_lines(kept) if data is None else data


def _as_lines(documents: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(document).encode() + b"\n" for document in documents)


PROGRAM = """
import torch
net = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2))
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for number in range(8):
    net.train()
    loss = net(torch.randn(3, 4)).square().mean()
    loss.backward()
    optimizer.step()
    if number < 2:
        net.eval()
        with torch.no_grad():
            net(torch.ones(2, 4))
"""


LEARNED = Learned("gc", "seldom", True, 1.1, 1.0, 1.2, 9)


@pytest.fixture(scope="module")
def record(folder: Path) -> list[Any]:
    """The lines of a real record, in which every kind of line is."""
    run, script = folder / "run", folder / "program.py"
    run.mkdir()
    script.write_text(PROGRAM)
    request = Request(
        stop_steps=4,
        profile_steps=1,
        inspection=Inspection(gradient_steps=1, state=True, outputs=2),
    )
    request.write(run)
    ended = process.run([sys.executable, str(script)], environment.job_environment(run, {}))
    assert ended.returncode == 0
    (path,) = run.glob("record-*.jsonl")
    documents = [json.loads(line) for line in path.read_text().splitlines()]
    for document in documents:
        if document["kind"] == "profile":
            del document["operators"][3:]
    documents.insert(-1, {"kind": "learned", "settings": [LEARNED.__dict__]})
    kinds = {document["kind"] for document in documents}
    assert kinds >= {
        *("header", "trace", "losses", "inputs", "imported_files", "gradients", "outputs", "state"),
        *("learned", "event", "end", "profile"),
    }
    return documents


@pytest.mark.long
@fuzzed(10_000)
@given(mutations=MUTATIONS)
@example(mutations=[(7, 1, 0, 0)])
def test_records(folder: Path, record: list[Any], mutations: list[Mutation]) -> None:
    run = folder / "spoilt"
    run.mkdir(exist_ok=True)
    (run / "record-1.jsonl").write_bytes(spoilt_lines(record, mutations))
    for reader in (read_run, read_step_times):
        try:
            read: Any = reader(run)  # type: ignore[operator]
        except RecordError as error:
            is_one_sentence(error)
            continue
        events = read.processes[0].events if reader is read_run else read.events
        assert all(text.printable(said) == said for e in events for said in (e.subject, e.why))


def test_records_that_are_deep_or_long(folder: Path) -> None:
    run = folder / "deep"
    run.mkdir()
    header = '{"kind": "header", "version": 5, "a": %s}\n'
    for value in ("[" * 100_000 + "]" * 100_000, "9" * 5000, "1e400"):
        (run / "record-1.jsonl").write_text(header % value)
        for reader in (read_run, read_step_times):
            try:
                reader(run)  # type: ignore[operator]
            except RecordError as error:
                is_one_sentence(error)
    (run / "incomplete-1-x").touch()
    (run / "incomplete-2-999999999999999999999").touch()
    assert reason_record_incomplete(run) is None


REQUEST = Request(
    settings={"gc": "seldom"},
    comparison=Comparison(({}, {"gc": "seldom"})),
    relay=Relay("x", 0),
    proof=ProvenConditions(("gc",), "2.9", ("float32[2]",), ("x.py",)),
    inspection=Inspection(1, True, 2),
    guard=GuardRequest(3, (ProvenLoss(1.0, 0.1),)),
)


def _read_report(path: Path) -> None:
    page.html(Document.read(path))


def _read_request(path: Path) -> None:
    path.rename(path.with_name("request.json"))
    Request.read(path.parent)


def _read_journal(path: Path) -> None:
    opened = journal.Journal(path.parent)  # which is locked until it is closed
    try:
        opened.take_next(Request())
        opened.record_or_check_program(Program({"x.py": {"bytes": "0"}}))
    finally:
        opened.close()


JOURNAL = [
    {"kind": "job", "version": 1, "verb": "tune", "command": ["python"], "folder": "/"},
    {"kind": "program", "files": {"x.py": {"bytes": "0"}}, "environment": {}, "folder": "."},
    {
        "kind": "trial",
        "requests": [json.loads(json.dumps(Request().__dict__))],
        "entries": [Entry("..", 1.0, True, None, "", 2.0).__dict__],
    },
]

READERS: dict[str, tuple[Callable[[Path], None], str, list[Any], type[Exception]]] = {
    "result": (_read_report, "result.json", [json.loads(nothing_helps().to_json())], DocumentError),
    "request": (
        _read_request,
        "any.json",
        [{"version": 1, **json.loads(json.dumps(REQUEST, default=lambda part: part.__dict__))}],
        RequestError,
    ),
    "journal": (_read_journal, "journal.jsonl", JOURNAL, JournalError),
}


@pytest.mark.parametrize("what", READERS)
def test_other_files(folder: Path, what: str) -> None:
    reader, name, documents, refusal = READERS[what]
    place = folder / what
    place.mkdir()

    @fuzzed(1000)
    @given(mutations=MUTATIONS)
    def read(mutations: list[Mutation]) -> None:
        (place / name).write_bytes(spoilt_lines(documents, mutations))
        try:
            reader(place / name)
        except refusal as error:
            is_one_sentence(error)

    read()


def test_measured_ceilings(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be read is measured anew, and it is said."""
    measured = machine.Ceilings("python", "2.9", 2, {"float32": 1.0}, 2.0, None, {}, 3.0, {})
    monkeypatch.setenv("FLATOUT_CACHE", str(folder))
    monkeypatch.setattr(machine, "_torch_version", lambda _: "2.9")
    monkeypatch.setattr(machine, "_measure", lambda _: measured)
    machine.ceilings("python")
    path = folder / "machine.json"
    whole = json.loads(path.read_text())

    @fuzzed(1000)
    @given(mutations=MUTATIONS)
    def read(mutations: list[Mutation]) -> None:
        path.write_bytes(spoilt_lines([whole], mutations))
        found = machine.ceilings("python")
        assert found.threads == 2
        assert capsys.readouterr().err.replace("\n", "").isprintable()

    read()
