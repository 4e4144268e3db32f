"""What learning costs a training run: ``flatout run --tune`` over 2,000 steps.

    python benchmarks/learning.py [PROGRAM ...] [--steps 2000]

From the record of one run: the time of all steps of the comparison, less what as many steps of the
baseline take (those of the same comparison, in between), as a share of that many steps of the
baseline as the run has. Warm-up and the steps that an arm takes before its first turn counts are
in it, compilation is not: no setting that compiles is learned. Exits with 1 when a program pays
more than 1 %. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean

from flatout.wire.record import read_run

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
ALLOWED_SHARE = 0.01

PROGRAMS = {
    "mlp": (str(HERE / "programs" / "mlp.py"),),
    "image": (str(EXAMPLES / "image" / "train.py"), "--epochs", "1000"),
    "language": (str(EXAMPLES / "language" / "train.py"), "--batch-size", "2"),
}


def cost(command: list[str], steps: int) -> tuple[float, int, list[str]]:
    """The share of the run that learning took, in how many steps, and what flatout said.

    Raises:
        subprocess.CalledProcessError: the program failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "flatout", "run", "--tune", "--plan", "flatout.toml", "--"),
                *command,
            ],
            cwd=scratch,
            env={**os.environ, "FLATOUT_HOME": str(Path(scratch) / "home")},
            capture_output=True,
            text=True,
            check=True,
        )
        (run_directory,) = (Path(scratch) / "home" / "runs").iterdir()
        process = read_run(run_directory).main
    assert process is not None
    compared = [step for step in process.steps if step.arm is not None]
    bare_ms = fmean(step.step_ms for step in compared if step.arm == 0 and step.mark is None)
    extra_ms = sum(step.step_ms - bare_ms for step in compared if step.arm != 0 or step.mark)
    said = [line for line in done.stderr.splitlines() if "inside one process" in line]
    return extra_ms / (bare_ms * steps), len(compared), said


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"of {', '.join(PROGRAMS)}")
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    is_as_asked = True
    for name in arguments.programs or PROGRAMS:
        command = [sys.executable, *PROGRAMS[name], "--steps", str(arguments.steps)]
        share, compared, said = cost(command, arguments.steps)
        is_as_asked &= share <= ALLOWED_SHARE
        print(f"{name}: {share:+.2%} of {arguments.steps} steps, {compared} of them compared")
        print("\n".join(f"  {line}" for line in said), flush=True)
    return 0 if is_as_asked else 1


if __name__ == "__main__":
    sys.exit(main())
