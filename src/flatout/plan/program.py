"""What a job's program is, so that a plan can tell whether it is still the one of its proof.

A program consists of source files, arguments, and the environment variables that its source names:

- The *files* are those that its processes have imported from outside the standard library and
  site-packages (the agent records these), the scripts and configuration files that the command
  names, and those that its Python source names. Data is not looked at.
- The *digests* of a file tell what has changed. ``bytes`` is the digest of the whole file. Python
  source also has a digest for each function and one for everything outside of functions; these
  ignore comments, layout and docstrings. Paths are relative to the folder of the main script, so
  that a checkout may move.
- The *arguments* are compared as options with their values, in any order; ``--lr=1`` is the same as
  ``--lr 1``, and paths are the same if they lead to the same file.

Source is parsed; nothing is run or imported.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BYTES, MODULE = "bytes", "module"
"""Keys of a file's digests: the digest of all its bytes, and that of everything outside of its
functions."""

SCRIPT_SUFFIXES = frozenset((".py", ".sh", ".bash", ".zsh"))
_CONFIGURATION_SUFFIXES = frozenset(
    (".yaml", ".yml", ".toml", ".ini", ".cfg", ".conf", ".gin", ".jsonnet", ".json")
)
_NAMED_IN_SOURCE = (SCRIPT_SUFFIXES | _CONFIGURATION_SUFFIXES) - {".json"}
"""JSON files are left out: a JSON file that the source names is often one that the program
writes."""

_HASHED_BYTES = 16 * 2**20
"""A larger file counts as data."""
_PARSED_BYTES = 4 * 2**20
"""Once all Python source so far exceeds this, a file has only the digest of its bytes, because
parsing takes a second for each MiB."""
_DIGEST_CHARACTERS = 12
"""48 bits protect against changes, not against attacks."""

COVERED = frozenset(
    f"{many}{unit}"
    for unit in ("epochs", "steps", "iters", "iterations")
    for many in ("", "max_", "total_", "train_", "max_train_", "num_train_")
) | {
    *("n_epochs", "num_epochs", "total_timesteps", "num_iters", "num_iterations", "n_iterations"),
    *("seed", "random_seed", "manual_seed"),
}
"""Options (with ``_`` for ``-``) whose numbers a proof covers: how long the program trains, because
a proof is about the first steps, and seeds, because it covers several. ``num_steps`` is not among
them, because it is often the length of a rollout."""

_PLAIN_FLAGS = frozenset(("-u", "-B", "-q", "-v", "-s", "-P"))
"""Flags of the interpreter that change nothing that a program computes."""

_NOT_COMPARED = re.compile(
    r"FLATOUT_.*|SLURM_.*|MASTER_.*|(LOCAL_|GROUP_|ROLE_)?RANK|HOME|USER|LOGNAME|PATH|PWD|OLDPWD|"
    r"SHELL|TERM|HOSTNAME|TMPDIR|TEMP|TMP|.*(KEY|TOKEN|SECRET|PASSW|CREDENTIAL).*",
    re.IGNORECASE,
)
"""Variables that differ from run to run, and those that may hold a secret."""
_UNSET = "unset"

_MANY = 3
"""This many changes are named; the rest is counted."""

Digests = Mapping[str, str]


@dataclass(frozen=True)
class Program:
    """A program as a proof has seen it.

    Attributes:
        files: path, relative to the main script's folder -> its digests.
        environment: variables that its source names -> digest of their value, or ``unset``.
        folder: where it was started, relative to the main script's folder.
        arguments: the words of its command, with paths relative to the main script's folder.
    """

    files: Mapping[str, Digests] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: str = "."
    arguments: tuple[str, ...] = ()

    def changes(self, command: Sequence[str]) -> list[str]:
        """A clause for each file or variable that has changed."""
        here = home(command)
        found = []
        for name, recorded in self.files.items():
            found += _changes_of_file(name, recorded, here / name)
        for name, digest in self.environment.items():
            if _digest_of_variable(name) != digest:
                found.append(f"the environment variable {name} has changed")
        return found

    def paths(self, command: Sequence[str]) -> list[str]:
        """The paths of its files for this command, with links resolved."""
        here = home(command)
        return [os.path.realpath(here / name) for name in self.files]


def observe_program(command: Sequence[str], modules: Iterable[str] = ()) -> Program:
    """Look at the program of a command as it is now.

    Args:
        command: the job, started in the current folder.
        modules: files that its processes have imported, as recorded by the agent.
    """
    here = home(command)
    files: dict[str, Digests] = {}
    variables: set[str] = set()
    waiting = [*_named_files(command), *map(Path, modules)]
    parsed_bytes = 0
    while waiting:
        path = Path(os.path.realpath(waiting.pop(0)))
        name = os.path.relpath(path, here)
        data = None if name in files else _content(path)
        if data is None:
            continue
        parsed_bytes += len(data) if path.suffix in SCRIPT_SUFFIXES else 0
        source = _Source(path, data) if parsed_bytes <= _PARSED_BYTES else None
        files[name] = {BYTES: _digest(data), **({} if source is None else source.digests)}
        if source is not None:
            variables |= source.variables
            waiting += source.named_files((here, Path.cwd(), path.parent))
    compared = sorted(name for name in variables if not _NOT_COMPARED.fullmatch(name))
    return Program(
        files=dict(sorted(files.items())),
        environment={name: _digest_of_variable(name) for name in compared},
        folder=_folder(here),
        arguments=_relative(command, here),
    )


def changes_between(before: Program, after: Program) -> list[str]:
    """A clause for each difference between two looks at a program; a file that is new is none."""
    found = []
    for name, recorded in before.files.items():
        if name in after.files:
            found += _clauses(name, recorded, after.files[name])
        else:
            found.append(f"{name} is gone")
    return found


def home(command: Sequence[str]) -> Path:
    """The folder that the paths of a program are relative to: the folder of its main script.

    For ``-m package`` it is the folder that holds the package; otherwise it is the current one.
    """
    main = main_file(command)
    if main is not None:
        return Path(os.path.realpath(main)).parent
    top = _module(command).partition(".")[0]
    folders = [".", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    for folder in folders if top else ():
        if os.path.isdir(os.path.join(folder, top)) or os.path.isfile(
            os.path.join(folder, f"{top}.py")
        ):
            return Path(os.path.realpath(folder))
    return Path(os.path.realpath(os.curdir))


def main_file(command: Sequence[str]) -> Path | None:
    """The script that a command runs: the first source file that it names, if it names one."""
    for word in command:
        path = Path(word)
        if path.suffix in SCRIPT_SUFFIXES and _is_file(path):
            return path
    first = Path(command[0]) if command else Path()
    if _is_own(first, command[0] if command else "") and (_content(first) or b"").startswith(b"#!"):
        return first
    return None


@dataclass(frozen=True)
class ArgumentChanges:
    """How the arguments of two commands differ, one clause each.

    Attributes:
        covered: differences in options whose numbers the proof covers, see ``COVERED``.
        others: all other differences.
    """

    covered: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def argument_changes(
    before: Sequence[str], program: Program | None, command: Sequence[str]
) -> ArgumentChanges:
    """Compare the arguments of a command with those that a plan was made for.

    Args:
        before: the command of the plan.
        program: the program of the plan; ``None``: not known, so the command is assumed to have
            been started in the current folder.
        command: the job now.
    """
    here = home(command)
    now_relative = _relative(command, here)
    if program is None or not program.arguments:
        was_relative, is_same_folder = _relative(before, here), True
    else:
        was_relative, is_same_folder = program.arguments, program.folder == _folder(here)
    old, new = _options(was_relative), _options(now_relative)
    old_words, new_words = _options(before), _options(command)
    covered: list[str] = []
    others: list[str] = []
    if was_relative[:1] != now_relative[:1]:
        was, now = (words[0] if words else "none" for words in (was_relative, now_relative))
        others.append(f"the program was {was}, is {now}")
    for option in dict.fromkeys((*old, *new)):
        was_words, now_words = old.get(option), new.get(option)
        # A word that is no path, or no path yet, is compared as it is.
        words = new_words.get(option)
        is_in_same_words = (
            words is not None
            and words == old_words.get(option)
            and (is_same_folder or words == now_words)
        )
        if was_words == now_words or is_in_same_words:
            continue
        name = option.lstrip("-").replace("-", "_").rpartition(".")[2]
        are_counts = all(words is None or _is_count(words) for words in (was_words, now_words))
        kind = covered if name in COVERED and are_counts else others
        kind.append(_clause(option, was_words, now_words))
    return ArgumentChanges(tuple(covered), tuple(others))


def summarize(changes: Sequence[str]) -> str:
    """The first changes in one clause, and how many more there are."""
    more = len(changes) - _MANY
    return "; ".join(changes[:_MANY]) + (f"; and {more} more" if more > 0 else "")


def _options(command: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The words that follow each option, in order; those under ``""`` follow no option.

    A script ends the options of the interpreter or launcher before it.
    """
    options: dict[str, tuple[str, ...]] = {}

    def add(option: str, *words: str) -> None:
        options[option] = (*options.get(option, ()), *words)

    option = ""
    is_interpreter = bool(command) and _INTERPRETER.match(os.path.basename(command[0])) is not None
    for number, word in enumerate(command[1:], 1):
        if is_interpreter and word in _PLAIN_FLAGS:
            continue
        is_interpreter = is_interpreter and word.startswith("-") and word not in ("-m", "-c")
        if word == "--":
            add(word, *command[number + 1 :])
            break
        key, equals, value = word.partition("=")
        if equals and _ASSIGNED.fullmatch(key):
            add(key, value)
            option = ""
        elif re.match(r"--?[A-Za-z]", word):
            option = word
            add(option)
        else:
            if os.path.splitext(word)[1] in SCRIPT_SUFFIXES:
                option = ""
            add(option, word)
    return options


_ASSIGNED = re.compile(r"-{0,2}\+{0,2}[A-Za-z_][\w.@/-]*")
"""Matches what stands before the equals sign of ``--lr=1``, and of Hydra's ``optimizer.lr=1``."""


def _relative(command: Sequence[str], here: Path) -> tuple[str, ...]:
    """The words of a command started in the current folder, with paths relative to ``here``."""
    first, *rest = command or ("",)
    program = _INTERPRETER.sub("python", os.path.basename(first))
    if _is_own(Path(first), first):
        program = _relative_path(first, here)
    words = [program]
    for word in rest:
        key, equals, value = word.partition("=")
        if equals and _ASSIGNED.fullmatch(key):
            words.append(f"{key}={_relative_path(value, here)}")
        else:
            words.append(_relative_path(word, here))
    return tuple(words)


def _relative_path(word: str, here: Path) -> str:
    """A word as it is, or, if it is a path, the relative path that it leads to."""
    return os.path.relpath(os.path.realpath(word), here) if word and _exists(Path(word)) else word


def _folder(here: Path) -> str:
    return os.path.relpath(os.path.realpath(os.curdir), here)


class _Source:
    """A parsed source file.

    Attributes:
        digests: digests of its parts; empty if it is no Python source that can be parsed.
        variables: environment variables that it names.
    """

    def __init__(self, path: Path, data: bytes) -> None:
        self.digests: dict[str, str] = {}
        self.variables: set[str] = set()
        self._names: set[str] = set()
        if path.suffix == ".py" or re.match(rb"#!.*python", data):
            self._read_python(data)
        elif path.suffix in SCRIPT_SUFFIXES or data.startswith(b"#!"):
            self.variables |= set(
                re.findall(r"\$\{?([A-Za-z_]\w*)", data.decode("utf-8", "replace"))
            )
            self.digests = {MODULE: _digest(_without_comments(data))}
        elif path.suffix in _CONFIGURATION_SUFFIXES:
            self.digests = {MODULE: _digest(_without_comments(data))}

    def named_files(self, folders: Sequence[Path]) -> list[Path]:
        """The source and configuration files that it names."""
        paths = (folder / name for name in sorted(self._names) for folder in folders)
        return [path for path in paths if _is_file(path)]

    def _read_python(self, data: bytes) -> None:
        try:
            tree = ast.parse(data)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return  # It is for another version of Python, or no Python at all.
        keeps_docstrings = any(word in data for word in (b"__doc__", b"docopt", b"getdoc"))
        if not keeps_docstrings:
            _drop_docstrings(tree)
        parts: dict[str, list[ast.AST | str]] = {MODULE: []}
        _take_apart(tree.body, "", MODULE, parts)
        self.digests = {name: _digest_of_nodes(nodes) for name, nodes in parts.items()}
        for node in ast.walk(tree):
            self.variables |= set(_find_variables_read(node))
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                name = node.value
                if len(name) < 256 and os.path.splitext(name)[1] in _NAMED_IN_SOURCE:
                    self._names.add(name)


def _take_apart(
    body: Sequence[ast.stmt], prefix: str, rest: str, parts: dict[str, list[ast.AST | str]]
) -> None:
    """Sort statements into ``parts``: each function under its name, the others under ``rest``."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            parts.setdefault(f"{prefix}{statement.name}()", []).append(statement)
        elif isinstance(statement, ast.ClassDef):
            key = f"class {prefix}{statement.name}"
            head = [*statement.bases, *statement.keywords, *statement.decorator_list]
            parts.setdefault(key, []).extend(head)
            _take_apart(statement.body, f"{prefix}{statement.name}.", key, parts)
        else:
            parts[rest].append(statement)
            continue
        if statement.decorator_list:  # A registry's decorator makes the order count.
            parts[rest].append(statement.name)


def _drop_docstrings(tree: ast.AST) -> None:
    for node in ast.walk(tree):
        if isinstance(
            node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        ) and isinstance(first := node.body[0] if node.body else None, ast.Expr):
            value = first.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                node.body = node.body[1:]


_NO_MEANING = frozenset(("kind", "type_comment", "type_ignores"))


def _digest_of_nodes(nodes: Iterable[ast.AST | str]) -> str:
    """Digest of syntax without positions; all versions of Python that parse it alike give the same.

    Empty fields are left out, because newer versions have more of them. Nothing is recursive,
    because a sum of a thousand terms is a tree of that depth.
    """
    digest = hashlib.sha256()
    waiting: list[object] = []
    waiting.extend(reversed(list(nodes)))
    while waiting:
        item = waiting.pop()
        if isinstance(item, ast.AST):
            digest.update(f"({type(item).__name__} ".encode())
            waiting.append(_END)
            for name, value in reversed(list(ast.iter_fields(item))):
                if value is not None and value != [] and name not in _NO_MEANING:
                    waiting += (
                        (value, f"{name}=")
                        if not isinstance(value, list)
                        else (_END, *value[::-1], f"{name}=[")
                    )
            if isinstance(item, ast.Constant) and item.value is None:
                digest.update(b"None")
        elif item is _END:
            digest.update(b")")
        else:
            said = hex(item) if type(item) is int else repr(item)
            digest.update(f"{said} ".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()[:_DIGEST_CHARACTERS]


_END = object()


def _find_variables_read(node: ast.AST) -> Iterator[str]:
    """The X of ``os.environ["X"]``, ``os.environ.get("X")`` or ``os.getenv("X")`` that is read."""
    name: ast.expr | None = None
    if isinstance(node, ast.Subscript) and _last_name(node.value) == "environ":
        name = node.slice if isinstance(node.ctx, ast.Load) else None
    elif isinstance(node, ast.Call) and node.args:
        function = node.func
        of_environ = isinstance(function, ast.Attribute) and _last_name(function.value) == "environ"
        if of_environ or _last_name(function) == "getenv":
            name = node.args[0]
    if isinstance(name, ast.Constant) and isinstance(name.value, str):
        yield name.value


def _last_name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


def _without_comments(data: bytes) -> bytes:
    """The data without lines that are empty or only a comment, unless such lines can be text."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        pass
    else:
        return json.dumps(document).encode()
    lines = [line.rstrip() for line in data.splitlines()]
    if any(re.search(rb"<<|[|>][-+\d]*$|\"\"\"|'''|\\$", line) for line in lines):
        return b"\n".join(lines)  # There is a here-document, or a string of several lines.
    return b"\n".join(line for line in lines if line and not line.lstrip().startswith(b"#"))


def _changes_of_file(name: str, recorded: Digests, path: Path) -> list[str]:
    data = _content(path)
    if data is None:
        return [f"{name} is gone"]
    now = {BYTES: _digest(data)}
    if now[BYTES] != recorded.get(BYTES) and MODULE in recorded:
        now |= _Source(path, data).digests
    return _clauses(name, recorded, now)


def _clauses(name: str, recorded: Digests, now: Digests) -> list[str]:
    """How the digests of a file differ, as a list of at most one clause."""
    if recorded.get(BYTES) == now.get(BYTES):
        return []
    if MODULE not in recorded or MODULE not in now:
        return [f"{name} has changed"]
    parts = [part for part in {**recorded, **now} if part not in (BYTES, MODULE)]
    both = [part for part in parts if part in recorded and part in now]
    kinds = (
        ("changed", [part for part in both if recorded[part] != now[part]]),
        ("gone", [part for part in parts if part not in now]),
        ("new", [part for part in parts if part not in recorded]),
    )
    said = [f"{_list_first(found)} {_verb(how, found)}" for how, found in kinds if found]
    if said:
        return [f"{name}: {', '.join(said)}"]
    if recorded[MODULE] != now[MODULE]:
        return [f"{name} has changed{' outside of its functions' * bool(parts)}"]
    return []


def _list_first(parts: Sequence[str]) -> str:
    names = [part.removesuffix("()") for part in parts]
    more = len(names) - _MANY
    if more > 0:
        return f"{', '.join(names[:_MANY])} and {more} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _verb(how: str, parts: Sequence[str]) -> str:
    is_one = len(parts) == 1
    if how == "changed":
        return "has changed" if is_one else "have changed"
    return f"{'is' if is_one else 'are'} {how}"


def _clause(option: str, was: tuple[str, ...] | None, now: tuple[str, ...] | None) -> str:
    if not option:
        return f"the arguments were {' '.join(was or ('none',))}, are {' '.join(now or ('none',))}"
    if was is None or now is None:
        words = " ".join((option, *(was or now or ())))
        return f"{words} is new" if was is None else f"{words} is not given"
    return f"{option} was {' '.join(was) or 'without a value'}, is {' '.join(now) or 'without one'}"


def _is_count(words: tuple[str, ...]) -> bool:
    return len(words) == 1 and words[0].replace("_", "").isdecimal()


def _named_files(command: Sequence[str]) -> list[Path]:
    """The source and configuration files that a command names, without those that it writes."""
    main = main_file(command)
    found = [] if main is None else [main]
    option = ""
    for word in command[1:]:
        key, equals, value = word.partition("=")
        if word.startswith("-"):
            option = key
        of_option = key if equals else option
        for name in (word, value):
            path = Path(name)
            is_text = path.suffix in SCRIPT_SUFFIXES | _CONFIGURATION_SUFFIXES
            if is_text and not _IS_WRITTEN.search(of_option) and _is_file(path):
                found.append(path)
        if equals or not word.startswith("-"):
            option = ""
    return found


_IS_WRITTEN = re.compile(r"out|log|save|result|metric|dump|write|export|history|report")
"""Matches the name of an option whose file is more likely one that the program writes."""


def _module(command: Sequence[str]) -> str:
    """The module after the last ``-m``; empty without one."""
    words = list(command)
    for at in range(len(words) - 2, -1, -1):
        if words[at] == "-m" and re.fullmatch(r"[\w.]+", words[at + 1]):
            return words[at + 1]
    return ""


_INTERPRETER = re.compile(r"python[\d.]*\Z")


def _is_own(path: Path, word: str) -> bool:
    """Whether what is run is a file of the project, and not of the system or an environment."""
    if os.sep not in word or not _is_file(path) or _INTERPRETER.match(path.name):
        return False
    folder = Path(os.path.abspath(path)).parent
    is_installed = folder.name in ("bin", "sbin") and (
        (folder.parent / "pyvenv.cfg").exists()
        or shutil.which(path.name) == str(folder / path.name)
    )
    return not is_installed


def _content(path: Path) -> bytes | None:
    """The content of a file, or of the archive that a module is in; ``None``: it cannot be read."""
    while not _exists(path) and path.parent != path:
        path = path.parent
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > _HASHED_BYTES:
            status = path.stat()
            return f"{status.st_size} {status.st_mtime_ns}".encode()
        return path.read_bytes()
    except OSError:
        return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # The word is too long, or holds a null.
        return False


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGEST_CHARACTERS]


def _digest_of_variable(name: str) -> str:
    value = os.environ.get(name)
    return _UNSET if value is None else _digest(value.encode("utf-8", "surrogateescape"))
