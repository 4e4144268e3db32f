"""Jobs of several processes: they switch settings and stop at the same steps, and a knob for how
they average gradients."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from flatout.agent.ensemble import Ensemble
from flatout.wire.record import ProcessRecord, read_run
from flatout.wire.request import RUN_VARIABLE, Comparison, Request
from tests import forking

PROGRAM = """
import os, sys, time
import torch
from flatout.agent import activate
activate()
from torch import distributed, nn
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
distributed.init_process_group(
    "gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=size
)
torch.manual_seed(0)
net = nn.parallel.DistributedDataParallel(
    nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)){options}
)
optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
generator = torch.Generator().manual_seed(rank)
for number in range(int(sys.argv[2])):
    {step}
    loss = net(torch.randn(16, 8, generator=generator)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(float(sum(p.double().sum() for p in net.parameters())))
"""


def run(
    folder: Path, request: Request, steps: int, step: str = "pass", options: str = ""
) -> tuple[list[ProcessRecord], list[str]]:
    """Run the program as two processes; returns their records and what they have printed."""
    run_directory = folder / "run"
    run_directory.mkdir()
    request.write(run_directory)
    script = folder / "program.py"
    script.write_text(PROGRAM.replace("{step}", step).replace("{options}", options))

    def of(rank: int) -> Any:
        variables = {RUN_VARIABLE: str(run_directory), "RANK": str(rank), "WORLD_SIZE": "2"}
        return forking.run(
            [sys.executable, script, str(folder / "store"), str(steps)],
            env={**os.environ, **variables, "OMP_NUM_THREADS": "1"},
            server=rank,
        )

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(of, range(2)))
    for outcome in outcomes:
        assert outcome.returncode == 0, outcome.stderr
    processes = read_run(run_directory).processes
    assert len(processes) == 2
    # The gloo of torch 2.9 says on standard output that it is connected.
    lines = [[line for line in o.stdout.splitlines() if "[Gloo]" not in line] for o in outcomes]
    return list(processes), ["".join(of_process) for of_process in lines]


def in_two_threads(function: Callable[[Ensemble], Any]) -> list[Any]:
    store = distributed.HashStore()
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: function(Ensemble(store, rank, 2)), range(2)))


def test_all_processes_get_all_messages() -> None:
    def exchange(ensemble: Ensemble) -> Any:
        return [ensemble.exchange([ensemble.rank, number]) for number in range(3)]

    found = in_two_threads(exchange)
    assert found[0] == found[1] == [[[0, number], [1, number]] for number in range(3)]


def test_the_last_step_is_named_by_rank_0() -> None:
    first, second = (Ensemble(distributed.HashStore(), rank, 2) for rank in range(2))
    second._store = first._store
    assert not second.is_last_step(4, wants_end=True)
    assert not first.is_last_step(4, wants_end=True)
    assert second.is_last_step(5, wants_end=False)
    assert first.is_last_step(5, wants_end=True)


SLOWER = {
    # The arms look different in each process, and gain nothing in one of them.
    "times differ": "time.sleep(0.004 * (rank == number // 4 % 2))",
    "nothing": "pass",
}


@pytest.mark.parametrize("step", SLOWER)
def test_processes_compare_the_same_arms_in_the_same_steps(step: str, tmp_path: Path) -> None:
    comparison = Comparison(
        ({}, {"optimizer": "fused"}, {"gc": "seldom"}),
        warmup_steps=5,
        block_steps=4,
        discard_steps=1,
        rounds=8,
        decide="arms",
    )
    processes, _ = run(tmp_path, Request(comparison=comparison), 100_000, SLOWER[step])
    arms = [[recorded.arm for recorded in process.steps] for process in processes]
    assert {0, 1, 2} <= set(arms[0])
    assert arms[0] == arms[1]


def test_an_arm_that_fails_in_one_process_is_dropped_in_all(tmp_path: Path) -> None:
    breaks = (
        "from flatout.knobs import optimizer as knob\n"
        "    if rank == 1: knob.KNOB.__dict__['apply'] = lambda *_: 1 / 0"
    )
    comparison = Comparison(
        ({}, {"optimizer": "fused"}, {"gc": "seldom"}),
        warmup_steps=3,
        block_steps=4,
        discard_steps=1,
        rounds=2,
    )
    processes, _ = run(tmp_path, Request(comparison=comparison), 100_000, breaks)
    arms = [[recorded.arm for recorded in process.steps] for process in processes]
    assert arms[0] == arms[1]
    assert 1 not in arms[0]
    assert 2 in arms[0]


def test_processes_stop_after_the_same_step(tmp_path: Path) -> None:
    request = Request(stop_seconds=0.3)
    processes, printed = run(tmp_path, request, 1_000_000, "time.sleep(0.001 * rank)")
    assert printed == ["", ""]
    first, second = (len(process.steps) for process in processes)
    assert first == second > 3


VIEW = ", gradient_as_bucket_view=True"


@pytest.mark.parametrize(
    ("setting", "options"),
    [("view", ""), ("view", VIEW), ("large", ""), ("static", VIEW), ("fp16", VIEW)],
)
def test_gradients_are_averaged_as_without_the_knob(
    setting: str, options: str, tmp_path: Path
) -> None:
    (tmp_path / "bare").mkdir()
    _, bare = run(tmp_path / "bare", Request(), 12, options=options)
    (tmp_path / "knob").mkdir()
    processes, printed = run(
        tmp_path / "knob", Request(settings={"ddp": setting}), 12, options=options
    )
    for process in processes:
        skipped = [event.why for event in process.events if event.what in ("skipped", "failed")]
        assert skipped == ["the program gives these arguments itself"] * (
            setting == "view" and bool(options)
        )
    assert printed[0] == printed[1]
    tolerance = 2e-3 if setting == "fp16" else 1e-6
    assert float(printed[0]) == pytest.approx(float(bare[0]), abs=tolerance)


def test_a_hook_of_the_programs_own_stays(tmp_path: Path) -> None:
    hook = (
        "from torch.distributed.algorithms.ddp_comm_hooks import default_hooks\n"
        "    if number == 0: net.register_comm_hook(None, default_hooks.allreduce_hook)"
    )
    processes, _ = run(tmp_path, Request(settings={"ddp": "fp16"}), 6, hook)
    for process in processes:
        reasons = [event.why for event in process.events if event.what == "skipped"]
        assert reasons == ["the program averages gradients by a hook of its own"]
