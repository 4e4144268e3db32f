"""The programs of the field: what each file under ``programs/`` says of itself.

A file begins with the inline metadata of PEP 723: the packages that it needs and, in the table
``tool.field``, the fields of ``Program``. The rest of the file is the program itself, or, where the
command is another's, what makes its data.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).resolve().parent / "programs"

_METADATA = re.compile(r"(?m)^# /// script$\n(?P<lines>(?:^#(?: .*)?$\n)+?)^# ///$")
"""After the reference implementation in PEP 723."""


@dataclass(frozen=True)
class Source:
    """A repository that holds the program.

    Attributes:
        repository: its address, for git.
        commit: the commit that is checked out.
        paths: what is checked out of it, as patterns of git.
    """

    repository: str
    commit: str
    paths: Sequence[str]


@dataclass(frozen=True)
class Program:
    """A program as its users start it.

    In ``command``, ``environment`` and ``working_folder``, ``{python}`` and ``{bin}`` are the
    interpreter and the folder of commands of the environment, ``{file}`` is the program's file,
    ``{source}`` the checkout of ``source``, ``{data}`` the folder of its data, ``{folder}`` the
    folder into which it writes, and ``{seed}`` its seed.

    Attributes:
        name: of its file.
        dependencies: the packages that it needs beside torch.
        title: what the table calls it.
        command: the command line.
        result: finds the result in what the program prints; each group of the last match is a
            number.
        clock: finds the time that the program itself prints, the group of the last match; ``None``:
            it prints none.
        clock_unit_s: the unit of that time, in seconds.
        environment: variables that it needs.
        prepares: its file, run by itself, makes the data.
        working_folder: where it is started; it is made if it does not exist.
        deterministic: whether the program without flatout prints the same result twice.
        source: the repository of the program.
    """

    name: str
    dependencies: Sequence[str]
    title: str
    command: Sequence[str]
    result: str
    clock: str | None = None
    clock_unit_s: float = 1.0
    environment: Mapping[str, str] = field(default_factory=dict)
    prepares: bool = False
    working_folder: str = "{folder}"
    deterministic: bool = True
    source: Source | None = None

    @property
    def file(self) -> Path:
        return PROGRAMS / f"{self.name}.py"

    def read_result(self, output: str) -> list[float] | None:
        """Return the numbers of the result that the program printed; ``None``: there is none."""
        matches = list(re.finditer(self.result, output, re.MULTILINE))
        return [float(text) for text in matches[-1].groups()] if matches else None

    def read_clock_s(self, output: str) -> float | None:
        """Return the seconds that the program says it took; ``None``: it does not say."""
        matches = list(re.finditer(self.clock, output, re.MULTILINE)) if self.clock else []
        return float(matches[-1][1]) * self.clock_unit_s if matches else None


def read_program(file: Path) -> Program:
    """Read a program's metadata.

    Raises:
        ValueError: the file has none.
    """
    found = _METADATA.search(file.read_text("utf-8"))
    if found is None:
        raise ValueError(f"{file} has no metadata")
    lines = (line[2:] for line in found["lines"].splitlines(keepends=True))
    metadata = tomllib.loads("".join(line or "\n" for line in lines))
    table = metadata["tool"]["field"]
    if "source" in table:
        table["source"] = Source(**table["source"])
    return Program(name=file.stem, dependencies=metadata["dependencies"], **table)


def read_programs() -> dict[str, Program]:
    """Return all programs by name."""
    return {file.stem: read_program(file) for file in sorted(PROGRAMS.glob("*.py"))}


@dataclass(frozen=True)
class Installed:
    """A program in an environment, ready to be started.

    Attributes:
        program: the program.
        python: the interpreter of the environment.
        home: the folder for all that the field fetches and makes.
    """

    program: Program
    python: Path
    home: Path

    @property
    def folder(self) -> Path:
        """The folder into which the program writes."""
        return self.home / "runs" / self.program.name

    @property
    def data(self) -> Path:
        return self.home / "data" / self.program.name

    @property
    def source(self) -> Path:
        """The checkout of the program's repository."""
        return self.home / "sources" / self.program.name

    @property
    def working_folder(self) -> Path:
        return Path(self._fill(self.program.working_folder, 0))

    def command(self, seed: int) -> list[str]:
        return [self._fill(word, seed) for word in self.program.command]

    def environment(self) -> dict[str, str]:
        """Return the variables of the program: those of this process and its own."""
        own = {name: self._fill(text, 0) for name, text in self.program.environment.items()}
        return {**os.environ, **own}

    def prepare(self) -> None:
        """Fetch the program's source and make its data, unless they are there.

        Raises:
            subprocess.CalledProcessError: one of both failed; what there is of it is removed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        source = self.program.source
        if source is not None and not self.source.exists():
            unfinished = self.source.with_suffix(".unfinished")
            subprocess.run(["rm", "-rf", str(unfinished)], check=True)
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            clone = ["git", "clone", "--quiet", "--no-checkout", source.repository, str(unfinished)]
            subprocess.run(clone, check=True)
            checkout = ["git", "-C", str(unfinished), "checkout", "--quiet", source.commit, "--"]
            subprocess.run([*checkout, *source.paths], check=True)
            unfinished.rename(self.source)
        if self.program.prepares and not self.data.exists():
            # Data hold their own path, so they are made in their place.
            self.data.mkdir(parents=True)
            make = [str(self.python), str(self.program.file)]
            try:
                subprocess.run(make, cwd=self.data, env=self.environment(), check=True)
            except subprocess.CalledProcessError:
                subprocess.run(["rm", "-rf", str(self.data)], check=True)
                raise
        self.working_folder.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        """Remove what the program has written."""
        subprocess.run(["rm", "-rf", str(self.folder)], check=True)
        self.folder.mkdir(parents=True)
        self.working_folder.mkdir(parents=True, exist_ok=True)

    def _fill(self, text: str, seed: int) -> str:
        return text.format(
            python=self.python,
            bin=self.python.parent,
            file=self.program.file,
            source=self.source,
            data=self.data,
            folder=self.folder,
            seed=seed,
        )
