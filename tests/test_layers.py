"""No import runs up: what a part of the house stands on does not know the part."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import flatout

ROOT = Path(flatout.__file__).parent

LAYERS = (
    ("__init__", "errors", "text"),
    ("paths",),
    ("machine",),
    ("kernels", "wire"),
    ("intercept",),
    ("knob", "optim"),
    ("knobs",),
    ("agent", "launch", "plan"),
    ("doctor",),
    ("tune",),
    ("report",),
    ("cli",),
    ("__main__",),
)
"""Of the package, from the ground up; those of one layer do not know each other."""

HEIGHTS = {name: height for height, names in enumerate(LAYERS) for name in names}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if "hook" not in path.parts
}


def imported(module: str) -> Iterator[str]:
    """Modules of flatout that a module imports anywhere, also where only types are checked."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            found = name.removeprefix("flatout.")
            if found == name:
                continue
            yield found if found in MODULES else found.rpartition(".")[0] or "__init__"


@pytest.mark.parametrize("module", MODULES)
def test_no_import_runs_up(module: str) -> None:
    part = module.partition(".")[0]
    for other in imported(module):
        to = other.partition(".")[0]
        assert to == part or HEIGHTS[to] < HEIGHTS[part], f"{module} imports {other}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    below = {module: set(imported(module)) - {module} for module in MODULES}
    ready: set[str] = set()
    while len(ready) < len(below):
        more = {m for m, others in below.items() if m not in ready and others <= ready}
        assert more, sorted(set(below) - ready)
        ready |= more
