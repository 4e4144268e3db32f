"""Awkward programs: under ``flatout run`` they do what they do bare."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flatout.launch.process import _Sentinel

FLATOUT = [sys.executable, "-m", "flatout"]
RUN = [*FLATOUT, "run", "--"]

SEES = """
import os, sys
print(sys.argv, __name__, __file__, os.getcwd(), sys.stdin.isatty(), sys.stdin.read())
print([entry for entry in sys.path if "flatout" in entry or "hook" in entry])
print("sitecustomize" in sys.modules, "flatout" in sys.modules, sorted(sys.modules)[:5])
print({k: v for k, v in os.environ.items() if not k.startswith(("FLATOUT", "PYTHONPATH"))} == ENV)
print(len(os.listdir("/proc/self/fd")))
"""

PROGRAMS = {
    "exit code": "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)",
    "traceback": "def f():\n    raise ValueError('deep')\nf()",
    "os._exit": "import os, sys; print('before', flush=True); os._exit(3)",
    "replaced stdout": "import io, sys; sys.stdout = io.StringIO(); print('gone'); "
    "sys.__stdout__.write('kept\\n')",
    "closed stdout": "import sys, os; os.close(1); sys.exit(4)",
    "fork": "import os\npid = os.fork()\nif not pid:\n    os._exit(5)\n"
    "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))",
    "wait for any child": "import os\nif not os.fork(): os._exit(0)\nos.wait()\n"
    "try:\n    os.wait()\nexcept ChildProcessError: print('no other child')",
    "exec": "import os, sys\nif len(sys.argv) == 1:\n"
    "    os.execv(sys.executable, [sys.executable, __file__, 'again'])\nprint(sys.argv)",
    "death by signal": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "abort": "import os, resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.abort()",
    "spawn with classes of __main__": "import multiprocessing as mp\nclass Thing:\n"
    "    def __init__(self, x): self.x = x\ndef work(thing, queue): queue.put(thing)\n"
    "if __name__ == '__main__':\n    context = mp.get_context('spawn')\n"
    "    queue = context.Queue()\n    p = context.Process(target=work, args=(Thing(5), queue))\n"
    "    p.start(); print(queue.get().x); p.join(); print(p.exitcode)",
    "signal dispositions": "import signal\n"
    "print([signal.getsignal(s) for s in (signal.SIGPIPE, signal.SIGINT, signal.SIGTERM)])\n"
    "print(open('/proc/self/status').read().split('SigBlk')[1].split()[1])",
}


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    home = {"FLATOUT_HOME": str(cwd / "flatout-home")}
    done = subprocess.run(
        command,
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "HOME": str(cwd), **home, **environment},
        input="typed",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    done.stderr = re.sub(r"flatout: .*\n", "", done.stderr)
    return done


def outcome(done: subprocess.CompletedProcess[str]) -> tuple[int, str, str]:
    return done.returncode, done.stdout, done.stderr


def write(folder: Path, text: str, name: str = "program.py") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", PROGRAMS)
def test_same_output_and_status(name: str, tmp_path: Path) -> None:
    write(tmp_path, PROGRAMS[name])
    command = [sys.executable, "program.py"]
    assert outcome(run([*RUN, *command], tmp_path)) == outcome(run(command, tmp_path))


FORMS: dict[str, Callable[[Path], list[str]]] = {
    "script": lambda folder: [sys.executable, "program.py", "a b", ""],
    "absolute script": lambda folder: [sys.executable, str(folder / "program.py")],
    "module": lambda folder: [sys.executable, "-m", "package.module", "x"],
    "unbuffered": lambda folder: [sys.executable, "-u", "-W", "error", "program.py"],
    "shell script": lambda folder: ["sh", "start.sh", "x"],
    "executable": lambda folder: [str(folder / "tool"), "x"],
    "isolated": lambda folder: [sys.executable, "-I", str(folder / "program.py")],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_command_sees_what_it_sees_bare(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    bare = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    text = f"ENV = {bare!r} | {{'LC_CTYPE': 'C.UTF-8'}}\n" + SEES
    for name in ("program.py", "package/module.py"):
        write(folder, text, name)
    write(folder, "", "package/__init__.py")
    write(folder, f'exec "{sys.executable}" program.py "$@"\n', "start.sh")
    write(folder, f"#!{sys.executable}\n{text}", "tool").chmod(0o755)
    command = FORMS[form](folder)
    expected, seen = run(command, folder), run([*RUN, *command], folder)
    assert outcome(seen) == outcome(expected)


@pytest.mark.parametrize("place", ["module path", "none"])
def test_the_programs_own_sitecustomize_has_its_turn(place: str, tmp_path: Path) -> None:
    write(tmp_path, "import sys; sys.from_site = 'mine'", "site/sitecustomize.py")
    program = "import sys; print(getattr(sys, 'from_site', None), sys.modules.get('sitecustomize'))"
    environment = {"PYTHONPATH": str(tmp_path / "site")} if place == "module path" else {}
    command = [sys.executable, "-c", program]
    expected = run(command, tmp_path, **environment)
    assert outcome(run([*RUN, *command], tmp_path, **environment)) == outcome(expected)
    assert ("mine" in expected.stdout) == (place == "module path")


def test_a_broken_sitecustomize_is_reported_as_bare(tmp_path: Path) -> None:
    write(tmp_path, "raise RuntimeError('broken')", "site/sitecustomize.py")
    command = [sys.executable, "-c", "print(1)"]
    environment = {"PYTHONPATH": str(tmp_path / "site")}
    expected = run(command, tmp_path, **environment)
    assert "broken" in expected.stderr
    own = run([*RUN, *command], tmp_path, **environment)
    # flatout's own Python reads PYTHONPATH as well, and says the same once more.
    assert own.stderr == 2 * expected.stderr
    assert own.stdout == expected.stdout


def test_another_environment_sees_nothing_of_flatouts_own(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "other"], check=True)
    python = str(tmp_path / "other" / "bin" / "python")
    program = (
        "import importlib.util as u, sys; "
        "print([u.find_spec(n) for n in ('rich', 'tomlkit', 'flatout')], sys.prefix, sys.path)"
    )
    command = [python, "-c", program]
    expected = run(command, tmp_path)
    assert outcome(run([*RUN, *command], tmp_path)) == outcome(expected)
    assert "None, None, None" in expected.stdout


COUNTER = """
import signal, sys, time
seen = []
def handler(number, frame):
    seen.append(signal.Signals(number).name)
for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(s, handler)
print("ready", flush=True)
end = time.monotonic() + 20
while len(seen) < 1 and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.3)  # for a second one, which must not come
print(seen, flush=True)
sys.exit(9)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("to_group", [False, True], ids=["to flatout", "to the group"])
def test_a_signal_arrives_once(number: signal.Signals, to_group: bool, tmp_path: Path) -> None:
    write(tmp_path, COUNTER)
    process = subprocess.Popen(
        [*RUN, sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "FLATOUT_HOME": str(tmp_path / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    (os.killpg if to_group else os.kill)(process.pid, number)
    assert process.stdout.read() == f"['{number.name}']\n"
    assert process.wait(20) == 9


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_flatout_sees_after_the_job_has_ended_was_for_the_job(
    number: signal.Signals, tmp_path: Path
) -> None:
    program = write(
        tmp_path,
        "import os, signal, sys\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit(9))\n"
        "print(os.getpid(), flush=True)\nsignal.pause()\n",
    )
    process = subprocess.Popen(
        [*RUN, sys.executable, "-S", program],
        cwd=tmp_path,
        env={**os.environ, "FLATOUT_HOME": str(tmp_path / "home")},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    job = int(process.stdout.readline())
    ended = os.pidfd_open(job)
    os.kill(job, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)  # flatout stops as its job does
    os.killpg(process.pid, number)
    os.kill(job, signal.SIGCONT)
    assert select.select([ended], [], [], 20)[0]
    os.close(ended)
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(20) == 9


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_death_by_signal_is_flatouts_own_death(number: signal.Signals, tmp_path: Path) -> None:
    command = f"import os; os.kill(os.getpid(), {int(number)}); import time; time.sleep(9)"
    bare = run([sys.executable, "-S", "-c", command], tmp_path)
    assert run([*RUN, sys.executable, "-S", "-c", command], tmp_path).returncode == bare.returncode


def test_a_reader_that_closes_the_pipe_ends_the_program_as_bare(tmp_path: Path) -> None:
    shell = "sh -c 'while :; do echo line; done'"
    prefix = " ".join(RUN)
    for command in (shell, f"{prefix} {shell}"):
        script = f"{{ {command}; echo $? >&3; }} 3>status | head -1"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            env={**os.environ, "FLATOUT_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.stdout == "line\n"
        assert (tmp_path / "status").read_text() == f"{128 + signal.SIGPIPE}\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash for its job control")
def test_job_control_on_a_terminal(tmp_path: Path) -> None:
    write(
        tmp_path,
        "import sys, time\nprint([s.isatty() for s in (sys.stdin, sys.stdout, sys.stderr)])\n"
        "print('up', flush=True)\nprint('got', input(), flush=True)\n"
        "try:\n    print('asleep', flush=True)\n    time.sleep(20)\n"
        "except KeyboardInterrupt:\n    print('interrupted')\n"
        "    sys.exit(6)\n",
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.environ.update(FLATOUT_HOME=str(tmp_path / "home"), PS1="", HISTFILE="")
        os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])

    text = ""

    def until(wanted: str) -> None:
        nonlocal text
        end = time.monotonic() + 30
        while wanted not in text:
            assert time.monotonic() < end, f"no {wanted!r} in {text!r}"
            if select.select([terminal], [], [], 0.1)[0]:
                text += os.read(terminal, 4096).decode()
        text = text.partition(wanted)[2]

    def type_in(words: str) -> None:
        os.write(terminal, words.encode())

    try:
        type_in(f"{' '.join(RUN)} {sys.executable} program.py\n")
        until("[True, True, True]")
        until("up")
        type_in("\x1a")
        until("Stopped")
        type_in("echo at-the-$((1+1))-prompt\n")
        until("at-the-2-prompt")
        type_in("fg\n")
        until("program.py")
        type_in("hello\n")
        until("got hello")
        until("asleep")
        type_in("\x03")
        until("interrupted")
        type_in("echo status-$?\n")
        until("status-6")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


def test_killing_flatout_kills_the_program(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*RUN, "sh", "-c", "echo $$; exec sleep 30"],
        env={**os.environ, "FLATOUT_HOME": str(tmp_path / "home")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    program = int(process.stdout.readline())
    process.kill()
    process.wait()
    assert process.stdout.read() == ""  # the program has closed it, long before its 30 s are over
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{program}/stat").read_text().rpartition(") ")[2][0]
        except FileNotFoundError:
            return
        if state == "Z":  # dead, and nobody has asked yet: a container's first process may not
            return
    pytest.fail("the program lives on")


TORCH_LATE = """
import sys
print("torch" in sys.modules, "flatout" in sys.modules, flush=True)
import torch
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(4):
    loss = model(torch.ones(3, 2)).sum()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
print(torch.__spec__.loader.__class__.__name__, torch.__loader__ is torch.__spec__.loader)
print([type(finder).__name__ for finder in sys.meta_path])
"""


def test_torch_imported_late_is_watched_and_looks_untouched(tmp_path: Path) -> None:
    write(tmp_path, TORCH_LATE)
    command = [sys.executable, "program.py"]
    bare, own = run(command, tmp_path), run([*RUN, *command], tmp_path)
    assert outcome(own) == outcome(bare)
    said = subprocess.run(
        [*RUN, *command],
        cwd=tmp_path,
        env={**os.environ, "FLATOUT_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert re.fullmatch(r"flatout: 4 steps, median \S+ ms; record in \S+\n", said)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ([sys.executable, "-c", "print(1)"], "torch was never imported"),
        ([sys.executable, "-I", "-c", "print(1)"], "no Python process of this command loaded"),
        (["true"], "no Python process of this command loaded"),
    ],
)
def test_run_says_when_nothing_was_watched(command: list[str], says: str, tmp_path: Path) -> None:
    environment = {**os.environ, "FLATOUT_HOME": str(tmp_path)}
    done = subprocess.run([*RUN, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_switched_off_by_a_variable(tmp_path: Path) -> None:
    done = run([*RUN, sys.executable, "-c", "print(1)"], tmp_path, FLATOUT_DISABLE="1")
    assert outcome(done) == (0, "1\n", "")
    assert not (tmp_path / "flatout-home").exists()


def test_a_read_only_home_does_not_stop_the_program(tmp_path: Path) -> None:
    home = tmp_path / "file"
    home.write_text("not a folder")
    done = subprocess.run(
        [*RUN, sys.executable, "-c", "print(1); raise SystemExit(3)"],
        env={**os.environ, "FLATOUT_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "1\n")
    assert re.fullmatch(r"flatout: nothing is recorded, the command runs bare: .*\n", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["run"], 2, "there is no command to run"),
        (["run", "--"], 2, "there is no command to run"),
        (["run", "--", ""], 2, "there is no command to run"),
        (["run", "--plan", "\x1b[2Jx", "--", "true"], 2, "\\x1b[2Jx cannot be read"),
        (["tune", "--resume", "--", "true"], 2, "no tune has been interrupted"),
        (["verify", "--resume", "--plan", os.devnull, "--", "true"], 2, "has no table [plan]"),
        (["run", "--", "no-such-program"], 127, "there is no program 'no-such-program'"),
        (["run", "--", "/etc"], 126, "cannot be executed"),
        (["doctor", "--", "no-such-program"], 127, "there is no program"),
        (["doctor", "--", "true"], 2, "no Python process of this command loaded"),
        (["doctor", "--", sys.executable, "-c", "1/0"], 2, "before its first step"),
        (["doctor", "--", sys.executable, "-c", "0"], 2, "never imported torch"),
        (["doctor", "--steps", "0", "--", "true"], 2, "--steps: '0' is not a positive integer"),
        (["machine", "--python", "no-such-python"], 2, "cannot be run"),
        (["machine", "--", "true"], 2, "takes no command"),
        (["run", "--set", "nonsense", "--", "true"], 2, "KNOB=SETTING"),
    ],
)
def test_mistakes_get_one_sentence(
    arguments: list[str], status: int, says: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [*FLATOUT, *arguments],
        env={**os.environ, "FLATOUT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status
    own = [line for line in done.stderr.splitlines() if line.startswith("flatout: ")]
    assert len(own) == 1
    assert says in own[0]
    assert "flatout/" not in done.stderr.replace(own[0], "")  # no traceback of ours


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    program = (
        "import sys; from flatout.cli import build_parser; build_parser().format_help(); "
        "print(sorted({'torch', 'rich', 'scipy', 'numpy', 'psutil', 'tomlkit'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("is_busy", [True, False])
def test_a_sentinel_that_waits_for_a_cpu_is_waited_for(is_busy: bool) -> None:
    """On a busy machine it may be some time before it can report a signal to the whole group."""
    told, tell = os.pipe()
    begin = "import os, sys, time\nend = time.monotonic() + 0.4\n"
    work = "while time.monotonic() < end: pass\n" if is_busy else "time.sleep(60)\n"
    report = f"os.write({tell}, bytes([{signal.SIGTERM.value}]))"
    process = subprocess.Popen([sys.executable, "-c", begin + work + report], pass_fds=[tell])
    while not is_busy and "S" not in state_of(process.pid):
        pass
    sentinel = object.__new__(_Sentinel)
    sentinel._told, sentinel._pid = told, process.pid
    assert sentinel.got(signal.SIGTERM) == is_busy
    process.kill()
    process.wait()
    os.close(told)
    os.close(tell)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
