"""Writes what a tune found as one HTML page that needs neither network nor scripts."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from flatout import __version__
from flatout.plan import Fact
from flatout.report import charts, words
from flatout.report.charts import RatioAxis
from flatout.report.markup import Markup, element, join, with_code
from flatout.tune import formatting
from flatout.tune.document import PARTS, Document, KnobResult, ProofResult, Side, TriedSettings
from flatout.wire.ratios import Ratio

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Content-Security-Policy: a browser loads and runs nothing, whatever a command line holds."""

STEP_STATISTIC = (
    "Step times are means over a run, including a share of the evaluation passes between the "
    "steps. Several runs are combined by their geometric mean. The phases of a step sum to it."
)
"""The statistic of all step times on the page."""

_UNKNOWN = "\N{EN DASH}"
"""Stands in a table for a figure that was not measured."""

_FIGURE_NAMES = {
    "added": "added share",
    "allowed": "allowed",
    "calls": "calls compared",
    "deviations": "shift in standard deviations (RMS)",
    "error": "largest error",
    "error_limit": "error allowed",
    "factor": "scale of the worst gradient",
    "factor_high": "at most",
    "factor_low": "at least",
    "factor_detectable": "smallest scale that would be detected",
    "fall": "fall of the loss",
    "compared": "values compared",
    "limit": "upper limit",
    "margin": "allowed",
    "non_finite": "values that are not finite",
    "plan": "with the plan",
    "top1_agreement": "share of rows with the same largest output",
    "top1_rows": "rows compared",
}
"""Names of the measurements of a check, by key; other keys are words that a reader knows."""

_FACT_NAMES = {
    "accelerator": "Accelerator",
    "cores": "Usable cores",
    "cpu": "Processor",
    "huge_pages": "Huge pages",
    "memory_bytes": "Memory",
    "memory_gib": "Memory",
    "system": "System",
    "torch": "PyTorch",
    "usable_cores": "Usable cores",
}

_STATE_CLASSES = {"won": "good", "failed": "bad", "slower": "bad"}
_COMPARED_ORDER = ("won", "running", "no gain", "slower", "failed", "not tried", "left out")


def html(document: Document) -> str:
    """The page of a tune."""
    style = Path(__file__).with_name("page.css").read_text("utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", f"{document.program}: flatout tune"),
        element("style", Markup(style)),
    )
    sections = (_next, _plan, _sides, _phases, _proof, _arms, _not_compared, _findings, _machine)
    body = element(
        "body",
        _header(document),
        element("main", *(section(document) for section in sections)),
        _footer(document),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _header(document: Document) -> Markup:
    claim = document.claim
    if document.plan is None:
        title = f"No plan for {document.program}"
        lead = _sentence(document.why)
    elif claim is None:
        title, lead = f"A plan for {document.program}", _sentence(document.why)
    else:
        title = f"{document.program} runs {_times(claim.value)} as fast"
        lead = (
            f"{_times(claim.low)} to {_times(claim.high)} with 95 % confidence, from "
            f"{formatting.count(claim.pairs, 'pair')} of fresh processes in alternation, the bare "
            "program against the whole plan."
        )
    return element(
        "header",
        element("p", "flatout tune", class_="eyebrow"),
        element("h1", title),
        element("p", lead, class_="lead") if lead else None,
        element("dl", *_key_figures(document), class_="facts"),
    )


def _key_figures(document: Document) -> list[Markup]:
    bare, plan = document.baseline, document.with_plan
    if document.plan is None or plan is None:
        facts = [
            ("Step", formatting.milliseconds(bare.step_ms), "mean, bare"),
            ("Start-up", formatting.duration(bare.startup_s), "bare"),
            ("Peak memory", formatting.memory(bare.peak_rss_bytes), "bare"),
            (
                "Compared",
                formatting.count(sum(one.ratio is not None for one in document.tried), "arm"),
                "",
            ),
        ]
    else:
        proof = document.proof
        verdict = formatting.NOT_MEASURED
        if proof is not None:
            verdict = proof.kind if proof.passed else words.verdict(proof)
        facts = [
            (
                "Step",
                formatting.milliseconds(plan.step_ms),
                f"mean; bare: {formatting.milliseconds(bare.step_ms)}",
            ),
            (
                "Peak memory",
                formatting.memory(plan.peak_rss_bytes),
                f"bare: {formatting.memory(bare.peak_rss_bytes)}",
            ),
            (
                "Proof",
                verdict,
                ""
                if proof is None
                else f"{formatting.count(proof.steps, 'step')}, "
                f"{formatting.count(proof.seeds, 'seed')}",
            ),
        ]
        even = words.break_even(document)
        if even is not None:
            job = f"bare: {formatting.duration(bare.job_s)}; break-even {even}"
            facts.insert(2, ("Whole job, projected", formatting.duration(plan.job_s), job))
    return [
        element(
            "div",
            element("dt", name),
            element("dd", _capital(value), element("small", note) if note else None),
        )
        for name, value, note in facts
    ]


def _next(document: Document) -> Markup | None:
    if document.next_command is None:
        return None
    return _section(
        "Next",
        element("pre", element("code", document.next_command)),
        None if document.plan is None else element("p", f"The plan is in {document.plan}."),
    )


def _plan(document: Document) -> Markup | None:
    if not document.knobs:
        return None
    heading = (
        *("Knob", "May change", "Predicted", "Inside one process", "On top of the others"),
        "By hand",
    )
    return _section(
        "The plan",
        element("p", _sentence(document.why)) if document.claim is not None else None,
        element(
            "table",
            element("thead", _row("th", heading, numbers=(2, 3, 4))),
            element("tbody", *(_knob(knob, heading) for knob in document.knobs)),
            class_="stacked knobs",
        ),
        _unknown_note(
            ratio is None
            for knob in document.knobs
            for ratio in (knob.predicted, knob.in_process, knob.gain_on_top)
        ),
    )


def _knob(knob: KnobResult, heading: Sequence[str]) -> Markup:
    name = element("code", f"{knob.knob} = {knob.setting}")
    return element(
        "tr",
        element("th", name, element("small", with_code(knob.summary)), scope="row"),
        element("td", knob.exactness, data_label=heading[1]),
        *(
            element("td", _ratio_cell(ratio), class_="number", data_label=label)
            for ratio, label in zip(
                (knob.predicted, knob.in_process, knob.gain_on_top), heading[2:], strict=False
            )
        ),
        element("td", with_code(knob.by_hand), data_label=heading[5]),
    )


def _ratio_cell(ratio: Ratio | None) -> Markup:
    if ratio is None:
        return join(_UNKNOWN)
    parts = (f"{ratio.low:.2f} to {ratio.high:.2f},", formatting.count(ratio.pairs, "pair"))
    low_to_high, count = (element("span", part, class_="unbroken") for part in parts)
    return element("span", _times(ratio.value), element("small", low_to_high, " ", count))


def _sides(document: Document) -> Markup:
    with_plan = document.with_plan
    rows = [
        (name, *(_or_dash(value) for value in values))
        for name, *values in words.sides(document.baseline, with_plan or Side())
    ]
    heading = ("", "Bare", "With the plan", "Change")
    shown = slice(None) if with_plan is not None else slice(2)
    return _section(
        "Side by side" if with_plan is not None else "The bare program",
        element(
            "table",
            element("thead", _row("th", heading[shown], numbers=(1, 2, 3))),
            element(
                "tbody",
                *(
                    _row(
                        "td",
                        (_capital(name), *map(_with_minus, values))[shown],
                        numbers=(1, 2, 3),
                    )
                    for name, *values in rows
                ),
            ),
            class_="narrow",
        ),
        _unknown_note(_UNKNOWN in row[shown] for row in rows),
        element("p", STEP_STATISTIC, class_="note"),
    )


def _phases(document: Document) -> Markup:
    sides = [("Bare", document.baseline)]
    if document.with_plan is not None:
        sides.append(("With the plan", document.with_plan))
    bars = [(name, side.phases_ms) for name, side in sides if any(side.phases_ms.values())]
    if not bars:
        return _section("Phases of a step", element("p", _sentence(formatting.NOT_MEASURED)))
    entered = [
        phase for phase in PARTS if any(side.phases_ms.get(phase) is not None for _, side in sides)
    ]
    legend = [element("li", _swatch(phase), phase) for phase in entered]
    rows = []
    for phase in entered:
        values = [side.phases_ms.get(phase) for _, side in sides]
        cells = [_or_dash(formatting.milliseconds(ms)) for ms in values]
        if len(values) == 2:
            cells.append(_with_minus(formatting.change(formatting.format_milliseconds, *values)))
        rows.append(
            _row(
                "td",
                (element("span", _swatch(phase), phase, class_="phase"), *cells),
                numbers=(1, 2, 3),
            )
        )
    heading = ("Phase", *(name for name, _ in sides), *(("Change",) if len(sides) == 2 else ()))
    return _section(
        "Phases of a step",
        charts.phases(bars),
        element("ul", *legend, class_="legend"),
        element(
            "table",
            element(
                "caption",
                "Time of each phase in a step. A phase that the program never enters is left out.",
            ),
            element("thead", _row("th", heading, numbers=(1, 2, 3))),
            element("tbody", *rows),
            class_="narrow",
        ),
        _unknown_note(side.phases_ms.get(phase) is None for phase in entered for _, side in sides),
    )


def _swatch(phase: str) -> Markup:
    return element("span", class_=f"swatch phase-{phase}")


def _proof(document: Document) -> Markup | None:
    proof = document.proof
    if proof is None:
        if document.plan is None:
            return None
        return _section("Proof", element("p", "Nothing has been proven of this plan."))
    note = words.repeatability(proof)
    return _section(
        "Proof",
        element(
            "p",
            element("span", _capital(words.verdict(proof)), class_=_verdict(proof.passed)),
            f", {proof.kind}" if proof.passed is not None else None,
            f", over the first {formatting.count(proof.steps, 'step')} with "
            f"{formatting.count(proof.seeds, 'seed')}. {_sentence(proof.why)}",
        ),
        *(element("p", _sentence(said)) for said in (words.what_passed(proof), note) if said),
        _checks(proof),
        _losses(proof),
    )


def _verdict(passed: bool | None) -> str | None:
    return {True: "state good", False: "state bad", None: "state"}[passed]


def _checks(proof: ProofResult) -> Markup | None:
    if not proof.checks:
        return None
    rows = []
    for check in proof.checks:
        verdict = {True: "passed", False: "not passed", None: "open"}[check.passed]
        told = ", ".join(
            f"{_FIGURE_NAMES.get(key, key.replace('_', ' '))}: {_fact(value)}"
            for key, value in check.measurements.items()
        )
        rows.append(
            element(
                "tr",
                element("th", check.name, scope="row"),
                element("td", element("span", verdict, class_=_verdict(check.passed))),
                element("td", check.why, element("small", told) if told else None),
            )
        )
    return element(
        "table",
        element("thead", _row("th", ("Check", "Verdict", "Why"))),
        element("tbody", *rows),
        class_="stacked checks",
    )


def _losses(proof: ProofResult) -> Markup | None:
    shown = []
    for curves in proof.curves:
        drawn = charts.curves(curves)
        if drawn is None:
            continue
        scale = " Logarithmic scale." if charts.is_logarithmic(curves) else ""
        spread = "Lines are means over the seeds, bands the spread between them."
        shown.append(
            element(
                "figure",
                element(
                    "figcaption",
                    element("strong", _capital(curves.site)),
                    element("div", f"{spread}{scale}", class_="note"),
                ),
                element("div", drawn, class_="frame"),
                element(
                    "ul",
                    element("li", element("span", class_="key bare"), "bare"),
                    element("li", element("span", class_="key"), "with the plan"),
                    class_="legend",
                ),
            )
        )
    if proof.losses:
        heading = ("Loss", "Bare", "With the plan", "Difference", "Allowed")
        rows = [
            _row(
                "td",
                (
                    proof.curves[n].site if len(proof.curves) == len(proof.losses) else f"{n + 1}",
                    formatting.loss(loss.bare_final),
                    formatting.loss(loss.plan_final),
                    _with_minus(formatting.signed(loss.difference)),
                    f"\N{PLUS-MINUS SIGN}{loss.margin:.2g}",
                ),
                heading,
                numbers=(1, 2, 3, 4),
            )
            for n, loss in enumerate(proof.losses)
        ]
        spreads = {
            words.MARGIN_SOURCES.get(loss.margin_source, loss.margin_source)
            for loss in proof.losses
        }
        shown.append(
            element(
                "table",
                element(
                    "caption",
                    f"Mean loss over the last quarter of {formatting.count(proof.steps, 'step')}. "
                    "Allowed is one standard deviation of the bare program's own spread "
                    f"{' or '.join(sorted(spreads))}.",
                ),
                element("thead", _row("th", heading, numbers=(1, 2, 3, 4))),
                element("tbody", *rows),
                class_="stacked",
            )
        )
    return join(element("h3", "Losses"), *shown) if shown else None


def _arms(document: Document) -> Markup | None:
    compared = [(entry, entry.ratio) for entry in document.tried if entry.ratio is not None]
    if document.claim is not None and not any(
        entry.stage == "fresh processes" and dict(entry.settings) == dict(document.settings)
        for entry, _ in compared
    ):
        plan = TriedSettings(
            document.settings, "the whole plan", "fresh processes", document.claim, "won"
        )
        compared.append((plan, document.claim))
    if not compared:
        return None
    axis = RatioAxis.over(ratio for _, ratio in compared)
    heading = ("Settings", axis.numbers(), "Speedup", "95 % interval", "Pairs")
    groups = []
    for stage, note in (
        ("fresh processes", "what is claimed"),
        ("inside one process", "in alternating blocks of steps, only to rank the settings"),
    ):
        entries = [(entry, ratio) for entry, ratio in compared if entry.stage == stage]
        if entries:
            entries.sort(
                key=lambda pair: (_COMPARED_ORDER.index(words.state(pair[0])), -pair[1].value)
            )
            title = element("th", stage.capitalize(), element("small", note), colspan="5")
            rows = [_forest_row(axis, entry, ratio, heading) for entry, ratio in entries]
            groups.append(element("tbody", element("tr", title), *rows))
    return _section(
        "What was tried",
        element(
            "table",
            element(
                "caption",
                "Speedup: step time of the bare program divided by that with the settings, on a "
                "logarithmic scale.",
            ),
            element(
                "thead",
                element(
                    "tr",
                    element("th", heading[0], scope="col"),
                    element("th", heading[1], class_="plot", scope="col", aria_label="plot"),
                    *(element("th", name, class_="number", scope="col") for name in heading[2:]),
                ),
            ),
            *groups,
            class_="stacked forest",
            style=axis.grid,
        ),
    )


def _forest_row(
    axis: RatioAxis, entry: TriedSettings, ratio: Ratio, heading: Sequence[str]
) -> Markup:
    figures_shown = (
        _times(ratio.value),
        f"{ratio.low:.2f} to {ratio.high:.2f}",
        f"{ratio.pairs}",
    )
    return element(
        "tr",
        element("th", entry.label, _state(entry), scope="row"),
        element("td", axis.interval(ratio, entry.state.replace(" ", "-")), class_="plot"),
        *(
            element("td", value, class_="number", data_label=name)
            for value, name in zip(figures_shown, heading[2:], strict=True)
        ),
    )


def _state(entry: TriedSettings) -> Markup:
    return element(
        "small",
        _state_word(entry),
        f": {entry.why}" if entry.why else None,
        None if entry.predicted is None else f" ({words.prediction(entry.predicted)})",
    )


def _state_word(entry: TriedSettings) -> Markup:
    state = words.state(entry)
    return element("span", state, class_=f"state {_STATE_CLASSES.get(state, '')}".strip())


def _not_compared(document: Document) -> Markup | None:
    entries = sorted(
        (entry for entry in document.tried if entry.ratio is None),
        key=lambda entry: (_COMPARED_ORDER.index(entry.state), -(entry.bound or 0.0)),
    )
    if not entries:
        return None
    heading = ("Settings", "State", "Why", "At most")
    rows = [
        element(
            "tr",
            element("th", entry.label, scope="row"),
            element("td", _state_word(entry)),
            element("td", entry.why),
            element(
                "td",
                _UNKNOWN if entry.bound is None else _times(entry.bound),
                class_="number",
                data_label=heading[3],
            ),
        )
        for entry in entries
    ]
    return _section(
        "Failed or not tried",
        element(
            "table",
            element(
                "caption",
                "At most: the largest speedup that the profile of the bare program allows.",
            ),
            element("thead", _row("th", heading, numbers=(3,))),
            element("tbody", *rows),
            class_="stacked states",
        ),
        _unknown_note(entry.bound is None for entry in entries),
    )


def _findings(document: Document) -> Markup | None:
    if not document.findings:
        return None
    shown = []
    for finding in document.findings:
        if finding.share is None:
            size = element("div", "share not measured", class_="size note")
        else:
            bar = element("div", style=f"width: {100 * min(max(finding.share, 0), 1):.1f}%")
            size = element(
                "div",
                f"at most {finding.share:.0%} of a step",
                element("div", bar, class_="share"),
                class_="size note",
            )
        shown.append(
            element(
                "li",
                element(
                    "div",
                    element("h3", _capital(finding.title)),
                    element("ul", *(element("li", said) for said in finding.evidence))
                    if finding.evidence
                    else None,
                    element("p", finding.remedy),
                ),
                size,
            )
        )
    return _section(
        "What limits the bare program",
        element("ol", *shown, class_="findings"),
    )


def _machine(document: Document) -> Markup:
    facts: dict[str, Fact | None] = {"torch": document.torch, **document.machine}
    return _section(
        "Where it was measured",
        element("pre", element("code", shlex.join(document.command))),
        element(
            "dl",
            *chain.from_iterable(
                (element("dt", _FACT_NAMES.get(name, name.replace("_", " "))), element("dd", value))
                for name, value in ((name, _with_unit(name, fact)) for name, fact in facts.items())
            ),
            *_other_work(document),
            class_="machine",
        ),
    )


def _other_work(document: Document) -> list[Markup]:
    """What others took of the CPUs while the pairs of the claim ran; nothing if there are none."""
    if document.quietness is None:
        return []
    return [element("dt", "Other work"), element("dd", words.other_work(document.quietness))]


def _footer(document: Document) -> Markup:
    said = []
    if document.seconds is not None:
        said.append(f"Tuned in {formatting.duration(document.seconds)}.")
    if document.finished_unix_s is not None:
        finished = time.gmtime(document.finished_unix_s)
        said.append(time.strftime("Finished %Y-%m-%d %H:%M UTC.", finished))
    return element("footer", " ".join([*said, f"flatout {__version__}."]))


def _section(title: str, *children: str | None) -> Markup:
    return element("section", element("h2", title), *children)


def _row(
    cell: str, values: Sequence[str], heading: Sequence[str] = (), numbers: Sequence[int] = ()
) -> Markup:
    """Make a row of a table; its first cell is its heading."""
    cells = []
    for n, value in enumerate(values):
        is_name = cell == "th" or n == 0
        cells.append(
            element(
                "th" if is_name else "td",
                value,
                scope=("col" if cell == "th" else "row") if is_name else None,
                class_="number" if n in numbers else None,
                data_label=heading[n] if heading and n else None,
            )
        )
    return element("tr", *cells)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}\N{MULTIPLICATION SIGN}"


def _with_minus(number: str) -> str:
    """Give a negative number a minus sign that is as wide as a plus sign."""
    return number.replace("-", "\N{MINUS SIGN}", 1) if number.startswith("-") else number


def _fact(value: object) -> str:
    if value is None:
        return formatting.NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _with_minus(f"{value:.6g}") if isinstance(value, float) else str(value)


def _or_dash(figure: str) -> str:
    return _UNKNOWN if figure == formatting.NOT_MEASURED else figure


def _unknown_note(unknown: Iterable[bool]) -> Markup | None:
    """Explain the dashes of a table; ``None`` if it has none."""
    return element("p", f"{_UNKNOWN} not measured", class_="note") if any(unknown) else None


def _with_unit(name: str, fact: Fact | None) -> str:
    """The value of a fact about the machine, amounts of memory in their usual unit."""
    if isinstance(fact, (int, float)):
        if name.endswith("_bytes"):
            return formatting.memory(fact)
        if name.endswith("_gib"):
            return f"{fact:g} GiB"
    return _fact(fact)


def _sentence(text: str) -> str:
    """Make a sentence of ``text``: a capital, unless it begins with code, and a full stop."""
    begins_with_code = "=" in text.partition(" ")[0]
    begun = text if begins_with_code else _capital(text)
    return begun + ("" if text.endswith((".", "!", "?")) or not text else ".")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
