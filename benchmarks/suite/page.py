"""The suite's results as one HTML page that needs no network: every arm with its interval."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.suite import arms
from benchmarks.suite.cases import CASES, ROOT
from benchmarks.suite.table import ArmResult, ProgramResult, overall, rest
from flatout import report
from flatout.report.charts import RatioAxis
from flatout.report.markup import Markup, element
from flatout.wire.ratios import Ratio

_HEADING = ("Speedup", "95 % interval", "Of the floor")


def html(found: Mapping[str, ProgramResult], conditions: Sequence[str]) -> str:
    """The page.

    Args:
        found: what came out, by program.
        conditions: sentences about machine and versions.
    """
    style = Path(report.__file__).with_name("page.css").read_text("utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", "flatout and its peers"),
        element("style", Markup(style)),
    )
    axis = RatioAxis.over(own.ratio for result in found.values() for own in result.arms.values())
    body = element(
        "body",
        element(
            "header",
            element("p", "flatout, benchmarks", class_="eyebrow"),
            element("h1", "flatout and its peers"),
            _overall(found),
            *(element("p", sentence, class_="lead") for sentence in conditions if sentence),
        ),
        element(
            "main",
            _overview(found, axis),
            *(_program(name, result, axis) for name, result in found.items()),
        ),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _overall(found: Mapping[str, ProgramResult]) -> Markup | None:
    """The geometric means over the training programs."""
    means = overall(found)
    if means is None:
        return None
    what = f"{means.programs} training programs, geometric mean"
    return element(
        "dl",
        *(
            element(
                "div",
                element("dt", name),
                element("dd", _times(value), element("small", note)),
            )
            for name, value, note in (
                ("Over bare", means.over_bare, what),
                ("Over the best right peer", means.over_peer, what),
            )
        ),
        class_="facts",
    )


def _overview(found: Mapping[str, ProgramResult], axis: RatioAxis) -> Markup:
    rows = [
        _row(
            *(axis, element("a", name, href=f"#{name}"), CASES[name].kind),
            *(result.arms["flatout"].ratio, "won"),
            _share(result, "flatout"),
        )
        for name, result in found.items()
        if "flatout" in result.arms
    ]
    return element(
        "section",
        element("h2", "flatout over bare"),
        _forest(rows, axis, "All programs.", of="Program"),
    )


def _program(name: str, result: ProgramResult, axis: RatioAxis) -> Markup:
    rows = []
    ordered: list[tuple[str, ArmResult]] = sorted(
        result.arms.items(), key=lambda item: -item[1].ratio.value
    )
    for arm, own in ordered:
        if arm == "flatout":
            what = " ".join(f"{knob}={setting}" for knob, setting in result.settings.items())
        else:
            what = arms.ARMS[arm].what
        if own.wrong is not None:
            what = f"{what}; broken: {own.wrong}"
        state = "failed" if own.wrong is not None else "won" if arm == "flatout" else "no-gain"
        rows.append(_row(axis, arm, what or "no plan", own.ratio, state, _share(result, arm)))
    without = [f"{arm}: {why}" for arm, why in result.out.items()]
    left = rest(result)
    script = Path(os.path.relpath(CASES[name].script, ROOT / "benchmarks")).as_posix()
    return element(
        "section",
        element("h2", name, id=name),
        element("p", element("a", script.removeprefix("../"), href=script)),
        _forest(rows, axis, f"{result.rounds} rounds, bare step time over the arm's."),
        element("p", left.replace("`", "")) if left else None,
        element("p", f"Without {'; '.join(without)}.") if without else None,
    )


def _forest(rows: Sequence[Markup], axis: RatioAxis, caption: str, of: str = "Arm") -> Markup:
    return element(
        "table",
        element("caption", f"{caption} Logarithmic scale."),
        element(
            "thead",
            element(
                "tr",
                element("th", of, scope="col"),
                element("th", axis.numbers(), class_="plot", scope="col", aria_label="plot"),
                *(element("th", name, class_="number", scope="col") for name in _HEADING),
            ),
        ),
        element("tbody", *rows),
        class_="stacked forest",
        style=axis.grid,
    )


def _row(axis: RatioAxis, name: str, what: str, ratio: Ratio, state: str, share: str) -> Markup:
    values = (_times(ratio.value), "", share)
    if ratio.pairs > 1:
        values = (values[0], f"{ratio.low:.2f} to {ratio.high:.2f}", share)
    return element(
        "tr",
        element("th", name, element("small", what), scope="row"),
        element("td", axis.interval(ratio, state), class_="plot"),
        *(
            element("td", value, class_="number", data_label=label)
            for value, label in zip(values, _HEADING, strict=True)
        ),
    )


def _times(ratio: float) -> str:
    return f"{ratio:.2f}\N{MULTIPLICATION SIGN}"


def _share(result: ProgramResult, arm: str) -> str:
    if result.floor is None:
        return "not known"
    return f"{result.floor.ms / result.arms[arm].step_ms:.0%}"
