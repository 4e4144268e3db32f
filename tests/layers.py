"""The packages of flatout, from the ground up, and what each imports of the others.

``python -m tests.layers`` writes the picture of it into ARCHITECTURE.md.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import flatout

ROOT = Path(flatout.__file__).parent
ARCHITECTURE = Path(__file__).parents[1] / "ARCHITECTURE.md"
BEGIN, END = "<!-- picture of the imports -->", "<!-- end of the picture -->"

LAYERS = (
    ("errors", "text"),
    ("paths",),
    ("machine",),
    ("kernels", "wire"),
    ("intercept",),
    ("knob", "optim", "parallel"),
    ("knobs",),
    ("agent", "launch", "plan"),
    ("doctor",),
    ("scaling", "tune"),
    ("report",),
    ("cli",),
)
"""Of the package, from the ground up; those of one layer do not know each other."""

HEIGHTS = {name: height for height, names in enumerate(LAYERS) for name in names}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if "hook" not in path.parts and path.name != "__main__.py" and path.parent != ROOT
} | {path.stem: path for path in ROOT.glob("*.py") if not path.stem.startswith("__")}


def imported(module: str) -> Iterator[str]:
    """Modules of flatout that a module imports anywhere, also where only types are checked."""
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            found = name.removeprefix("flatout.")
            if found == name:
                continue
            found = found if found in MODULES else found.rpartition(".")[0]
            if found:
                yield found


def part(module: str) -> str:
    """The file or folder of the package that a module belongs to."""
    return module.partition(".")[0]


def stands_on() -> dict[str, set[str]]:
    """The other packages that each package imports."""
    found: dict[str, set[str]] = {name: set() for name in HEIGHTS}
    for module in MODULES:
        found[part(module)] |= {part(other) for other in imported(module)}
    return {name: others - {name} for name, others in found.items()}


def picture() -> str:
    """One row for each layer, the highest first: its packages, what they are, what they import."""
    imports = stands_on()
    rows = ["| package | what it is | imports |", "| --- | --- | --- |"]
    for name in sorted(HEIGHTS, key=lambda name: (-HEIGHTS[name], name)):
        docstring = ast.get_docstring(ast.parse(MODULES[name].read_text("utf-8"))) or ""
        what = " ".join(docstring.split("\n\n")[0].split())
        others = ", ".join(sorted(imports[name], key=lambda other: (-HEIGHTS[other], other)))
        rows.append(f"| `{name}` | {what} | {others} |")
    return "\n".join(rows)


def with_picture(text: str) -> str:
    """ARCHITECTURE.md with the picture of today's imports in it."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{picture()}\n{END}{after}"


if __name__ == "__main__":
    ARCHITECTURE.write_text(with_picture(ARCHITECTURE.read_text("utf-8")), "utf-8")
