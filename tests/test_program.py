"""What a program is: which changes of files, arguments and variables are seen, and how named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from flatout.plan import program
from flatout.plan.program import Program, argument_changes, changes_between, observe_program

COMMAND = ["python", "train.py", "--config", "conf.yaml"]

NET = '''"""A net."""
import os

WIDTH = int(os.environ.get("WIDTH", "8"))  # columns


class Net:
    """One layer."""

    size = 3

    @property
    def width(self):
        return WIDTH

    def forward(self, x):
        """Apply it."""
        # twice
        return [x + 1,
                x - 1]


def loss(a, b):
    return (a - b) ** 2
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "project"
    (place / "parts").mkdir(parents=True)
    (place / "train.py").write_text("from parts import net\nnet.loss(1, 2)\n")
    (place / "parts" / "net.py").write_text(NET)
    (place / "conf.yaml").write_text("lr: 0.1  # small\n\n# of the decay\ndecay: 0\n")
    monkeypatch.chdir(place)
    monkeypatch.delenv("WIDTH", raising=False)
    return place


def seen() -> Program:
    return observe_program(COMMAND, [os.path.abspath("parts/net.py")])


def after(path: str, old: str, new: str) -> list[str]:
    """The changes when a file is edited."""
    before = seen()
    file = Path(path)
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    changes = before.changes(COMMAND)
    assert changes_between(before, seen()) == [c for c in changes if "variable" not in c]
    return changes


SAME = {
    "a comment": ("parts/net.py", "# twice", "# both ways, in a list"),
    "a docstring": ("parts/net.py", '"""Apply it."""', '"""Both ways."""'),
    "no docstring": ("parts/net.py", '    """One layer."""\n', ""),
    "layout": ("parts/net.py", "[x + 1,\n                x - 1]", "[\n    (x + 1), x - 1,\n]"),
    "quotes": ("parts/net.py", '"WIDTH", "8"', "'WIDTH', '8'"),
    "empty lines": ("parts/net.py", "\n\n\n", "\n\n\n\n\n"),
    "a comment in the configuration": ("conf.yaml", "# of the decay", "# or not\n\n"),
}


@pytest.mark.parametrize("edit", SAME)
def test_comments_and_layout_are_no_change(edit: str) -> None:
    assert after(*SAME[edit]) == []


CHANGED = {
    "a function": ("parts/net.py", "x - 1", "x - 2", "parts/net.py: Net.forward has changed"),
    "a default": ("parts/net.py", "loss(a, b)", "loss(a, b=1)", "parts/net.py: loss has changed"),
    "a decorator": (
        "parts/net.py",
        "    @property\n",
        "    @staticmethod\n",
        "parts/net.py: Net.width has changed",
    ),
    "a class": ("parts/net.py", "size = 3", "size = 4", "parts/net.py: class Net has changed"),
    "a base": ("parts/net.py", "class Net:", "class Net(list):", "class Net has changed"),
    "a constant": (
        "parts/net.py",
        '"8"',
        '"16"',
        "parts/net.py has changed outside of its functions",
    ),
    "a new function": ("parts/net.py", "def loss", "def f(): 0\ndef loss", "net.py: f is new"),
    "a function that is gone": (
        "parts/net.py",
        "def loss(a, b):\n    return (a - b) ** 2\n",
        "",
        "parts/net.py: loss is gone",
    ),
    "several": (
        "parts/net.py",
        "x + 1,\n                x - 1]\n\n\ndef loss(a, b):\n    return",
        "x]\n\n\ndef loss(a, b):\n    return 2 *",
        "parts/net.py: Net.forward and loss have changed",
    ),
    "the script": ("train.py", "(1, 2)", "(2, 1)", "train.py has changed"),
    "a value of the configuration": ("conf.yaml", "decay: 0", "decay: 1", "conf.yaml has changed"),
}


@pytest.mark.parametrize("edit", CHANGED)
def test_a_change_is_named_by_file_and_function(edit: str) -> None:
    path, old, new, message = CHANGED[edit]
    (change,) = after(path, old, new)
    assert change.endswith(message)


def test_a_docstring_that_is_read_is_no_comment() -> None:
    script = Path("train.py")
    script.write_text('"""Usage: train.py --lr=0.1"""\nimport docopt\ndocopt.docopt(__doc__)\n')
    assert after("train.py", "0.1", "0.2") == ["train.py has changed"]


def test_files_that_are_gone_and_those_that_cannot_be_parsed() -> None:
    before = seen()
    Path("parts/net.py").write_text("type X = (\n")
    Path("conf.yaml").unlink()
    assert sorted(before.changes(COMMAND)) == ["conf.yaml is gone", "parts/net.py has changed"]
    spoilt = seen()
    assert set(spoilt.files["parts/net.py"]) == {"bytes"}
    Path("parts/net.py").write_bytes(b"\0\xff")
    assert "parts/net.py has changed" in spoilt.changes(COMMAND)
    deep = "x = " + "+".join(["1"] * 5000) + "\n"
    Path("parts/net.py").write_text(deep)
    assert "parts/net.py" in seen().files


def test_a_checkout_may_move_and_be_started_from_elsewhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = seen()
    moved = tmp_path / "elsewhere" / "copy"
    shutil.copytree(folder, moved)
    shutil.rmtree(folder)
    monkeypatch.chdir(tmp_path)
    command = ["python", "elsewhere/copy/train.py", "--config", "elsewhere/copy/conf.yaml"]
    assert before.changes(command) == []
    assert argument_changes(COMMAND, before, command) == program.ArgumentChanges()
    assert before.paths(command) == [
        os.path.realpath(moved / name) for name in ("conf.yaml", "parts/net.py", "train.py")
    ]
    (moved / "parts" / "net.py").write_text(NET.replace("x - 1", "x"))
    assert before.changes(command) == ["parts/net.py: Net.forward has changed"]


def test_a_checkout_may_move_that_was_started_from_outside(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the one of the proof is still there."""
    (folder / "job.sh").write_text("#!/bin/sh\npython train.py\n")
    monkeypatch.chdir(tmp_path)
    words = ("--config=project/conf.yaml", "--data", "project/parts", "--out", "runs/a")
    command = ["project/job.sh", *words, "--model", "org/name"]
    before = observe_program(command)
    shutil.copytree(folder, tmp_path / "moved")
    (tmp_path / "runs" / "a").mkdir(parents=True)  # what the first run has written
    assert argument_changes(command, before, command) == program.ArgumentChanges()
    monkeypatch.chdir(tmp_path / "moved")
    moved = ["./job.sh", "--config", "conf.yaml", "--data=parts", "--model=org/name"]
    changes = argument_changes(command, before, [*moved, "--out", "runs/a"])
    assert changes == program.ArgumentChanges()
    changes = argument_changes(command, before, [*moved[:3], "--data", "../project/parts"])
    assert changes.others == (
        "--data was parts, is ../project/parts",
        "--out runs/a is not given",
        "--model org/name is not given",
    )


def test_a_variable_that_the_source_names(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("train.py").write_text(
        "import os\nos.getenv('SIZE'); os.environ['API_KEY']; os.getenv(x)\nos.environ['SET'] = ''"
    )
    monkeypatch.setenv("SIZE", "3")
    before = seen()
    assert set(before.environment) == {"SIZE", "WIDTH"}  # no secrets
    assert before.environment["WIDTH"] == "unset"
    assert before.environment["SIZE"] not in ("3", "unset")
    monkeypatch.setenv("OTHER", "1")
    assert before.changes(COMMAND) == []
    monkeypatch.setenv("WIDTH", "16")
    assert before.changes(COMMAND) == ["the environment variable WIDTH has changed"]


def test_shell_scripts_packages_and_launchers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Path("job.sh").write_text("#!/bin/sh\n# the job\npython train.py --lr $LR\n")
    before = observe_program(["sh", "job.sh"])
    assert set(before.files) == {"job.sh"}
    assert set(before.environment) == {"LR"}
    Path("job.sh").write_text("#!/bin/sh\n# a job\n\npython train.py --lr $LR\n")
    assert before.changes(["sh", "job.sh"]) == []
    Path("job.sh").write_text("#!/bin/sh\npython train.py --lr $LR --fast\n")
    assert before.changes(["sh", "job.sh"]) == ["job.sh has changed"]
    Path("job").write_text("#!/usr/bin/env python3\nprint(1)  # one\n")
    Path("job").chmod(0o755)
    assert set(observe_program(["./job"]).files["job"]) == {"bytes", "module"}

    (tmp_path / "project" / "parts" / "__main__.py").write_text("print(2)\n")
    main = os.path.abspath("parts/__main__.py")
    package = observe_program(["python", "-m", "parts", "--lr", "1"], [main])
    assert set(package.files) == {"parts/__main__.py"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "nowhere:project")
    assert package.changes(["python", "-m", "parts"]) == []

    monkeypatch.chdir(tmp_path / "project")
    of_launcher = observe_program(["torchrun", "--nproc-per-node", "2", "train.py"])
    assert set(of_launcher.files) == {"train.py"}


def test_source_that_is_named_in_source() -> None:
    Path("train.py").write_text("exec(open('configurator.py').read()); open('base.yaml')\n")
    Path("configurator.py").write_text("lr = 1\n")
    Path("base.yaml").write_text("text: |\n  # no comment\n")
    assert set(observe_program(["python", "train.py"]).files) == {
        *("train.py", "configurator.py", "base.yaml")
    }
    Path("base.yaml").write_text("text: |\n  # nor this\n")
    before = observe_program(["python", "train.py"])
    Path("configurator.py").write_text("lr = 2\n")
    Path("base.yaml").write_text("text: |\n  # no comment\n")
    assert before.changes(["python", "train.py"]) == [
        "base.yaml has changed",
        "configurator.py has changed",
    ]


def test_what_the_program_writes_is_no_part_of_it() -> None:
    for name in ("results.json", "model.json", "sizes.json"):
        Path(name).write_text("{}")
    words = ["--out", "results.json", "--metrics=results.json", "model.json", "--sizes=sizes.json"]
    assert set(observe_program(["python", "train.py", *words]).files) == {
        *("train.py", "model.json", "sizes.json")
    }


SAME_ARGUMENTS = (
    ("python train.py --lr 1e-4 --model gpt", "python3.11 train.py --model=gpt --lr=1e-4"),
    ("python train.py", "/usr/bin/python3 -u ./train.py"),
    ("python train.py lr=1 model=gpt", "python train.py model=gpt lr=1"),
    ("python train.py -c conf.yaml", "python parts/../train.py -c ./conf.yaml"),
    ("python train.py --fast --lr -1", "python train.py --lr -1 --fast"),
    ("torchrun --nnodes 1 train.py", "torchrun --nnodes=1 train.py"),
)


@pytest.mark.parametrize(("one", "other"), SAME_ARGUMENTS)
def test_the_same_arguments_in_other_words(one: str, other: str) -> None:
    assert argument_changes(one.split(), None, other.split()) == program.ArgumentChanges()


OTHER_ARGUMENTS = (
    ("--lr 1e-4", "--lr 1e-3", "--lr was 1e-4, is 1e-3"),
    ("--lr 1", "", "--lr 1 is not given"),
    ("", "--amp", "--amp is new"),
    ("small", "large", "the arguments were train.py small, are train.py large"),
    ("--sizes 1 2", "--sizes 2 1", "--sizes was 1 2, is 2 1"),
    ("--num_steps 5", "--num_steps 6", "--num_steps was 5, is 6"),
    ("--gradient-accumulation-steps 1", "--gradient-accumulation-steps 8", "was 1, is 8"),
    ("model.depth=2", "model.depth=3", "model.depth was 2, is 3"),
    ("--epochs 1", "--epochs half", "--epochs was 1, is half"),
    ("--fast", "--fast yes", "--fast was without a value, is yes"),
    ("-- --lr 1", "-- --lr 2", "-- was --lr 1, is --lr 2"),
)


@pytest.mark.parametrize(("was", "now", "clause"), OTHER_ARGUMENTS)
def test_other_arguments_are_named(was: str, now: str, clause: str) -> None:
    old, new = (f"python train.py {words}".split() for words in (was, now))
    changes = argument_changes(old, None, new)
    assert changes.covered == ()
    assert changes.others[0].endswith(clause)


@pytest.mark.parametrize(
    "option",
    ["--epochs", "--max-steps", "trainer.max_epochs", "--num_train_epochs", "--steps", "--seed"],
)
def test_a_length_or_a_seed_is_no_other_program(option: str) -> None:
    changes = argument_changes(
        ["python", "train.py", f"{option}=3"], None, ["python", "train.py", f"{option}=300"]
    )
    assert changes == program.ArgumentChanges(covered=(f"{option} was 3, is 300",))


def test_another_program() -> None:
    changes = argument_changes(["python", "train.py"], None, ["torchrun", "train.py"])
    assert changes.others == ("the program was python, is torchrun",)


def test_many_changes_are_summed_up() -> None:
    assert program.summarize(["a", "b", "c"]) == "a; b; c"
    assert program.summarize(["a", "b", "c", "d", "e"]) == "a; b; c; and 2 more"
