"""What the repository shows of a run of the suite: its figures, the tables and the page.

``measured.jsonl`` has every figure behind the tables and nothing of the machine it came from but
what the tables say, so anyone can make the tables again; the tests do.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from benchmarks.outside import Results
from benchmarks.suite import arms, page, table
from benchmarks.suite.cases import CASES, ROOT

MEASURED = ROOT / "benchmarks" / "suite" / "measured.jsonl"
MARKDOWN = ROOT / "benchmarks" / "RESULTS.md"
PAGE = ROOT / "benchmarks" / "RESULTS.html"
TABLE = ROOT / "docs" / "benchmarks.md"

BEGIN, END = "<!-- results of the suite -->", "<!-- end of the results -->"
"""Around the part of that page that comes from here."""

WAY = (
    "Made by `make bench` (`python -m benchmarks.suite`): plain programs, in copies of which each "
    "peer's own lines stand; all arms of a program run at the same time, in turns, and are timed "
    "from outside. `flatout tune` ran once for each program, with its default budget."
)

_KEPT: dict[str, Any] = {
    "program": None,
    "kind": None,
    "arm": None,
    "why": None,
    "failure": None,
    "ran_s": None,
    "number": None,
    "steps": None,
    "seconds": None,
    "settings": None,
    "claim": None,
    "peers": None,
    "commit": None,
    "optimizers": None,
    **dict.fromkeys(("step_ms", "data_share", "operators_share", "operators")),
    "diagnosis": {"flops_per_step": None},
    "machine": dict.fromkeys(
        (
            *("cpu", "usable_cores", "memory_bytes", "torch"),
            *("matmul_flops_per_s", "memory_bytes_per_s"),
        )
    ),
}
_OF_AN_ARM = dict.fromkeys(("step_s", "ran_s", "peak_bytes", "last"))


def judged(results: Results) -> dict[str, table.ProgramResult]:
    """What came out, by program, of those that were measured."""
    found = {name: table.judged(name, results) for name in CASES}
    return {name: result for name, result in found.items() if result is not None}


def markdown(results: Results, says: Collection[str] | None = None) -> str:
    """All tables, and what is missed, in words (``None``: of all targets)."""
    found = judged(results)
    lines = ["# flatout and its peers", "", WAY, ""]
    lines += [*table.conditions(results), *table.markdown(found)]
    lines += ["", *(f"Left out: {peer}: {why}." for peer, why in arms.LEFT_OUT.items())]
    lines += ["", *(f"- MISSED {what}" for what in (table.missed(found) if says is None else says))]
    return "\n".join(lines) + "\n"


def publish(results: Results) -> None:
    """Write all of it into the repository."""
    lines = (json.dumps(_kept(line)) for line in latest(results.lines))
    MEASURED.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    kept = Results(MEASURED)
    MARKDOWN.write_text(markdown(kept), "utf-8")
    PAGE.write_text(page.html(judged(kept), table.conditions(kept)), "utf-8")
    TABLE.write_text(with_table(TABLE.read_text("utf-8"), kept), "utf-8")


def with_table(text: str, results: Results) -> str:
    """The page with the short table of these results in it."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table.short(judged(results))}\n{END}{after}"


def latest(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Without floors, tunes and profiles that were measured again later."""
    kept: dict[object, Mapping[str, Any]] = {}
    for number, line in enumerate(lines):
        is_once = line["kind"] in ("floor", "tune", "rest")
        kept[(line["program"], line["kind"]) if is_once else number] = line
    return list(kept.values())


def _kept(line: Mapping[str, Any]) -> dict[str, Any]:
    kept = _chosen(line, _KEPT)
    if line["kind"] == "round":
        kept["arms"] = {name: _chosen(arm, _OF_AN_ARM) for name, arm in line["arms"].items()}
    return kept


def _chosen(value: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _chosen(value[key], inner) if inner else _short(value[key])
        for key, inner in keys.items()
        if key in value
    }


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, str):
        return value.replace(f"{ROOT}/", "")
    if isinstance(value, list):
        return [_short(item) for item in value]
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return value
