"""Results of tunes, made by hand, as they come out of ``flatout tune``."""

from __future__ import annotations

import math

from flatout.doctor.findings import Finding
from flatout.knob import EXACTNESS
from flatout.plan import LossEvidence
from flatout.tune.document import (
    CheckResult,
    CurvePoint,
    Curves,
    Document,
    KnobResult,
    ProofResult,
    Side,
    TriedSettings,
)
from flatout.wire.ratios import Ratio

COMMAND = ("python", "train.py", "--data", "speech & <noise>", "--epochs", "300")
SHELL_COMMAND = "python train.py --data 'speech & <noise>' --epochs 300"


def curve(offset: float, steps: int = 200) -> tuple[CurvePoint, ...]:
    """A loss that falls as losses do."""
    points = []
    for step in range(steps):
        mean = 1.4 + 2.8 * math.exp(-step / 45) + 0.05 * math.sin(step * 1.7) + offset
        points.append(CurvePoint(step, mean, mean - 0.09, mean + 0.09))
    return tuple(points)


ARMS = (
    TriedSettings(
        {"precision": "bf16"},
        "precision=bf16",
        "inside one process",
        Ratio(1.574, 1.51, 1.64, 13),
        "won",
        bound=1.9,
    ),
    TriedSettings(
        {"random": "fast"},
        "random=fast",
        "inside one process",
        Ratio(1.412, 1.38, 1.45, 13),
        "won",
        bound=1.54,
    ),
    TriedSettings(
        {"optimizer": "onepass"},
        "optimizer=onepass",
        "inside one process",
        Ratio(1.062, 1.03, 1.09, 26),
        "won",
        bound=1.11,
    ),
    TriedSettings(
        {"gc": "frozen"},
        "gc=frozen",
        "inside one process",
        Ratio(1.003, 0.98, 1.03, 26),
        "no gain",
        "its interval holds 1 after 26 pairs",
        bound=1.02,
    ),
    TriedSettings(
        {"threads": "cores"},
        "threads=cores",
        "inside one process",
        Ratio(0.893, 0.86, 0.93, 8),
        "no gain",
        "eliminated in round 8",
    ),
    TriedSettings(
        {"precision": "bf16", "random": "fast", "allocator": "keep"},
        "precision=bf16, random=fast, allocator=keep",
        "fresh processes",
        Ratio(2.41, 2.33, 2.49, 4),
        "no gain",
        "1.01x over the same without allocator=keep",
    ),
    TriedSettings(
        {"compile": "blocks"},
        "compile=blocks",
        "inside one process",
        None,
        "failed",
        "the compiler stops at data-dependent control flow in model.py, line 118",
        bound=1.35,
    ),
    TriedSettings(
        {"loader": "workers"},
        "loader=workers",
        "inside one process",
        None,
        "left out",
        "the step waits for data 0.4% of its time",
        bound=1.004,
    ),
    TriedSettings(
        {"cudnn": "benchmark"},
        "cudnn=benchmark",
        "inside one process",
        None,
        "not tried",
        "it is for cuda, not for cpu",
    ),
)


def faster() -> Document:
    """A plan that helps."""
    return Document(
        command=COMMAND,
        program="train.py",
        torch="2.14.0",
        machine={
            "cpu": "AMD EPYC 9R14",
            "usable_cores": 2.0,
            "memory_bytes": 16642998272,
            "huge_pages": "madvise",
            "accelerator": None,
        },
        seconds=287.4,
        finished_unix_s=1764038485.0,
        plan="flatout.toml",
        settings={"precision": "bf16", "random": "fast", "optimizer": "onepass"},
        why="precision=bf16, random=fast, optimizer=onepass gives 2.38x and the losses are no "
        "worse than the bare program's own spread allows",
        baseline=Side(
            step_ms=1204.2,
            startup_s=2.31,
            warmup_s=0.42,
            peak_rss_bytes=1_310_000_000,
            job_s=36_720.0,
            phases_ms={
                "data": 4.1,
                "transfer": None,
                "forward": 512.4,
                "loss": 31.0,
                "backward": 541.9,
                "optimizer": 98.3,
                "other": 17.0,
            },
        ),
        with_plan=Side(
            step_ms=505.9,
            startup_s=2.64,
            warmup_s=1.97,
            peak_rss_bytes=1_180_000_000,
            job_s=15_480.0,
            phases_ms={
                "data": 4.0,
                "transfer": None,
                "forward": 171.8,
                "loss": 29.7,
                "backward": 249.3,
                "optimizer": 34.0,
                "other": 17.1,
            },
        ),
        claim=Ratio(2.38, 2.31, 2.46, 8),
        break_even_steps=415,
        tried=ARMS,
        knobs=(
            KnobResult(
                "precision",
                "bf16",
                "matrix products and convolutions in half precision",
                EXACTNESS["reduced"],
                "`with torch.autocast(device_type, torch.bfloat16): output = model(input)`, and "
                "the loss outside, on `output.float()`",
                Ratio(1.574, 1.51, 1.64, 13),
                Ratio(1.492, 1.45, 1.54, 6),
            ),
            KnobResult(
                "random",
                "fast",
                "dropout and random numbers by a vectorised generator",
                EXACTNESS["resampled"],
                "Leave dropout out (`p=0`), or `torch.compile` the module.",
                Ratio(1.412, 1.38, 1.45, 13),
                Ratio(1.53, 1.49, 1.57, 6),
            ),
            KnobResult(
                "optimizer",
                "onepass",
                "steps of optimizers in one pass over memory",
                EXACTNESS["reordered"],
                "`flatout.optim.AdamW(parameters)`, or `torch.optim.AdamW(parameters, fused=True)`",
                Ratio(1.062, 1.03, 1.09, 26),
                None,
            ),
        ),
        proof=ProofResult(
            passed=True,
            kind="non-inferior",
            why="the losses are no worse than the bare program's own spread allows",
            steps=200,
            seeds=8,
            bare_repeats=True,
            checks=(
                CheckResult(
                    "losses",
                    True,
                    "the difference stays within the margin in both windows",
                    {"difference": -0.0151, "margin": 0.0803},
                ),
                CheckResult("spikes", True, "no step stands out", {"largest_deviations": 3.2}),
                CheckResult(
                    "early gradients",
                    True,
                    "those of 52 parameters agree in size and direction",
                    {"largest_relative_error": 0.0113, "parameter": "blocks.5.mlp.fc2.weight"},
                ),
                CheckResult("buffers", None, "the program has none that change"),
            ),
            curves=(Curves("loss of train.py:141", curve(0.0), curve(-0.015)),),
            losses=(LossEvidence(1.58123, 1.56619, -0.0151, 0.0803, "seeds"),),
        ),
        findings=(
            Finding(
                "compute-bound-wrong-dtype",
                "float32 where bfloat16 is faster",
                [
                    "matrix products and convolutions take 61% of a step, in float32",
                    "this machine does 7.4 times as many operations in bfloat16",
                ],
                0.47,
                "knob: precision=bf16",
            ),
            Finding(
                "slow-random-numbers",
                "random numbers from a serial generator",
                ["aten::bernoulli_: 13 calls, 35% of a step"],
                0.35,
                "knob: random=fast",
            ),
            Finding("denormals", "numbers close to zero", ["not counted"], None, "knob: denormals"),
        ),
        next_command=f"flatout run --plan flatout.toml -- {SHELL_COMMAND}",
    )


def nothing_helps() -> Document:
    """No plan: what was tried is not faster."""
    return Document(
        command=("python", "vae.py"),
        program="vae.py",
        torch="2.14.0",
        machine={"cpu": "AMD EPYC 9R14"},
        seconds=121.0,
        finished_unix_s=1764038485.0,
        plan=None,
        settings={},
        why="no setting is faster than the bare program, beyond noise",
        baseline=Side(step_ms=8.12, startup_s=1.9, phases_ms={"forward": 2.0, "backward": 3.1}),
        with_plan=None,
        claim=None,
        break_even_steps=None,
        tried=tuple(arm for arm in ARMS if arm.state != "won"),
        knobs=(),
        proof=None,
        findings=(),
        next_command="flatout doctor -- python vae.py",
    )


def unknown() -> Document:
    """A plan of which nothing was measured."""
    return Document(
        command=("python", "train.py"),
        program="train.py",
        torch=None,
        machine={"cpu": None},
        seconds=None,
        finished_unix_s=None,
        plan="flatout.toml",
        settings={"gc": "frozen"},
        why="",
        baseline=Side(),
        with_plan=Side(phases_ms={"forward": None}),
        claim=None,
        break_even_steps=None,
        tried=(
            TriedSettings({"gc": "frozen"}, "gc=frozen", "inside one process", None, "running"),
        ),
        knobs=(KnobResult("gc", "frozen", "", EXACTNESS["bitwise"], ""),),
        proof=None,
        findings=(),
        next_command=None,
    )
