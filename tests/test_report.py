"""What the user sees of a tune: the page, the words, the live table."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tune_documents import ARMS, COMMAND, curve, faster, nothing_helps, unknown

from flatout.cli import main
from flatout.errors import UserError
from flatout.report import charts, page, words
from flatout.report.live import LiveLine, Progress
from flatout.tune import formatting
from flatout.tune.document import CurvePoint, Curves, Document, QuietnessResult, TriedSettings
from flatout.tune.progress import Activity
from flatout.wire.ratios import Ratio

HOSTILE = "python </title><script>document.title='owned'</script> \"&lt;' \x1b[31m\u202e\udcff"


def hostile() -> Document:
    return dataclasses.replace(
        faster(),
        command=("python", HOSTILE),
        program=HOSTILE,
        plan=HOSTILE,
        why=HOSTILE,
        machine={HOSTILE: HOSTILE},
        tried=(*(dataclasses.replace(arm, label=HOSTILE, why=HOSTILE) for arm in ARMS),),
        knobs=(dataclasses.replace(faster().knobs[0], by_hand=HOSTILE, summary=HOSTILE),),
        next_command=HOSTILE,
    )


def forty_arms() -> Document:
    arms = tuple(
        TriedSettings(
            {"knob": str(n)},
            f"knob{n}=on",
            "inside one process",
            Ratio(0.8 + n / 40, 0.7 + n / 40, 0.9 + n / 40, 12),
            "won" if n > 20 else "no gain",
        )
        for n in range(40)
    )
    return dataclasses.replace(faster(), tried=arms)


def huge_names() -> Document:
    name = "/data/" + "very-long-folder-name" * 20 + "/train.py"
    return dataclasses.replace(
        faster(),
        command=("python", name),
        program=name,
        plan=name,
        tried=tuple(dataclasses.replace(arm, label=name, why=name) for arm in ARMS),
        machine={"x" * 300: name},
        next_command=f"flatout run --plan {name} -- python {name}",
    )


def refused() -> Document:
    """A proof that did not pass: the loss diverges."""
    proof = faster().proof
    assert proof is not None
    broken = tuple(
        CurvePoint(p.step, p.mean * 40, p.low * 40, math.inf)
        if p.step < 150 and p.mean is not None and p.low is not None
        else CurvePoint(p.step, math.nan, math.nan, math.nan)
        for p in curve(0.0)
    )
    return dataclasses.replace(
        faster(),
        plan=None,
        settings={},
        claim=None,
        with_plan=None,
        knobs=(),
        why="precision=bf16 is not proven: the loss is not finite at step 150",
        proof=dataclasses.replace(
            proof,
            passed=False,
            why="the loss is not finite at step 150",
            bare_repeats=False,
            curves=(Curves("loss 1", curve(0.0), broken), Curves("loss 2", (), ())),
            losses=(dataclasses.replace(proof.losses[0], plan_final=math.nan),) * 2,
        ),
    )


DOCUMENTS: dict[str, Callable[[], Document]] = {
    "faster": faster,
    "nothing helps": nothing_helps,
    "unknown": unknown,
    "hostile": hostile,
    "forty arms": forty_arms,
    "huge names": huge_names,
    "refused": refused,
}


class Page(HTMLParser):
    """Reads a page as a browser would, and checks that its elements are nested."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split()).replace("\N{MULTIPLICATION SIGN}", "x")

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_survives_its_file(name: str, tmp_path: Path) -> None:
    document = DOCUMENTS[name]()
    file = tmp_path / "result.json"
    file.write_text(document.to_json())
    json.loads(file.read_text(), parse_constant=pytest.fail)  # strict JSON
    again = Document.read(file)
    assert repr(again) == repr(document)  # NaN is not equal to itself
    if name != "refused":
        assert again == document


def test_ratios_of_a_knob_keep_their_keys_in_files() -> None:
    stored = json.loads(faster().to_json())["knobs"][0]
    read = faster().knobs[0]
    assert read.in_process is not None
    assert read.gain_on_top is not None
    assert stored["alone"]["value"] == read.in_process.value == 1.574
    assert stored["without_it"]["value"] == read.gain_on_top.value == 1.492


def without(key: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(faster().to_json())
    del document[key]
    return document


def changed(place: str, value: object) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(faster().to_json())
    *way, last = (int(part) if part.isdecimal() else part for part in place.split("."))
    parent: Any = document
    for part in way:
        parent = parent[part]
    parent[last] = value
    return document


WRONG: dict[str, tuple[object, str]] = {
    "not a result": ({"program": "x"}, "is not a result of flatout tune"),
    "a list": ([], "is not a result of flatout tune"),
    "newer": (changed("version", 2), "is a result of version 2, this flatout reads 1"),
    "no claim": (without("claim"), "it has no claim"),
    "settings": (changed("settings.gc", 3), "settings.gc must be a string"),
    "state": (changed("arms.1.state", "great"), "arms[1].state must be one of: won, no gain"),
    "ratio": (changed("arms.2.ratio.low", "much"), "arms[2].ratio.low must be a number"),
    "negative": (changed("claim.low", -1.0), "claim must be positive, with an interval"),
    "pairs": (changed("claim.pairs", True), "claim.pairs must be an integer"),
    "point": (changed("proof.curves.0.bare.3", [1, 2]), "bare[3] must be a list of step, mean"),
    "side": (changed("baseline", None), "baseline must be an object"),
    "command": (changed("command", "python x.py"), "command must be a list"),
    "fact": (changed("machine.cpu", []), "machine.cpu must be a string, a number, or true"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_file_that_is_no_result_is_one_sentence(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document, message = WRONG[mistake]
    file = tmp_path / "result.json"
    file.write_text(json.dumps(document))
    assert main(["report", str(file), "--html", str(tmp_path / "page.html")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"flatout: {file} ")
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_not_json_is_said(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match="is not JSON"):
        Document.read(file)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        Document.read(tmp_path / "missing.json")


def test_the_report_is_of_the_newest_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLATOUT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert main(["report"]) == 2
    assert "no tune has been finished yet" in capsys.readouterr().err
    for seconds, document in ((20, nothing_helps()), (30, faster()), (10, unknown())):
        folder = tmp_path / "home" / "tunes" / str(seconds)
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(document.to_json())
        os.utime(folder / "result.json", (seconds, seconds))
    (tmp_path / "home" / "tunes" / "running").mkdir()
    assert main(["report"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "flatout: the report is in flatout-report.html\n"
    written = (tmp_path / "flatout-report.html").read_text("utf-8")
    assert "train.py runs 2.38x as fast" in Page(written).text
    assert main(["report", "--html", "nowhere/page.html"]) == 2
    assert "there is no folder nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_page_needs_nothing_but_itself(name: str) -> None:
    html = page.html(DOCUMENTS[name]())
    read = Page(html)
    tags = {tag for tag, _ in read.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "base", "form", "a"}
    for tag, attributes in read.tags:
        assert not attributes.keys() & {"href", "src", "srcset"}
        assert not any(key.startswith("on") for key in attributes), tag
    assert not re.search(r"url\(|@import|https?:", html)
    (policy,) = (m for m in read.attributes("meta") if "http-equiv" in m)
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    html.encode("utf-8")  # whatever the command line holds
    assert not re.search(r"\bnan\b|None|\binf\b", re.sub(r"<[^>]*>", "", html))
    for attributes in read.attributes("circle") + read.attributes("rect"):
        place = attributes.get("cx") or attributes["x"]
        assert place is not None
        assert -0.01 <= float(place.removesuffix("%")) <= 100.01


def test_a_page_says_what_the_tune_found() -> None:
    read = Page(page.html(faster()))
    text = read.text
    for said in (
        "train.py runs 2.38x as fast",
        "2.31x to 2.46x with 95 % confidence, from 8 pairs of fresh processes",
        "flatout run --plan flatout.toml -- python train.py --data 'speech & <noise>' --epochs 300",
        "precision = bf16 matrix products and convolutions in half precision",
        "other random numbers of the same distribution",
        "Passed , non-inferior, over the first 200 steps with 8 seeds.",
        "those of 52 parameters agree in size and direction",
        "blocks.5.mlp.fc2.weight",
        "the compiler stops at data-dependent control flow in model.py, line 118",
        "break-even after 415 steps of 30,491, with the time of the tune",
        "largest relative error: 0.0113",
        "10 h 12 min",
        "at most 47% of a step",
        "aten::bernoulli_: 13 calls, 35% of a step",
        "share not measured",
        "Tuned in 4 min 47 s",
    ):
        assert said in text
    headings = [tag for tag, _ in read.tags if tag in ("h1", "h2", "h3")]
    assert headings.count("h1") == 1
    assert headings.index("h1") == 0


def test_every_chart_has_words_beside_it() -> None:
    html = page.html(faster())
    read = Page(html)
    charts_shown = [a for a in read.attributes("svg") if a.get("role") == "img"]
    assert len(charts_shown) == 3  # two bars, one loss
    assert html.count("<title>") == 1 + len(charts_shown)
    assert "Bare: data 4.1 ms, forward 512 ms, loss 31 ms, backward 542 ms" in read.text
    assert "bare from 4.2 at step 0 to " in read.text
    decorations = [a for a in read.attributes("svg") if a.get("aria-hidden") == "true"]
    compared = [arm for arm in ARMS if arm.ratio is not None]
    assert len(decorations) == len(compared) + 2  # the axis, and the claim
    for arm in compared:
        assert arm.ratio is not None
        assert f"{arm.ratio.low:.2f} to {arm.ratio.high:.2f}" in read.text


def test_a_page_without_a_plan_says_why() -> None:
    text = Page(page.html(nothing_helps())).text
    assert "No plan for vae.py" in text
    assert "No setting is faster than the bare program, beyond noise." in text
    assert "threads=cores slower : eliminated in round 8" in text
    assert "With the plan" not in text
    assert "Proof" not in text


def test_a_page_of_a_refused_proof_shows_the_curves_and_why() -> None:
    text = Page(page.html(refused())).text
    assert "precision=bf16 is not proven: the loss is not finite at step 150" in text.replace(
        "Precision", "precision"
    )
    assert "Not passed" in text
    assert "does not repeat its own losses" in text
    assert "Logarithmic scale." in text
    assert "1.58123 not finite" in text
    said = "\n".join(words.lines(refused()))
    assert "1.58123 bare, not finite with the plan" in said
    assert "proof: not passed" in said


def test_what_was_not_measured_is_said_so() -> None:
    text = Page(page.html(unknown())).text
    assert text.count("\N{EN DASH} not measured") == 3  # a note below each table that has dashes
    assert text.count("\N{EN DASH}") == 3 + 3 + 10 + 1
    assert text.lower().count("not measured") < 12
    assert "Nothing has been proven of this plan." in text
    assert " 0 ms" not in text


def test_hostile_names_are_text() -> None:
    html = page.html(hostile())
    read = Page(html)
    assert "</script>" not in html
    assert "</title><script>document.title='owned'</script>" in read.text
    for character in ("\x1b", "\u202e", "\udcff"):
        assert character not in html
        assert all(character not in line for line in words.lines(hostile()))
    assert r"\x1b[31m\u202e\udcff" in read.text


def test_the_axis_of_ratios_ends_near_them() -> None:
    ratios = [Ratio(1.5, 0.001, 900.0, 2), Ratio(0.97, 0.95, 0.99, 9)]
    axis = charts.RatioAxis.over(ratios)
    assert axis.low > 0.4
    assert axis.high < 3.5
    assert axis.percent(900.0) == 100
    assert axis.percent(0.001) == 0
    assert 0 < axis.percent(0.95) < axis.percent(1.0) < axis.percent(1.5) < 100
    assert 1.0 in axis.ticks
    assert axis.interval(ratios[0], "won").count("<path") == 2  # it goes on at both ends
    assert axis.interval(ratios[1], "won").count("<path") == 0
    for odd in ([], [Ratio(1.0, 1.0, 1.0, 2)], [Ratio(math.inf, 1.0, math.inf, 2)]):
        assert charts.RatioAxis.over(odd).percent(1.0) > 0


def test_long_curves_keep_their_spikes() -> None:
    points = [CurvePoint(n, 1.0, 0.9, 1.1) for n in range(10_000)]
    points[5_000] = CurvePoint(5_000, 30.0, 29.0, 31.0)
    shown = charts.thin(points)
    assert len(shown) <= charts.POINTS_SHOWN
    assert max(p.high for p in shown if p.high is not None) == 31.0
    flat = Curves("loss", (CurvePoint(0, 0.0, 0.0, 0.0),), (CurvePoint(0, 0.0, None, None),))
    assert charts.curves(flat) is not None
    assert charts.curves(Curves("loss", (), ())) is None


def test_words_of_a_plan() -> None:
    said = words.lines(faster())
    assert said[0] == (
        "faster: 2.38x (2.31 to 2.46 with 95 % confidence), 1,204 ms a step bare, 506 ms with the "
        "plan, 8 pairs of fresh processes"
    )
    assert said[1].startswith("proof: passed (non-inferior) over 200 steps, 8 seeds: the losses")
    text = "\n".join(said)
    assert re.search(r"\n  step +1,204 ms +506 ms +-58%\n", text)
    assert re.search(r"\n  compilation, first steps +0\.4 s +2\.0 s +\+1\.6 s\n", text)
    assert "break-even: after 415 steps of 30,491, with the time of the tune" in said
    plan = said.index("the plan, in flatout.toml, and what each knob does:")
    assert said[plan + 1] == (
        "  precision = bf16 (matrix products and convolutions in half precision)"
    )
    assert said[-2] == (
        "not in the plan: 1 slower, 2 no gain, 1 failed, 1 left out, 1 not tried "
        "(-v lists them with their reasons, so does 'flatout report')"
    )
    assert said[-1] == f"next: {faster().next_command}"
    assert len(said) < 20


def test_all_words_of_a_plan() -> None:
    said = words.lines(faster(), verbose=True)
    plan = said.index("the plan, in flatout.toml, and what each knob does:")
    assert "1.57x (1.51 to 1.64, 13 pairs)" in said[plan + 2]
    assert "1.49x (1.45 to 1.54, 6 pairs)" in said[plan + 2]
    assert said[plan + 3].startswith("    by hand: `with torch.autocast(")
    text = "\n".join(said)
    assert "  spikes: passed, no step stands out" in said
    assert "1.58123 bare, 1.56619 with the plan (difference -0.015; bare's own spread" in text
    assert "compile=blocks: failed: the compiler stops" in text
    assert "loader=workers: left out: the step waits for data 0.4% of its time" in text
    assert "threads=cores: 0.89x (0.86 to 0.93, 8 pairs) inside one process, slower" in text
    assert "precision=bf16: 1.57x" not in text  # it won, and is told as a knob
    assert set(words.lines(faster())[:-2]) < set(said)


def test_break_even_is_said_where_the_length_of_the_job_is_known() -> None:
    document = faster()
    unknown_job = dataclasses.replace(document.baseline, job_s=None)
    assert words.break_even(dataclasses.replace(document, baseline=unknown_job)) is None
    short_job = dataclasses.replace(document.baseline, job_s=100.0)
    said = words.break_even(dataclasses.replace(document, baseline=short_job))
    assert said == (
        "after 415 steps of 81, with the time of the tune: only if this job runs more than once"
    )
    assert words.break_even(dataclasses.replace(document, break_even_steps=None)) is None


def test_a_claim_that_does_not_cover_the_whole_job_says_so() -> None:
    document = faster()
    side = dataclasses.replace(document.baseline, job_s=100.0)
    partly = dataclasses.replace(document, baseline=side, unlike_s=60.0)
    [said] = [line for line in words.lines(partly) if "whole job:" in line]
    assert said.startswith("this speedup does not cover the whole job: 60.0 s of 1 min 40 s are in")
    whole = dataclasses.replace(document, baseline=side)
    assert not any("whole job:" in line for line in words.lines(whole))
    assert words.break_even(partly) != words.break_even(whole)  # fewer of its steps gain


def test_words_when_nothing_helps() -> None:
    said = words.lines(nothing_helps())
    assert said[0] == "no plan written: no setting is faster than the bare program, beyond noise"
    assert said[-1] == "next: flatout doctor -- python vae.py"
    assert not any("gc=frozen" in line for line in said)
    verbose = words.lines(nothing_helps(), verbose=True)
    assert any(line.startswith("  gc=frozen: 1.00x (0.98 to 1.03, 26 pairs)") for line in verbose)
    assert any(line.startswith("  cudnn=benchmark: not tried: it is for cuda") for line in verbose)


def test_a_setting_that_a_larger_budget_would_try_is_named() -> None:
    why = "trying it takes about 400 s, which wants a --budget of 23m"
    arm = TriedSettings(
        {"compile": "whole"}, "compile=whole", "fresh processes", None, "not tried", why
    )
    said = words.lines(dataclasses.replace(nothing_helps(), tried=(arm,)))
    assert f"  compile=whole: not tried: {why}" in said


def test_words_are_as_many_as_one_reads() -> None:
    assert len(words.lines(forty_arms())) < 20
    assert "not measured" in "\n".join(words.lines(unknown()))


def test_a_command_of_several_lines_stays_one() -> None:
    command = "flatout run -- python -c 'import torch\nprint(torch)'"
    document = dataclasses.replace(faster(), next_command=command)
    assert words.lines(document)[-1] == f"next: {command}"
    assert "import torch\nprint(torch)" in page.html(document)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, "not measured"),
        (0.04, "0.0 s"),
        (99.94, "99.9 s"),
        (119.6, "2 min 0 s"),
        (3599, "59 min 59 s"),
        (3599.8, "1 h 0 min"),
        (36_720, "10 h 12 min"),
        (200_000, "2 d 8 h"),
    ],
)
def test_durations(seconds: float | None, said: str) -> None:
    assert formatting.duration(seconds) == said


class Terminal(io.StringIO):
    """A file that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], Terminal]:
    def sized(columns: int, lines: int) -> Terminal:
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", str(lines))
        return Terminal()

    return sized


def shown(file: Terminal) -> list[str]:
    """Lines that were printed, without colours and cursor movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue().replace("\r", "\n")).splitlines()


PROOF = Activity("proving the plan", 3, 5, 0.0)


def test_a_live_line_shows_pair_and_time_left(terminal: Callable[[int, int], Terminal]) -> None:
    file = terminal(100, 30)
    with Progress(file=file) as progress:
        progress.show(Activity("running the bare program", None, None, 0.0), 73.2)
        progress.show(PROOF, 130.0)
        progress.show(dataclasses.replace(PROOF, pair=6, pairs=None), 0.0)
        progress.show(dataclasses.replace(PROOF, may_exceed_pairs=True), None)
    said = shown(file)
    assert "flatout: running the bare program, up to 80 s left" in said
    assert "flatout: running the bare program (0.0 s)" in said  # it stays when it is over
    assert "flatout: proving the plan: pair 3 of 5, about 3 min left" in said
    assert "flatout: proving the plan: pair 6" in said
    assert "flatout: proving the plan: pair 3 of at least 5" in said
    assert said[-1] == "flatout: proving the plan (0.0 s)"


def test_the_cursor_is_never_hidden(terminal: Callable[[int, int], Terminal]) -> None:
    file = terminal(100, 30)
    progress = Progress(file=file, verbose=True)

    def tune() -> None:
        with progress:
            progress.show(PROOF, None)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune()
    progress.say("stopped")
    assert "\x1b[?25l" not in file.getvalue()
    assert file.getvalue().endswith("flatout: stopped\n")


@pytest.mark.parametrize("columns", [1, 8, 20, 39, 50, 71, 200])
def test_a_narrow_terminal_wraps_no_line(
    columns: int, terminal: Callable[[int, int], Terminal]
) -> None:
    file = terminal(columns, 24)
    line = LiveLine(file)
    for text in ("flatout: " + 200 * "x", "flatout: \x1b[2J\u202e", ""):
        line.show(text)
    assert max(map(len, shown(file)), default=0) < max(columns, 2)
    assert "\x1b[2J" not in file.getvalue()


def test_a_line_is_written_again_only_if_it_has_changed(
    terminal: Callable[[int, int], Terminal],
) -> None:
    file = terminal(100, 24)
    line = LiveLine(file)
    line.clear()
    for _ in range(9):
        line.show("flatout: 3 of 60 steps")
    line.clear()
    assert file.getvalue() == "\r\x1b[Kflatout: 3 of 60 steps\r\r\x1b[K"


@pytest.mark.parametrize("kind", ["file", "dumb terminal"])
@pytest.mark.parametrize("verbose", [False, True])
def test_elsewhere_each_phase_is_a_line(
    kind: str,
    verbose: bool,
    terminal: Callable[[int, int], Terminal],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = terminal(100, 30) if kind == "dumb terminal" else io.StringIO()
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress(file=file, verbose=verbose) as progress:
        progress.say("pair 1: 74 ms, 25 ms, 2.9x")
        progress.show(None, 5.0)
        for pair in (1, 2, 3):
            progress.show(dataclasses.replace(PROOF, pair=pair), 125.0)
    phase = "flatout: proving the plan: pair 1 of 5, about 3 min left\n"
    if verbose:
        assert file.getvalue().startswith("flatout: pair 1: 74 ms")
        assert phase not in file.getvalue()
    else:
        assert file.getvalue() == phase


def test_quiet_is_silent(terminal: Callable[[int, int], Terminal]) -> None:
    file = terminal(100, 30)
    with Progress(quiet=True, verbose=True, file=file) as progress:
        progress.say("comparing")
        progress.show(PROOF, 5.0)
    assert file.getvalue() == ""


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
    return next((path for name in names if (path := shutil.which(name))), None)


MEASURE = """
const luminance = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const measured = (frame) => {
  const page = frame.contentDocument, view = frame.contentWindow;
  let least = 21;
  for (const element of page.body.querySelectorAll("*")) {
    const hasText = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!hasText || element.tagName === "title") continue;
    let behind = element, paper = "rgba(0, 0, 0, 0)";
    while (behind && paper === "rgba(0, 0, 0, 0)") {
      paper = view.getComputedStyle(behind).backgroundColor;
      behind = behind.parentElement;
    }
    const style = view.getComputedStyle(element);
    const ink = luminance(element.tagName === "text" ? style.fill : style.color);
    const [light, dark] = [ink, luminance(paper)].sort((a, b) => b - a);
    least = Math.min(least, (light + 0.05) / (dark + 0.05));
  }
  return {
    width: page.documentElement.scrollWidth,
    room: page.documentElement.clientWidth,
    contrast: least,
    paper: view.getComputedStyle(page.body).backgroundColor,
    scripts: page.scripts.length,
  };
};
onload = () => {
  const frames = [...document.querySelectorAll("iframe")];
  document.title = JSON.stringify(frames.map(measured));
};
"""
"""Contrast as WCAG 2.2 defines it (https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio)."""


@pytest.mark.skipif(browser() is None, reason="there is no browser on PATH")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_pages(scheme: str, tmp_path: Path) -> None:
    """No page is wider than its window, all text has contrast AA, nothing is run or complained of.

    One browser shows all of them, each in frames of 360 and 1400 pixels, and writes what it has
    measured into the title of the page around them.
    """
    names = list(DOCUMENTS)
    frames = []
    for number, name in enumerate(names):
        (tmp_path / f"{number}.html").write_text(page.html(DOCUMENTS[name]()), "utf-8")
        frames += [(name, number, width) for width in (360, 1400)]
    listed = "".join(
        f'<iframe src="{number}.html" style="width: {width}px; height: 900px; border: 0"></iframe>'
        for _, number, width in frames
    )
    (tmp_path / "all.html").write_text(
        f"<!DOCTYPE html><title>none</title>{listed}<script>{MEASURE}</script>", "utf-8"
    )
    path = browser()
    assert path is not None
    completed = subprocess.run(
        [
            path,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            "--allow-file-access-from-files",
            f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--dump-dom",
            (tmp_path / "all.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "CONSOLE" not in completed.stderr
    match = re.search(r"<title>(.*?)</title>", completed.stdout)
    assert match is not None, completed.stderr
    for (name, _, width), found in zip(frames, json.loads(match[1]), strict=True):
        assert found["width"] <= found["room"] <= width, name
        assert found["contrast"] >= 4.5, name
        is_light = found["paper"] == "rgb(255, 255, 255)"
        assert is_light == (scheme == "light"), name
        assert found["scripts"] == 0, name


def test_the_command_is_shown_as_it_was_given() -> None:
    assert f"'{COMMAND[3]}'" in Page(page.html(faster())).text


def test_the_report_says_how_quiet_it_was() -> None:
    quiet = QuietnessResult(0.02, 1.0, 5, 5)
    quiet_document = dataclasses.replace(faster(), quietness=quiet)
    assert "others" not in words.claim_line(quiet_document)
    assert "taken by others: 2% of the CPUs; 100% of the blocks" in page.html(quiet_document)
    beside = dataclasses.replace(quiet, others_share=0.3, quiet_share=0.6)
    said = words.claim_line(dataclasses.replace(faster(), quietness=beside))
    assert said.endswith(
        "; taken by others: 30% of the CPUs; 60% of the blocks of steps were undisturbed, and "
        "these count"
    )
    why = "not measurable now: 1 of 5 pairs were quiet enough"
    busy = dataclasses.replace(beside, why_not_measurable=why)
    none = dataclasses.replace(faster(), quietness=busy, claim=None)
    assert words.claim_line(none) == f"faster: {why}"
    unknown = dataclasses.replace(quiet, others_share=None)
    assert words.other_work(unknown).startswith("taken by others: not measured; ")


def test_what_others_take_is_said_without_being_asked_for() -> None:
    shown, hidden = io.StringIO(), io.StringIO()
    for file, quiet in ((shown, False), (hidden, True)):
        with Progress(quiet=quiet, file=file) as progress:
            progress.warn("others use 45% of the 2 CPUs that this job may use")
            progress.say("pair 1: 10 ms, 5 ms, 2.00x")
    assert shown.getvalue() == "flatout: others use 45% of the 2 CPUs that this job may use\n"
    assert hidden.getvalue() == ""
