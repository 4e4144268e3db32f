"""No import runs up, nor in a circle: a part of the house does not know what stands on it."""

from __future__ import annotations

import pytest

from tests.layers import ARCHITECTURE, HEIGHTS, MODULES, imported, part, with_picture


@pytest.mark.parametrize("module", MODULES)
def test_no_import_runs_up(module: str) -> None:
    for other in imported(module):
        is_below = HEIGHTS[part(other)] < HEIGHTS[part(module)]
        assert part(other) == part(module) or is_below, f"{module} imports {other}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    below = {module: set(imported(module)) - {module} for module in MODULES}
    ready: set[str] = set()
    while len(ready) < len(below):
        more = {m for m, others in below.items() if m not in ready and others <= ready}
        assert more, sorted(set(below) - ready)
        ready |= more


def test_the_picture_is_that_of_the_imports() -> None:
    """``make docs`` draws it."""
    text = ARCHITECTURE.read_text("utf-8")
    assert with_picture(text) == text
