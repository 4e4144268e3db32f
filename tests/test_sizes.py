"""No class with more than 20 methods, no function with more than 60 lines, but for a reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import flatout

ROOT = Path(flatout.__file__).parent
CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
MOST_METHODS, MOST_LINES = 20, 60


def large(path: Path) -> Iterator[tuple[str, int]]:
    """Names of classes and functions that are larger, and how large."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ClassDef):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            if len(methods) > MOST_METHODS:
                yield node.name, len(methods)
        elif isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            first = node.body[0]
            is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            start = first.end_lineno if is_docstring else node.lineno
            assert start is not None
            if node.end_lineno - start > MOST_LINES:
                yield node.name, node.end_lineno - start


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_larger_has_a_reason(path: Path) -> None:
    reasons = CONTRIBUTING.read_text("utf-8")
    without = [f"{name}: {size}" for name, size in large(path) if f"`{name}`" not in reasons]
    assert not without
