"""The codec: every type that a file may hold survives the way there and back, or is refused."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import pytest

from flatout.wire.codec import (
    OMIT_NONE,
    STRICT_JSON,
    TOML,
    Count,
    Doubles,
    Floats,
    MismatchError,
    Positive,
    decode,
    encode,
)


class Point(NamedTuple):
    step: int
    mean: float | None


@dataclass(frozen=True)
class Inner:
    low: Positive
    high: Positive

    def check(self) -> None:
        if self.low > self.high:
            raise MismatchError("must not be above high", "low")


@dataclass(frozen=True)
class Whole:
    class_: str
    steps: Count = 1
    share: float = 0.5
    is_on: bool = False
    kind: Literal["a", "b"] = "a"
    fact: str | int | float | bool = 0
    word_or_count: str | int = 0
    words: tuple[str, ...] = ()
    inner: Inner | None = None
    inners: Mapping[str, tuple[Inner, ...]] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    packed: bytes = b""
    losses: Doubles | None = None
    sample: Floats | None = field(default=None, metadata=OMIT_NONE)


WHOLE = Whole(
    class_="Net",
    fact=True,
    words=("x", "y"),
    inner=Inner(1.0, 2.0),
    inners={"one": (Inner(1.0, 1.0),)},
    points=(Point(1, 0.5), Point(2, None)),
    packed=b"\x00\xff",
    losses=array("d", [1.5, math.inf]),
    sample=array("f", [0.25]),
)


def test_what_is_encoded_is_decoded() -> None:
    plain = json.loads(json.dumps(encode(WHOLE)))
    assert decode(Whole, plain) == WHOLE
    assert plain["class"] == "Net"
    assert plain["packed"] == "AP8="
    assert plain["sample"] == "AACAPg=="
    assert "sample" not in encode(Whole("Net"))


def test_a_number_that_is_not_finite_is_written_as_asked() -> None:
    whole = Whole("Net", share=-math.inf)
    assert encode(whole)["share"] == -math.inf
    strict = encode(whole, non_finite_as_strings=True)
    assert strict["share"] == "-Infinity"
    assert decode(Whole, strict) == whole
    with pytest.raises(MismatchError, match="share must be a finite number"):
        decode(Whole, strict, TOML)
    with pytest.raises(MismatchError, match="fact must be a finite number"):
        decode(Whole, {"class": "Net", "fact": math.nan}, TOML)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({}, "it has no class"),
    "string": ({"class": 1}, "class must be a string"),
    "truth for a number": ({"steps": True}, "steps must be an integer that is not negative"),
    "negative": ({"steps": -1}, "steps must be an integer that is not negative"),
    "number for truth": ({"is_on": 1}, "is_on must be true or false"),
    "huge": ({"share": 10**400}, "share is larger than any number"),
    "none of them": ({"kind": "c"}, "kind must be one of: a, b"),
    "no scalar": ({"fact": None}, "fact must be a string, a number, or true or false"),
    "truth for a word or count": (
        {"word_or_count": True},
        "word_or_count must be a string, or an integer",
    ),
    "number for a word or count": (
        {"word_or_count": 0.5},
        "word_or_count must be a string, or an integer",
    ),
    "no list": ({"words": "xy"}, "words must be a list"),
    "an item": ({"words": ["x", 1]}, "words must be a list, and its item 1 must be a string"),
    "no object": ({"inner": []}, "inner must be an object"),
    "deep": (
        {"inners": {"one": [{"low": 1.0, "high": "x"}]}},
        "inners.one[0].high must be a positive number",
    ),
    "lacks a key": ({"inners": {"one": [{"low": 1.0}]}}, "it has no inners.one[0].high"),
    "do not go together": ({"inner": {"low": 2, "high": 1}}, "inner.low must not be above high"),
    "point": ({"points": [[1]]}, "points[0] must be a list of step, mean"),
    "of a point": ({"points": [[1, "x"]]}, "points[0].mean must be a number"),
    "base64": ({"packed": "*"}, "packed must be base64"),
    "half a number": ({"losses": "AAA="}, "losses must be an array in base64"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_mismatch_names_its_place(what: str) -> None:
    changes, message = WRONG[what]
    plain = {"class": "Net", **changes} if changes else {}
    with pytest.raises(MismatchError) as caught:
        decode(Whole, plain)
    assert str(caught.value) == message


def test_unknown_keys_are_refused_where_the_format_says_so() -> None:
    plain = {"low": 1, "high": 2, "middle": 3}
    assert decode(Inner, plain) == Inner(1.0, 2.0)
    with pytest.raises(MismatchError, match=r"middle is not known \(known: low, high\)"):
        decode(Inner, plain, STRICT_JSON)
    with pytest.raises(MismatchError, match="it must be a table"):
        decode(Inner, 3, TOML)


def test_an_integer_that_is_no_float_is_refused() -> None:
    """Figures are formatted as floats, and such an integer would raise there."""
    with pytest.raises(MismatchError, match="larger than any number"):
        decode(Counted, {"peak_bytes": 10**400})


@dataclass(frozen=True)
class Counted:
    peak_bytes: int
