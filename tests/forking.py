"""Programs in forks of one process that has imported torch, so that none of them imports it again.

As a program, this module is that process: it forks a child for each line of JSON that it reads.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from pathlib import Path


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 240,
    server: int = 0,
) -> subprocess.CompletedProcess[str]:
    """Run a Python script without arguments of the interpreter, as ``subprocess.run`` does.

    The script sees torch imported already, on one thread (OMP_NUM_THREADS=1), and nothing on its
    standard input. It is recorded if ``env`` is that of a job (``launch.environment``).

    Args:
        command: the interpreter, which must be that of the tests, the script, and its arguments.
        cwd: its folder, by default that of the tests.
        env: its environment variables, by default those of the tests.
        timeout_s: when it is killed, in seconds.
        server: number of the process to fork; programs of different ones may run at once.

    Raises:
        subprocess.TimeoutExpired: it was killed.
    """
    python, *argv = map(str, command)
    assert python == sys.executable
    with tempfile.TemporaryDirectory() as folder:
        outputs = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        job = {
            "argv": argv,
            "cwd": str(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
            "outputs": outputs,
        }
        status = _ask(_server(server), job, timeout_s)
        stdout, stderr = (Path(path).read_text() for path in outputs)
    return subprocess.CompletedProcess(list(map(str, command)), status, stdout, stderr)


def _ask(server: subprocess.Popen[str], job: dict[str, object], timeout_s: float) -> int:
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps(job), file=server.stdin, flush=True)
    child = int(server.stdout.readline())
    if not select.select([server.stdout], [], [], timeout_s)[0]:
        os.kill(child, signal.SIGKILL)
        server.stdout.readline()
        raise subprocess.TimeoutExpired(str(job["argv"]), timeout_s)
    return int(server.stdout.readline())


@functools.cache
def _server(number: int) -> subprocess.Popen[str]:
    """Start a server, which ends when its input does, that is, when this process ends.

    It is no child of this process: tests of what flatout does with a job's children end them all.
    """
    del number
    launcher = subprocess.Popen(
        [sys.executable, __file__],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    launcher.wait()
    return launcher


def _serve() -> dict[str, object]:
    """Fork for every job; returns only in the children, which get theirs."""
    with open(os.dup(0)) as jobs, open(os.dup(1), "w") as statuses:
        for line in jobs:
            child = os.fork()
            if not child:
                job: dict[str, object] = json.loads(line)
                return job
            print(child, file=statuses, flush=True)
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status), file=statuses, flush=True)
    os._exit(0)


def _become(job: dict[str, object]) -> tuple[types.ModuleType, str]:
    """Become the process of a job, up to its first line; returns its main module and its script."""
    argv, env, outputs = job["argv"], job["env"], job["outputs"]
    assert isinstance(argv, list)
    assert isinstance(env, dict)
    assert isinstance(outputs, list)
    os.setpgid(0, 0)  # what ends the group of the program does not end this server
    os.chdir(str(job["cwd"]))
    for descriptor, path in enumerate([os.devnull, *outputs]):
        flags = os.O_RDWR if path == os.devnull else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(env)
    script = os.path.abspath(argv[0])
    sys.argv = argv
    sys.path[0] = os.path.dirname(script)
    path = env.get("PYTHONPATH", "").split(os.pathsep)
    hook = next((entry for entry in path if entry.endswith("/flatout/launch/hook")), None)
    if hook is not None:
        importlib.import_module("flatout.agent").activate()
    main = types.ModuleType("__main__")
    main.__file__ = script
    sys.modules["__main__"] = main
    return main, script


def main() -> None:
    """Import what programs import, serve, and be the program of a job in each child."""
    if os.fork():
        os._exit(0)
    for name in ("torch", "torch._dynamo", "torch.utils.data", "numpy"):
        importlib.import_module(name)
    module, script = _become(_serve())
    with open(script, "rb") as file:
        code = compile(file.read(), script, "exec")
    try:
        exec(code, vars(module))
    except Exception as error:  # noqa: BLE001 - as the interpreter does, without this frame
        first = error.__traceback__
        sys.excepthook(type(error), error, first and first.tb_next)
        with contextlib.suppress(SystemExit):
            sys.stdout.flush()
        sys.exit(1)


if __name__ == "__main__":
    main()
