"""The diagnosis: from recorded times, written by hand, to findings; the verb on real programs."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flatout import knobs, machine
from flatout.doctor import Diagnosis, diagnose, findings
from flatout.doctor.findings import kinds
from flatout.errors import UserError
from flatout.knobs import mkl
from flatout.machine import Ceilings
from flatout.report.terminal import print_diagnosis
from flatout.tune import candidates
from flatout.wire import codec
from flatout.wire.header import Header
from flatout.wire.lines import CpuUsage, End
from flatout.wire.profile import Profile
from flatout.wire.record import ProcessRecord, RunRecord, Step
from flatout.wire.turns import PHASES
from flatout.wire.writer import record_path

HEADER = Header(program="train.py", torch="2.13.0", threads=2, executable=sys.executable)
RATES = {"float32": 1e11, "bfloat16": 4e11, "float16": None}
CEILINGS = Ceilings(
    python=sys.executable,
    torch="2.13.0",
    threads=2,
    matmul_flops_per_s=RATES,
    memory_bytes_per_s=1e10,
    page_fault_us=0.5,
    devices={"cpu": {"matmul_flops_per_s": RATES}},
    measured_at_unix_s=0.0,
    fingerprint={},
)
NO_BF16 = replace(
    CEILINGS, devices={"cpu": {"matmul_flops_per_s": {"float32": 1e11, "bfloat16": 1e10}}}
)
ON_CUDA = replace(
    CEILINGS,
    devices={
        "cpu": {"matmul_flops_per_s": {"float32": 1e9}},
        "cuda": {"matmul_flops_per_s": RATES},
    },
)


def turn(number: int, phases_ms: dict[str, float | None], **fields: Any) -> Step:
    """One step; its length is the sum of its phases, at every 100 ms."""
    values: dict[str, Any] = {
        "index": number,
        "at_s": number / 10,
        "step_ms": sum(ms or 0 for ms in phases_ms.values()),
        "phases_ms": dict.fromkeys(PHASES) | phases_ms,
        "losses": (),
        "forwards": 1,
        "backwards": 1,
        "updates": 1,
        "minor_faults": 0,
        "major_faults": 0,
        "peak_rss_bytes": 2**28,
        "peak_device_bytes": None,
        "arm": None,
        "mark": None,
        "grad": True,
    }
    return Step(**(values | fields))


def operator(name: str, self_ms: float, calls: float = 1, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "phase": None,
        "within": None,
        "calls": calls,
        "self_ms": self_ms,
        "device_self_ms": None,
        **fields,
    }


def profile(*operators: dict[str, Any], step_ms: float = 10.0, **fields: Any) -> Profile:
    facts = {
        "optimizers": [],
        "modules": {"convolutions_channels_last": 0},
        "parameters": {"denormal_share": 0.0},
        "loaders": [],
        "switches": {"float32_matmul_precision": "highest"},
    }
    profiled = {
        "steps": 5,
        "step_ms": step_ms,
        "operators": list(operators),
        "operators_total_ms": sum(o["self_ms"] for o in operators),
        "operators_total_calls": sum(o["calls"] for o in operators),
        "device_total_ms": None,
        "minor_faults": 0.0,
        "minor_faults_of_thread": 0.0,
        "flops_by_dtype": {"float32": 10**8},
        "counted": {"aten::mm": 3},
        "uncountable": {},
        **fields,
        "facts": {**facts, **fields.get("facts", {})},
    }
    return codec.decode(Profile, profiled)


BALANCED = {"forward": 4.0, "loss": 0.0, "backward": 5.6, "optimizer": 0.3, "other": 0.1}
PRODUCTS = operator("aten::mm", 9.0, calls=3)
COUNTED = ("aten::mm", "aten::bmm", "aten::addmm", "aten::dot")


@pytest.fixture
def recorded(tmp_path: Path) -> Any:
    """Diagnoses what a process has recorded."""

    def record(
        phases_ms: dict[str, float | None] = BALANCED,
        profiled: Profile | None = None,
        *,
        steps: list[Step] | None = None,
        evaluations: list[Step] | None = None,
        header: dict[str, Any] | None = None,
        ceilings: Ceilings | None = NO_BF16,
        usable_cores: float | None = 2.0,
        **fields: Any,
    ) -> Diagnosis:
        if steps is None:
            steps = [turn(n, phases_ms, **fields) for n in range(23)]
        process = ProcessRecord(
            record_path(tmp_path, 1),
            replace(HEADER, **(header or {})),
            steps,
            evaluations or [],
            profile=profiled,
        )
        return diagnose(RunRecord(tmp_path, [process]), ceilings, usable_cores)

    return record


def kinds_found(diagnosis: Diagnosis) -> list[str]:
    return [finding.kind for finding in diagnosis.findings]


def share(diagnosis: Diagnosis, kind: str) -> float | None:
    return next(finding.share for finding in diagnosis.findings if finding.kind == kind)


def test_of_a_program_bound_by_its_arithmetic_the_operator_is_named(recorded: Any) -> None:
    diagnosis = recorded(profiled=profile(PRODUCTS))
    assert kinds_found(diagnosis) == ["dominant-operator"]
    small = [operator(f"aten::conv_{n}", 2.0) for n in range(5)]
    diagnosis = recorded(profiled=profile(*small))
    assert diagnosis.findings == []
    assert diagnosis.bottleneck is None


def test_warmup_and_profiled_steps_are_left_out(recorded: Any) -> None:
    slow = {**BALANCED, "forward": 90.0}
    steps = [turn(n, slow if n < 3 else BALANCED) for n in range(10)]
    steps += [turn(n, slow, mark="profiled") for n in range(10, 15)]
    diagnosis = recorded(steps=steps)
    assert diagnosis.case.step_ms == pytest.approx(10.0)
    assert len(diagnosis.case.steps) == 7
    assert diagnosis.document()["warmup_steps"] == 3


def test_waiting_for_data(recorded: Any) -> None:
    diagnosis = recorded({**BALANCED, "data": 30.0})
    assert diagnosis.bottleneck == "input-bound"
    assert share(diagnosis, "input-bound") == pytest.approx(0.75)
    assert "input-bound" not in kinds_found(recorded({**BALANCED, "data": 0.2}))


ADAMW = {"class": "AdamW", "tensors": 4, "elements": 1000, "fused": False, "can_fuse": True}


@pytest.mark.parametrize(
    ("optimizer", "optimizer_ms", "found"),
    [
        (ADAMW, 15.0, True),
        (ADAMW, 0.3, False),
        ({**ADAMW, "fused": True}, 15.0, False),
        ({**ADAMW, "class": "RMSprop", "can_fuse": False}, 15.0, True),
        ({**ADAMW, "class": "LBFGS", "can_fuse": False}, 15.0, False),
    ],
)
def test_unfused_optimizer(
    recorded: Any, optimizer: dict[str, Any], optimizer_ms: float, found: bool
) -> None:
    phases = {**BALANCED, "optimizer": optimizer_ms}
    small = operator("aten::mul_", 5.0, calls=1000, phase="optimizer")
    window = profile(PRODUCTS, small, step_ms=25.0, facts={"optimizers": [optimizer]})
    diagnosis = recorded(phases, window)
    assert ("unfused-optimizer" in kinds_found(diagnosis)) == found
    if found:
        assert diagnosis.bottleneck == "unfused-optimizer"
        assert share(diagnosis, "unfused-optimizer") == pytest.approx(15 / 24.7, abs=0.01)


def test_an_optimizer_without_a_fused_step_is_no_part_of_the_finding(recorded: Any) -> None:
    """Embeddings trained by SparseAdam took most of it."""
    sparse = {"class": "SparseAdam", "tensors": 2, "elements": 9, "fused": False, "can_fuse": False}
    window = profile(
        operator("aten::index", 4.0, phase="optimizer", within="SparseAdam"),
        operator("aten::addcdiv_", 1.0, phase="optimizer", within="AdamW"),
        facts={"optimizers": [ADAMW, sparse]},
    )
    diagnosis = recorded({**BALANCED, "forward": 0.3, "optimizer": 4.0}, window)
    step_ms = 0.3 + 5.6 + 4.0 + 0.1
    assert share(diagnosis, "unfused-optimizer") == pytest.approx(0.2 * 4.0 / step_ms)
    assert share(diagnosis, "optimizer-bound") == pytest.approx(0.8 * 4.0 / step_ms)
    assert "optimizer-bound" not in kinds_found(recorded(profiled=profile(PRODUCTS)))


def test_torch_compile_is_not_advised_for_a_scripted_module(recorded: Any) -> None:
    steps = operator("aten::tanh", 6.0, calls=10)
    scripted = profile(steps, operator("<backward op>", 0.1, phase="backward"))
    [remedy] = [f.remedy for f in recorded(profiled=scripted).findings if f.kind == "memory-bound"]
    assert remedy.startswith("edit: use fewer of them (torch.compile does not compile what")


def test_an_optimizer_under_its_knob_is_no_finding(recorded: Any) -> None:
    facts = {"optimizers": [ADAMW], "knobs": ["optimizer", "random"]}
    window = profile(PRODUCTS, step_ms=25.0, facts=facts)
    assert "unfused-optimizer" not in kinds_found(recorded({**BALANCED, "optimizer": 15.0}, window))


def test_python_between_steps(recorded: Any) -> None:
    diagnosis = recorded(
        {**BALANCED, "other": 10.0}, profile({**PRODUCTS, "phase": "backward"}, step_ms=20.0)
    )
    assert diagnosis.bottleneck == "python-between-steps"
    assert share(diagnosis, "python-between-steps") == pytest.approx(10 / 19.9)


def test_operators_between_the_phases_are_not_python(recorded: Any) -> None:
    """A scripted module has no forward phase."""
    phases = {"forward": 0.0, "loss": 0.0, "backward": 5.0, "optimizer": 0.0, "other": 5.0}
    scripted = profile(operator("aten::mm", 4.5), operator("aten::mm", 5.0, phase="backward"))
    assert "python-between-steps" not in kinds_found(recorded(phases, scripted))
    assert share(recorded(phases), "python-between-steps") == pytest.approx(0.5)


def test_many_small_operators(recorded: Any) -> None:
    window = profile(operator("aten::add", 5.0, calls=1000), step_ms=12.0)
    diagnosis = recorded(profiled=window)
    assert diagnosis.bottleneck == "overhead-bound"
    assert share(diagnosis, "overhead-bound") == pytest.approx(0.96)


def test_the_optimizers_small_operators_are_not_the_models(recorded: Any) -> None:
    small = operator("aten::mul_", 5.0, calls=1000, phase="optimizer")
    window = profile(operator("aten::mm", 4.5), small)
    assert "overhead-bound" not in kinds_found(
        recorded({**BALANCED, "forward": 2.0, "backward": 2.6, "optimizer": 5.3}, window)
    )


def test_large_operators_keep_their_share_however_much_the_profiler_slows_small_ones(
    recorded: Any,
) -> None:
    """10 ms a step: 5 ms in one operator; 1000 small ones to which the profiler adds 2 us each."""
    large, small = operator("aten::mm", 5.0), operator("aten::add", 7.0, calls=1000)
    diagnosis = recorded(profiled=profile(large, small, step_ms=12.0))
    shares = {o.name: o.share for o in diagnosis.case.operators}
    assert shares["aten::mm"] == pytest.approx(0.5, abs=0.01)
    assert shares["aten::add"] == pytest.approx(0.5, abs=0.01)


def test_shares_bear_a_machine_that_has_slowed_down_meanwhile(recorded: Any) -> None:
    diagnosis = recorded(profiled=profile(operator("aten::mm", 15.0, calls=3), step_ms=30.0))
    (only,) = diagnosis.case.operators
    assert only.share == pytest.approx(0.5, abs=0.01)


def test_slow_random_numbers_and_the_attention_around_them(recorded: Any) -> None:
    window = profile(
        operator("aten::bernoulli_", 4.0, within="attention"),
        operator("aten::mul", 2.0, within="attention"),
        operator("aten::mm", 3.0, calls=3),
    )
    diagnosis = recorded(profiled=window)
    assert kinds_found(diagnosis) == ["slow-random-numbers", "attention-off-flash"]
    assert share(diagnosis, "slow-random-numbers") == pytest.approx(0.4)
    assert share(diagnosis, "attention-off-flash") == pytest.approx(0.2)


def test_random_numbers_are_fast_on_an_accelerator(recorded: Any) -> None:
    window = profile(operator("aten::bernoulli_", 4.0, device_self_ms=4.0), device_total_ms=9.5)
    diagnosis = recorded(profiled=window, header={"accelerator": "cuda"})
    assert "slow-random-numbers" not in kinds_found(diagnosis)


@pytest.mark.parametrize(
    ("vendor", "flags", "dtype", "preloaded", "found"),
    [
        ("AuthenticAMD", mkl.FLAGS, "float32", "", True),
        ("GenuineIntel", mkl.FLAGS, "float32", "", False),
        ("AuthenticAMD", {"avx2"}, "float32", "", False),
        ("AuthenticAMD", mkl.FLAGS, "bfloat16", "", False),
        ("AuthenticAMD", mkl.FLAGS, "float32", "/home/me/.cache/kernels/mkl-1a2b.so", False),
    ],
)
def test_products_that_leave_half_of_the_processor_idle(
    recorded: Any,
    monkeypatch: pytest.MonkeyPatch,
    vendor: str,
    flags: set[str],
    dtype: str,
    preloaded: str,
    found: bool,
) -> None:
    monkeypatch.setattr(machine, "cpu_vendor", lambda: vendor)
    monkeypatch.setattr(machine, "has_cpu_flags", lambda wanted: wanted <= flags)
    window = profile(operator("aten::addmm", 5.0), flops_by_dtype={dtype: 10**8})
    diagnosis = recorded(
        profiled=window,
        ceilings=Ceilings(**{**CEILINGS.__dict__, "fingerprint": {"cpu": "EPYC"}}),
        header={"environment": {"LD_PRELOAD": preloaded}},
    )
    assert ("narrow-products" in kinds_found(diagnosis)) == found
    if found:
        assert share(diagnosis, "narrow-products") == pytest.approx(mkl.SAVED * 0.5)


def test_a_padding_mask_in_the_fast_path(recorded: Any) -> None:
    window = profile(operator("aten::_masked_softmax", 7.0), operator("aten::addmm", 3.0))
    diagnosis = recorded(profiled=window)
    assert diagnosis.bottleneck == "padded-fast-path"
    assert share(diagnosis, "padded-fast-path") == pytest.approx(0.7)


def test_cross_entropy_that_stores_its_probabilities(recorded: Any) -> None:
    window = profile(
        operator("aten::_log_softmax_backward_data", 2.0),
        operator("aten::_log_softmax", 1.0),
        operator("aten::nll_loss_backward", 1.0),
        operator("aten::mm", 6.0),
    )
    diagnosis = recorded(profiled=window)
    assert share(diagnosis, "stored-probabilities") == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("ceilings", "dtype", "precision", "found"),
    [
        (CEILINGS, "float32", "highest", True),
        (NO_BF16, "float32", "highest", False),
        (CEILINGS, "bfloat16", "highest", False),
        (CEILINGS, "float32", "medium", False),
        (None, "float32", "highest", False),
    ],
)
def test_wrong_dtype(
    recorded: Any, ceilings: Ceilings | None, dtype: str, precision: str, found: bool
) -> None:
    window = profile(
        PRODUCTS,
        flops_by_dtype={dtype: 10**8},
        facts={"switches": {"float32_matmul_precision": precision}},
    )
    diagnosis = recorded(profiled=window, ceilings=ceilings)
    assert ("compute-bound-wrong-dtype" in kinds_found(diagnosis)) == found
    if found:
        assert share(diagnosis, "compute-bound-wrong-dtype") == pytest.approx(0.9 * 0.75)


@pytest.mark.parametrize(
    ("rates", "found"),
    [
        ({"float32": 1e11, "float16": 1e10, "bfloat16": 4e11}, 0.9 * (1 - 1 / 40)),
        ({"float32": 1e11, "float16": 1e10, "bfloat16": 1e10}, 0.9 * 0.9),
        ({"float32": 1e11, "float16": 2e11, "bfloat16": 2e11}, None),
        ({"float32": 1e11, "float16": None, "bfloat16": 4e11}, None),
    ],
)
def test_a_half_precision_that_is_slow_here(
    recorded: Any, rates: dict[str, float | None], found: float | None
) -> None:
    window = profile(PRODUCTS, flops_by_dtype={"float16": 10**8})
    ceilings = replace(CEILINGS, devices={"cpu": {"matmul_flops_per_s": rates}})
    diagnosis = recorded(profiled=window, ceilings=ceilings)
    if found is None:
        assert "compute-bound-wrong-dtype" not in kinds_found(diagnosis)
        return
    assert share(diagnosis, "compute-bound-wrong-dtype") == pytest.approx(found)
    assert diagnosis.findings[0].title.startswith("float16")


def test_page_faults_cost_what_the_machine_was_measured_to_take(recorded: Any) -> None:
    window = profile(PRODUCTS, minor_faults=8000.0, minor_faults_of_thread=4000.0)
    diagnosis = recorded(profiled=window, minor_faults=8000)
    assert share(diagnosis, "page-fault-bound") == pytest.approx(0.2)
    in_job = replace(window, page_fault_us=1.0)
    assert share(recorded(profiled=in_job, minor_faults=8000), "page-fault-bound") == pytest.approx(
        0.4
    )
    assert (
        share(recorded(profiled=window, minor_faults=8000, ceilings=None), "page-fault-bound")
        is None
    )
    assert "page-fault-bound" not in kinds_found(recorded(profiled=window, minor_faults=200))
    assert "page-fault-bound" not in kinds_found(recorded(profiled=window, minor_faults=None))


@pytest.mark.parametrize(
    ("threads", "cores", "environment", "found"),
    [
        (8, 2.0, {}, True),
        (2, 2.0, {}, False),
        (2, 2.0, {"LOCAL_WORLD_SIZE": "4"}, True),
        (1, 2.0, {"LOCAL_WORLD_SIZE": "4"}, False),
        (8, None, {}, False),
    ],
)
def test_oversubscribed_threads(
    recorded: Any, threads: int, cores: float | None, environment: dict[str, str], found: bool
) -> None:
    header = {"threads": threads, "environment": environment}
    diagnosis = recorded(header=header, usable_cores=cores)
    assert ("oversubscribed-threads" in kinds_found(diagnosis)) == found
    if found:  # all but 0.1 ms of a step of 10 ms may compute
        expected = (1 - 2 / (threads * int(environment.get("LOCAL_WORLD_SIZE", 1)))) * 0.99
        assert share(diagnosis, "oversubscribed-threads") == pytest.approx(expected)


def test_threads_are_those_that_the_program_has_set(recorded: Any) -> None:
    """After torch was imported, when the header was written."""
    window = profile(PRODUCTS, facts={"threads": 1})
    diagnosis = recorded(header={"threads": 8}, usable_cores=2.0, profiled=window)
    assert "oversubscribed-threads" not in kinds_found(diagnosis)
    assert candidates.collect_facts(diagnosis.case).threads == 1


def test_processes_that_train_at_once_share_the_cores(tmp_path: Path) -> None:
    """As in Hogwild: the launcher of the job has told nobody of them."""

    def process(number: int, begin_s: float, steps: int = 20) -> ProcessRecord:
        header = replace(HEADER, threads=2, started_unix_s=begin_s)
        turns = [turn(n, BALANCED) for n in range(steps)]
        return ProcessRecord(record_path(tmp_path, number), header, turns, [])

    def find(*processes: ProcessRecord) -> list[str]:
        diagnosis = diagnose(RunRecord(tmp_path, list(processes)), NO_BF16, 2.0)
        return [
            evidence
            for finding in diagnosis.findings
            if finding.kind == "oversubscribed-threads"
            for evidence in finding.evidence
        ]

    assert find(process(1, 100.0), process(2, 100.1)) == [
        "2 processes of this program compute with 2 threads each on 2 cores"
    ]
    assert find(process(1, 100.0)) == []
    assert find(process(1, 100.0), process(2, 200.0), process(3, 300.0)) == []  # one after another
    assert find(process(1, 100.0), process(2, 100.0, steps=0)) == []


def test_gradients_of_gradients(recorded: Any) -> None:
    second = operator("aten::mm", 4.0, phase="backward", within="second_order")
    window = profile(operator("aten::tanh", 3.0), second, operator("aten::mm", 2.0))
    diagnosis = recorded(profiled=window)
    assert share(diagnosis, "second-order-gradients") == pytest.approx(0.4)
    [remedy] = [f.remedy for f in diagnosis.findings if f.kind == "memory-bound"]
    assert remedy.startswith("edit: use fewer of them (torch.compile cannot")
    assert "second-order-gradients" not in kinds_found(recorded(profiled=profile(PRODUCTS)))


def test_recomputation(recorded: Any) -> None:
    again = operator("aten::addmm", 2.5, phase="backward", within="recomputation")
    diagnosis = recorded(profiled=profile(PRODUCTS, again, step_ms=12.0))
    assert share(diagnosis, "recomputation") == pytest.approx(2.5 / 12, rel=1e-3)
    assert "recomputation" not in kinds_found(recorded(profiled=profile(PRODUCTS)))


def test_packed_sequences(recorded: Any) -> None:
    steps = operator("aten::add_", 6.0, calls=400, within="recurrent")
    pack = operator("aten::_pack_padded_sequence", 0.1)
    diagnosis = recorded(profiled=profile(steps, pack))
    assert share(diagnosis, "packed-sequences") == pytest.approx(0.6)
    assert "packed-sequences" not in kinds_found(recorded(profiled=profile(steps)))


def test_rows_that_are_added_up_by_index(recorded: Any) -> None:
    gather = operator("aten::index", 2.0)
    window = profile(operator("aten::scatter_add_", 3.0), gather, operator("aten::mm", 4.0))
    diagnosis = recorded(profiled=window)
    assert share(diagnosis, "scattered-rows") == pytest.approx(0.5)
    only_reads = profile(gather, operator("aten::mm", 4.0))
    assert "scattered-rows" not in kinds_found(recorded(profiled=only_reads))


@pytest.mark.parametrize(
    ("workers", "persistent", "waits_ms", "found"),
    [
        (2, False, [60.0, 90.0], True),
        (2, True, [60.0, 90.0], False),
        (0, False, [60.0, 90.0], False),
        (2, False, [60.0], False),
        (2, False, [], False),
    ],
)
def test_workers_that_start_again(
    recorded: Any, workers: int, persistent: bool, waits_ms: list[float], found: bool
) -> None:
    waits = [*[1.0] * 20, *waits_ms]
    steps = [turn(n, {**BALANCED, "data": ms}) for n, ms in enumerate(waits)]
    loader = {"workers": workers, "persistent_workers": persistent, "dataset": "Lines"}
    window = profile(PRODUCTS, facts={"loaders": [loader]})
    diagnosis = recorded(steps=steps, profiled=window)
    assert ("workers-restarted" in kinds_found(diagnosis)) == found
    if found:
        timed = diagnosis.case.steps
        total_ms = sum(step.step_ms for step in timed)
        assert share(diagnosis, "workers-restarted") == pytest.approx(148 / total_ms)
        data_ms = sum(step.phases_ms["data"] or 0.0 for step in timed) - 148
        assert data_ms / total_ms == pytest.approx(share(diagnosis, "input-bound"), abs=1e-6)


def test_an_operator_that_no_other_finding_speaks_of_is_named(recorded: Any) -> None:
    def named(*operators: dict[str, Any], ceilings: Ceilings = NO_BF16) -> list[str]:
        found = recorded(profiled=profile(*operators), ceilings=ceilings).findings
        return [f.evidence[0] for f in found if f.kind == "dominant-operator"]

    assert named(operator("aten::fft_r2c", 6.0)) == ["aten::fft_r2c: 1 calls, 60% of a step"]
    assert named(PRODUCTS) == ["aten::mm: 3 calls, 90% of a step"]
    assert named(PRODUCTS, ceilings=CEILINGS) == []  # the slow dtype is the finding
    assert named(operator("aten::scatter_add_", 6.0)) == []
    assert named(operator("aten::fft_r2c", 2.0)) == []


def test_gradients_in_evaluation(recorded: Any) -> None:
    forward = {"forward": 9.0, "other": 1.0}
    training = [turn(n, BALANCED) for n in range(20)]

    def diagnosed(grad: bool) -> Diagnosis:
        evaluation = [turn(n, forward, grad=grad, backwards=0, updates=0) for n in range(5, 15)]
        return recorded(steps=training, evaluations=evaluation)  # type: ignore[no-any-return]

    diagnosis = diagnosed(grad=True)
    assert diagnosis.bottleneck == "gradient-in-evaluation"
    assert share(diagnosis, "gradient-in-evaluation") == pytest.approx(90 / 270)
    assert kinds_found(diagnosed(grad=False)) == []


def test_gradients_in_an_inference_loop(recorded: Any) -> None:
    phases_ms = {"forward": 9.0, "other": 0.5}
    passes = [turn(n, phases_ms, backwards=0, updates=0) for n in range(20)]
    diagnosis = recorded(steps=[], evaluations=passes)
    assert diagnosis.bottleneck == "gradient-in-evaluation"
    assert not diagnosis.document()["trains"]


def test_denormals(recorded: Any) -> None:
    window = profile(PRODUCTS, facts={"parameters": {"denormal_share": 0.3}})
    assert kinds_found(recorded(profiled=window)) == ["denormals", "dominant-operator"]


def test_unoptimized_gradients(recorded: Any) -> None:
    parameters = {"unoptimized_elements": 3000, "elements_by_dtype": {"float32": 4000}}
    optimizer = {"class": "Adam", "tensors": 2, "elements": 1000, "fused": True, "can_fuse": True}
    facts = {"parameters": parameters, "optimizers": [optimizer]}
    diagnosis = recorded(profiled=profile(PRODUCTS, facts=facts))
    assert kinds_found(diagnosis) == ["unoptimized-gradients", "dominant-operator"]
    assert "3,000 of 4,000 elements" in diagnosis.findings[0].evidence[0]
    by_hand = profile(PRODUCTS, facts={**facts, "optimizers": []})
    assert "unoptimized-gradients" not in kinds_found(recorded(profiled=by_hand))


def test_memory_bound_and_layout_copies(recorded: Any) -> None:
    window = profile(
        operator("aten::mkldnn_convolution", 3.0),
        operator("aten::native_batch_norm", 4.0),
        operator("aten::copy_", 2.0),
        counted={"aten::convolution": 1},
    )
    diagnosis = recorded(profiled=window)
    assert kinds_found(diagnosis) == ["memory-bound", "layout-copies"]
    assert share(diagnosis, "memory-bound") == pytest.approx(0.4)
    faulting = recorded(profiled=replace(window, page_fault_us=0.5), minor_faults=6000)
    assert kinds_found(faulting) == ["page-fault-bound", "layout-copies"]
    without = profile(PRODUCTS, operator("aten::copy_", 2.0))
    assert "layout-copies" not in kinds_found(recorded(profiled=without))


def test_communication(recorded: Any) -> None:
    window = profile(operator("gloo:all_reduce", 3.0), operator("aten::mm", 6.0, calls=3))
    assert share(recorded(profiled=window), "idle-in-communication") == pytest.approx(0.3)


def test_synchronisation_matters_only_while_an_accelerator_is_idle(recorded: Any) -> None:
    wait = operator("cudaStreamSynchronize", 4.0, calls=50)
    item = operator("aten::_local_scalar_dense", 4.0, calls=50)
    assert "synchronisation-points" not in kinds_found(recorded(profiled=profile(item)))
    for device_ms, expected in ((7.0, 0.3), (10.0, None)):
        window = profile(wait, device_total_ms=device_ms)
        diagnosis = recorded(profiled=window, header={"accelerator": "cuda"})
        if expected is None:
            assert "synchronisation-points" not in kinds_found(diagnosis)
        else:
            assert share(diagnosis, "synchronisation-points") == pytest.approx(expected)


def test_what_is_counted_with_the_operator_that_calls_it_is_known(recorded: Any) -> None:
    attention = operator("aten::_native_multi_head_attention", 3.0, calls=6)
    whole = {"aten::_transformer_encoder_layer_fwd": 6}
    case = recorded(profiled=profile(PRODUCTS, attention, counted=whole)).case
    assert case.uncounted_operators == []
    alone = recorded(profiled=profile(PRODUCTS, attention)).case
    assert alone.uncounted_operators == ["aten::_native_multi_head_attention"]


def test_communication_that_other_kernels_hide_costs_nothing(recorded: Any) -> None:
    reduce = operator("nccl:all_reduce", 0.1, device_self_ms=4.0)
    for product_ms, expected in ((9.8, None), (7.0, 0.3), (2.0, 0.4)):
        product = operator("aten::mm", 0.5, calls=3, device_self_ms=product_ms)
        window = profile(reduce, product, device_total_ms=4.0 + product_ms)
        found = recorded(profiled=window, header={"accelerator": "cuda"}, ceilings=ON_CUDA)
        if expected is None:
            assert "idle-in-communication" not in kinds_found(found)
        else:
            assert share(found, "idle-in-communication") == pytest.approx(expected)


def test_without_times_of_the_device_waiting_for_it_is_not_taken_for_python(recorded: Any) -> None:
    window = profile(
        PRODUCTS, facts={"parameters": {"elements_by_device": {"mps": 9}, "denormal_share": None}}
    )
    found = recorded({"forward": 2.0, "other": 8.0}, window, header={"accelerator": "mps"})
    assert "python-between-steps" not in kinds_found(found)


def test_waiting_for_an_accelerator_is_no_time_of_python_or_data(recorded: Any) -> None:
    waiting = {"forward": 2.0, "data": 3.0, "other": 5.0}
    product = operator("aten::mm", 0.5, calls=3, device_self_ms=8.5)
    window = profile(product, device_total_ms=9.8)
    diagnosis = recorded(waiting, window, header={"accelerator": "cuda"}, ceilings=ON_CUDA)
    assert kinds_found(diagnosis) == ["compute-bound-wrong-dtype"]
    assert share(diagnosis, "compute-bound-wrong-dtype") == pytest.approx(0.85 * 0.75)
    idle = profile(product, device_total_ms=6.0)
    diagnosis = recorded(waiting, idle, header={"accelerator": "cuda"}, ceilings=ON_CUDA)
    assert share(diagnosis, "python-between-steps") == pytest.approx(0.4)
    assert share(diagnosis, "input-bound") == pytest.approx(0.3)


def test_a_program_that_leaves_the_accelerator_alone_is_held_against_the_host(
    recorded: Any,
) -> None:
    drawing = operator("aten::bernoulli_", 4.0, device_self_ms=0.0)
    product = operator("aten::mm", 5.0, calls=3, device_self_ms=0.0)
    window = profile(
        *(drawing, product),
        device_total_ms=0.0,
        facts={"parameters": {"elements_by_device": {"cpu": 100}, "denormal_share": 0.0}},
    )
    diagnosis = recorded(profiled=window, header={"accelerator": "cuda"}, ceilings=ON_CUDA)
    assert diagnosis.case.device == "cpu"
    assert "slow-random-numbers" in kinds_found(diagnosis)
    assert diagnosis.case.mfu == pytest.approx(10.0)  # 1e8 operations in 10 ms, at 1e9 a second


def test_the_share_of_an_operator_is_that_of_its_work_on_the_device(recorded: Any) -> None:
    window = profile(
        operator("aten::mm", 0.5, calls=3, device_self_ms=6.0),
        operator("aten::add", 2.0, calls=3, device_self_ms=0.01),
        device_total_ms=6.01,
    )
    case = recorded(profiled=window, header={"accelerator": "cuda"}, ceilings=ON_CUDA).case
    known = candidates.collect_facts(case)
    assert known.device == "cuda"
    assert known.operators == pytest.approx({"aten::mm": 0.6, "aten::add": 0.001})
    assert known.overhead_share == pytest.approx(0.4)
    assert [o.name for o in case.operators_by_name] == ["aten::mm", "aten::add"]
    assert known.matmul_flops_per_s == RATES


def test_mfu_weighs_each_dtype_with_its_own_ceiling(recorded: Any) -> None:
    window = profile(PRODUCTS, flops_by_dtype={"float32": 10**8, "bfloat16": 4 * 10**8})
    assert recorded(profiled=window, ceilings=CEILINGS).case.mfu == pytest.approx(0.2)
    assert recorded(profiled=window, ceilings=None).case.mfu is None
    window = profile(PRODUCTS, flops_by_dtype={"float16": 10**8})
    assert recorded(profiled=window, ceilings=CEILINGS).case.mfu is None


def test_mfu_is_unknown_with_a_heavy_operator_that_no_formula_counts(recorded: Any) -> None:
    for heavy in ("aten::_cdist_forward", "aten::some_new_attention", "aten::_fft_r2c"):
        diagnosis = recorded(profiled=profile(PRODUCTS, operator(heavy, 2.0)))
        assert diagnosis.case.uncounted_operators == [heavy]
        assert diagnosis.document()["mfu"] is None
        assert diagnosis.document()["flops_per_step"] is None
    light = profile(PRODUCTS, operator("aten::_cdist_forward", 0.1), operator("aten::gelu", 4.0))
    assert recorded(profiled=light).case.mfu is not None


def test_mfu_is_unknown_when_products_hide_inside_another_operator(recorded: Any) -> None:
    hidden = profile(operator("aten::addmm", 9.0, calls=12), counted={})
    assert recorded(profiled=hidden).case.mfu is None


def test_what_was_not_measured_is_null(recorded: Any) -> None:
    document = recorded(minor_faults=None, peak_rss_bytes=None, ceilings=None).document()
    for key in ("mfu", "flops_per_step", "minor_faults_per_step", "peak_rss_bytes", "operators"):
        assert document[key] is None, key
    assert document["uncounted_operators"] is None
    assert document["phases_ms"]["data"] is None
    json.dumps(document)


def test_nothing_to_diagnose(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no training or inference step"):
        diagnose(RunRecord(tmp_path, []), None)


def test_the_knobs_that_findings_name_are_there() -> None:
    folder = Path(findings.__file__).parent
    named = [
        word
        for file in folder.glob("*.py")
        for word in re.findall(r"knob: ([a-z_]+=[a-z_0-9]+)", file.read_text())
    ]
    assert named
    for word in named:
        knobs.check(*word.split("="))


def test_every_kind_is_in_the_documentation() -> None:
    page = Path(__file__).parents[1].joinpath("docs/findings.md").read_text()
    assert re.findall(r"\| `([a-z-]+)` \|", page) != []
    assert set(re.findall(r"\| `([a-z-]+)` \|", page)) == set(kinds())


def test_every_kind_has_a_test() -> None:
    source = Path(__file__).read_text()
    assert [kind for kind in kinds() if f'"{kind}"' not in source] == []


@pytest.mark.parametrize(
    ("waited", "others", "said"),
    [
        (0.4, 0.9, "others took 45% of the CPUs that this program may use, and its threads waited"),
        (0.0, 0.9, "others took 45% of the CPUs that this program may use, and hardly delayed it"),
        (0.0, 0.02, None),
        (0.0, None, None),
    ],
)
def test_other_work_is_said(
    recorded: Any, waited: float, others: float | None, said: str | None
) -> None:
    diagnosis = recorded(steps=[turn(n, BALANCED) for n in range(40)])
    process = diagnosis.case.process
    for at_s in (0.0, process.steps[-1].end_s + 1):
        idle_s = None if others is None else (1 - others) * at_s
        process.usage.append(CpuUsage(at_s, 2, at_s, waited * at_s, idle_s=idle_s))
    text = io.StringIO()
    print_diagnosis(diagnosis, text)
    shown = " ".join(text.getvalue().split())
    assert ("Note: others took" in shown) == (said is not None)
    assert said is None or said in shown
    share = "not measured" if others is None else f"others took {others / 2:.1%} of the CPUs"
    assert f"other work {share}" in shown
    found = diagnosis.document()["others_share"]
    assert found == (None if others is None else pytest.approx(others / 2))


def test_a_ceiling_that_was_measured_beside_other_work_is_said(recorded: Any) -> None:
    busy = replace(CEILINGS, others_share=0.3)
    text = io.StringIO()
    print_diagnosis(recorded(ceilings=busy), text)
    assert "others took 30% of the CPUs while this machine's rates were" in text.getvalue()


def test_the_report_names_findings_and_what_is_missing(recorded: Any) -> None:
    text = io.StringIO()
    print_diagnosis(recorded({**BALANCED, "data": 30.0}, ceilings=None), text)
    report = text.getvalue()
    assert "input-bound - waiting for data: at most 75% of a step" in report
    assert "before its operators could" in report
    assert "transfer" not in report
    assert "steps were timed" not in report
    text = io.StringIO()
    print_diagnosis(recorded(steps=[turn(n, BALANCED) for n in range(5)]), text)
    assert "only 4 steps were timed; a longer --budget would tell more" in text.getvalue()
    ended = recorded(steps=[turn(n, BALANCED) for n in range(5)])
    ended.case.process.end = End(at_s=1.0, reason="exit")
    text = io.StringIO()
    print_diagnosis(ended, text)
    assert "only 4 steps were timed; a longer run of the program would" in text.getvalue()
    text = io.StringIO()
    small = [operator(f"aten::{name}", 2.0) for name in ("mm", "bmm", "addmm", "dot")]
    print_diagnosis(recorded(profiled=profile(*small, counted=dict.fromkeys(COUNTED, 1))), text)
    assert "Findings: none" in text.getvalue()
    assert "MFU 10.0%" in text.getvalue()


def test_the_report_is_short_unless_all_is_asked_for(recorded: Any) -> None:
    case = recorded(profiled=profile(PRODUCTS)).case
    found = [
        findings.Finding(f"kind-{n}", "a title", [f"evidence {n}"] * 3, 0.5, "knob: gc=seldom")
        for n in range(9)
    ]
    short, whole = io.StringIO(), io.StringIO()
    print_diagnosis(Diagnosis(case, found), short)
    print_diagnosis(Diagnosis(case, found), whole, verbose=True)
    assert len(short.getvalue().splitlines()) < 40
    lines = short.getvalue().splitlines()
    assert lines[1].startswith("Findings")  # below the headline, before all tables
    assert "kind-4" in short.getvalue()
    assert "kind-5" not in short.getvalue()
    assert "evidence 1" in short.getvalue()
    assert "evidence 2" not in short.getvalue()
    assert "(-v shows all 9 with their evidence)" in short.getvalue()
    assert all(f"evidence {n}" in whole.getvalue() for n in range(9))


# The verb

PROGRAM = """
import sys, torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
optimizer = torch.optim.AdamW(model.parameters())
x, y = torch.randn(32, 64), torch.randint(0, 8, (32,))
print("begins")
for step in range(int(sys.argv[1])):
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print("ends")
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for flatout's own files, so that the machine is measured once."""
    home = tmp_path_factory.mktemp("home")
    (home / "train.py").write_text(PROGRAM)
    return home


def doctor(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flatout", "doctor", "--in-place", *words],
        env={**os.environ, "FLATOUT_HOME": str(home / "own"), "OMP_NUM_THREADS": "1"},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_doctor_stops_the_program_and_reports(home: Path) -> None:
    pytest.importorskip("torch")
    job = [sys.executable, "train.py", "1000000"]
    completed = doctor(home, "--steps", "20", "--json", "out.json", "--", *job)
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.startswith("begins\n")
    assert "ends" not in completed.stdout
    assert "unfused-optimizer" in completed.stdout
    assert all(line.startswith("flatout: ") for line in completed.stderr.splitlines())
    document = json.loads((home / "out.json").read_text())
    assert document["steps"] == 17
    assert document["step_ms"] > 0
    assert document["phases_ms"]["data"] is None
    assert document["flops_per_step"] == 2 * 32 * (2 * 64 * 64 + 3 * 64 * 8)
    assert 0 < document["mfu"] < 1
    assert document["bottleneck"] == document["findings"][0]["kind"]
    assert document["uncounted_operators"] == []


def test_doctor_under_a_knob_shows_what_is_left(home: Path) -> None:
    pytest.importorskip("torch")
    job = [sys.executable, "train.py", "1000000"]
    turned = ["--set", "precision=bf16", "--set", "random=fast", "--set", "denormals=flush"]
    completed = doctor(home, "--quiet", "--steps", "20", *turned, "--json", "out.json", "--", *job)
    assert completed.returncode == 0, completed.stderr
    assert json.loads((home / "out.json").read_text())["dtype"] == "bfloat16"


def test_doctor_of_a_short_program_says_what_is_missing(home: Path) -> None:
    pytest.importorskip("torch")
    completed = doctor(home, "--quiet", "--", sys.executable, "train.py", "12")
    assert completed.returncode == 0, completed.stderr
    assert "the program ended after 12 steps" in completed.stdout
    assert "begins" not in completed.stdout
    output = completed.stderr.split("output is in ")[1].strip()
    assert Path(output).expanduser().read_text() == "begins\nends\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["python", "-c", "import torch; raise SystemExit(7)"], "exited with status 7 before"),
        (["python", "-c", "import torch; 1/0"], "exited with status 1 before its first step"),
        (["python", "-c", "import torch; print(1)"], "no training or inference step"),
        (["python", "-c", "print(1)"], "never imported torch"),
        (["python", "-I", "-c", "print(1)"], "no Python process of this command loaded"),
        (["no-such-program"], "there is no program 'no-such-program'"),
    ],
)
def test_doctor_of_nothing_to_diagnose_is_one_sentence(
    home: Path, words: list[str], said: str
) -> None:
    pytest.importorskip("torch")
    job = [sys.executable if word == "python" else word for word in words]
    completed = doctor(home, "--", *job)
    assert completed.returncode != 0
    last = completed.stderr.splitlines()[-1]
    assert last.startswith("flatout: ")
    assert said in last
    assert "flatout/" not in completed.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--steps", "0"],
        ["--seconds", "0"],
        ["--json", "no/x.json"],
        ["--set", "x=y"],
        ["--set", "x"],
    ],
)
def test_doctor_refuses_options_that_make_no_sense(home: Path, words: list[str]) -> None:
    completed = doctor(home, *words, "--", "true")
    assert completed.returncode == 2
    assert completed.stderr.startswith("flatout: ")
