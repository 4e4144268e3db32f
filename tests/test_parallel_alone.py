"""Rank 0 goes on alone where the ranks cost more time than they can save."""

import contextlib
import json
import os
from pathlib import Path

import pytest

from flatout.parallel.balance import (
    LOST_WINDOWS,
    MOST_LAPS,
    WINDOW_S,
    Balance,
    Exchange,
    Graphs,
    Phase,
)
from flatout.wire.record import read_run
from flatout.wire.request import Ranks, Request
from tests import side_by_side


class Clock:
    """A clock that tests turn on."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def spend(balance: Balance, clock: Clock, phase: Phase, seconds: float) -> None:
    with balance.spend(phase):
        clock.now_s += seconds


def test_time_belongs_to_the_innermost_phase() -> None:
    clock = Clock()
    balance = Balance(2, clock)
    clock.now_s += 1
    with balance.spend(Phase.COMPARISON):
        clock.now_s += 2
        with balance.spend(Phase.SHARD):
            clock.now_s += 4
            spend(balance, clock, Phase.COMMUNICATION, 8)
            clock.now_s += 16
        clock.now_s += 32
        with contextlib.suppress(ValueError), balance.spend(Phase.PROGRAM):
            clock.now_s += 64
            raise ValueError
    spend(balance, clock, Phase.SHARD, 128)
    spend(balance, clock, Phase.WAITING, 256)
    assert balance.seconds == {
        Phase.PROGRAM: 1 + 64,
        Phase.TESTING: 0,
        Phase.COMPARISON: 2 + 32,
        Phase.SHARD: 4 + 16 + 128,
        Phase.WAITING: 256,
        Phase.COMMUNICATION: 8,
    }
    assert (balance.cost_s, balance.saving_s) == (298, 148)


def test_a_lap_has_what_was_done_since_the_one_before() -> None:
    clock = Clock()
    balance = Balance(2, clock)
    spend(balance, clock, Phase.TESTING, 64)
    balance.count(Exchange.MEETING)
    balance.end_lap()
    clock.now_s += 1
    balance.count(Exchange.GATHERED_BYTES, 100)
    with balance.spend(Phase.COMPARISON):
        clock.now_s += 2
        spend(balance, clock, Phase.SHARD, 4)
        balance.end_lap()
        clock.now_s += 8
    balance.end_lap()
    first, second, third = balance.laps
    assert (first.testing_s, first.meetings, first.gathered_bytes) == (64, 1, 0)
    assert (second.program_s, second.comparison_s, second.shard_s) == (1, 2, 4)
    assert (second.meetings, second.gathered_bytes) == (0, 100)
    assert (third.comparison_s, third.shard_s) == (8, 0)
    assert [lap.number for lap in balance.laps] == [0, 1, 2]
    assert [lap.end_s for lap in balance.laps] == [164, 171, 179]


def test_only_the_last_laps_are_kept() -> None:
    balance = Balance(2, Clock())
    for _ in range(MOST_LAPS + 5):
        balance.end_lap()
    assert [lap.number for lap in balance.laps] == list(range(5, MOST_LAPS + 5))


def test_the_bound_is_that_of_amdahl() -> None:
    clock = Clock()
    balance = Balance(4, clock)
    clock.now_s += 10
    for phase, seconds in ((Phase.SHARD, 10), (Phase.WAITING, 15), (Phase.COMMUNICATION, 5)):
        spend(balance, clock, phase, seconds)
    clock.now_s += 10
    assert balance.describe() == (
        "rank 0 has spent 20% on its shards, 40% on what every rank does alike, 0% testing what "
        "may be shared out, 30% waiting for other ranks, 10% sending and "
        "receiving tensors, 0% comparing inputs and states; 4 ranks "
        "are at most 2.00 times as fast as one of them alone"
    )


def test_a_saving_counts_once_for_each_other_rank() -> None:
    clock = Clock()
    balance = Balance(4, clock)
    for _ in range(20):
        spend(balance, clock, Phase.COMMUNICATION, 2.9)
        spend(balance, clock, Phase.SHARD, 1.0)
        assert not balance.has_lost()


def test_ranks_have_lost_after_several_windows() -> None:
    clock = Clock()
    balance = Balance(2, clock)
    spend(balance, clock, Phase.PROGRAM, 1000)
    found = []
    for _ in range(LOST_WINDOWS + 1):
        found.append(balance.has_lost())
        spend(balance, clock, Phase.COMPARISON, WINDOW_S * 0.6)
        spend(balance, clock, Phase.SHARD, WINDOW_S * 0.4)
    assert found == [False] * LOST_WINDOWS + [True]


def test_one_slow_window_is_not_enough() -> None:
    clock = Clock()
    balance = Balance(2, clock)
    for number in range(20):
        costs = number % 2 == 0
        spend(balance, clock, Phase.COMMUNICATION, WINDOW_S * (0.9 if costs else 0.1))
        spend(balance, clock, Phase.SHARD, WINDOW_S * (0.1 if costs else 0.9))
        assert not balance.has_lost()


def test_what_was_saved_before_counts() -> None:
    clock = Clock()
    balance = Balance(2, clock)
    spend(balance, clock, Phase.SHARD, 10)
    losses = 0
    while not balance.has_lost():
        spend(balance, clock, Phase.COMMUNICATION, WINDOW_S)
        losses += 1
    assert losses * WINDOW_S == pytest.approx(10 + WINDOW_S)


def test_a_graph_is_open_until_a_backward_call_has_gone_through_it() -> None:
    graphs = Graphs(Balance(2))
    assert not graphs.are_open()
    first, second = graphs.open(), graphs.open()
    first.enter()
    graphs.close_reached(is_kept=True)
    graphs.close_reached(is_kept=False)
    assert graphs.are_open()
    first.enter()
    graphs.close_reached(is_kept=False)
    assert graphs.are_open()
    del second
    assert not graphs.are_open()


def gives_up(processors: list[int]) -> Request:
    return Request(seed=0, ranks=Ranks(2, 0, 0, tuple(processors), gives_up=True))


GO_ALONE = """
import json
from torch import nn
from flatout.parallel.balance import Balance
shown = []
def show(*values):
    shown.append([float(value) for value in values])
def go_alone():
    Balance.has_lost = lambda self: True
def finish():
    parallel = agent._session._parallel
    is_alone = parallel is not None and parallel._is_alone
    print(json.dumps([shown, is_alone, len(os.sched_getaffinity(0)), torch.get_num_threads()]))
import os
from flatout import agent
model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
"""

PROGRAMS = {
    "a plain loop": """
for i in range(8):
    loss = model(torch.randn(7, 6)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    show(loss, *(p.grad.norm() for p in model.parameters()))
    if i == 3:
        go_alone()
""",
    "two models and a graph that outlives a step": """
critic = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
critic_optimizer = torch.optim.SGD(critic.parameters(), 1e-2)
for i in range(8):
    if i == 3:
        go_alone()
    fake = model(torch.randn(7, 6))
    critic_optimizer.zero_grad()
    loss = critic(torch.randn(7, 1)).mean() - critic(fake.detach()).mean()
    loss.backward()
    critic_optimizer.step()
    optimizer.zero_grad()
    (-critic(fake).mean()).backward()
    optimizer.step()
    show(loss, *(p.grad.norm() for p in model.parameters()))
""",
    "two losses from inside of a module": """
class Losing(nn.Module):
    def forward(self, x):
        return model(x).square().mean()
losing = Losing()
for i in range(8):
    first = losing(torch.randn(7, 6))
    if i == 3:
        go_alone()
    loss = first + losing(torch.randn(7, 6))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    show(loss, *(p.grad.norm() for p in model.parameters()))
""",
    "a loss beside outputs that live on": """
class Both(nn.Module):
    def forward(self, x):
        outputs = model(x)
        return outputs.square().mean(), outputs
both = Both()
for i in range(8):
    loss, outputs = both(torch.randn(7, 6))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    show(loss, outputs.sum(), *(p.grad.norm() for p in model.parameters()))
    if i == 3:
        go_alone()
""",
    "a penalty with a second derivative": """
for i in range(8):
    x = torch.randn(7, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    loss = gradient.square().mean() + model(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    show(loss, *(p.grad.norm() for p in model.parameters()))
    if i == 3:
        go_alone()
""",
    "evaluation only": """
model.eval()
for i in range(8):
    with torch.no_grad():
        show(model(torch.randn(7, 6)).sum())
    if i == 3:
        go_alone()
""",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_rank_0_computes_on_what_the_program_computes(name: str, tmp_path: Path) -> None:
    program = GO_ALONE + PROGRAMS[name] + "finish()\n"
    processors = sorted(os.sched_getaffinity(0))
    (alone,) = side_by_side.run(program, 1, tmp_path)
    first, second = side_by_side.run(program, 2, tmp_path, request=gives_up(processors))
    assert (first.status, second.status) == (0, 0), first.stderr + second.stderr
    expected, _, _, _ = json.loads(alone.stdout)
    found, is_alone, cores, _ = json.loads(first.stdout)
    assert is_alone
    assert cores == len(processors)
    assert second.stdout == ""
    for line, line_alone in zip(found, expected, strict=True):
        assert line == pytest.approx(line_alone, rel=1e-9)


def test_a_backward_call_through_what_was_shared_stops_the_ranks_by_name(tmp_path: Path) -> None:
    program = GO_ALONE + (
        "output = model(torch.randn(7, 6))\n"
        "output.sum().backward(retain_graph=True)\n"
        "agent._session._parallel._team.graphs._open.clear()\n"
        "go_alone()\nmodel(torch.randn(7, 6))\noutput.sum().backward()\n"
    )
    first, _ = side_by_side.run(
        program, 2, tmp_path, request=gives_up(sorted(os.sched_getaffinity(0)))
    )
    assert first.status == 1
    assert "goes on alone and then makes a backward call" in first.stderr


def test_ranks_stay_together_where_they_are_not_to_part(tmp_path: Path) -> None:
    program = GO_ALONE + "go_alone()\n" + PROGRAMS["a plain loop"] + "finish()\n"
    for outcome in side_by_side.run(program, 2, tmp_path):
        assert json.loads(outcome.stdout)[1] is False


def test_each_rank_records_what_it_has_shared_out_and_spent(tmp_path: Path) -> None:
    program = GO_ALONE + PROGRAMS["a plain loop"] + "model(torch.ones(1, 6))\nfinish()\n"
    program = program.replace("BatchNorm1d", "LayerNorm").replace("    go_alone()", "    pass")
    side_by_side.run(program, 2, tmp_path)
    processes = read_run(tmp_path / "run-2").processes
    assert len(processes) == 2
    for process in processes:
        work = process.shared_work
        assert work is not None
        assert (work.ranks, work.shared) == (2, {"Sequential": 8})
        assert [(calls.module, calls.count) for calls in work.whole] == [("Sequential", 1)]
        assert set(work.seconds) == {phase.value for phase in Phase}
        assert all(seconds > 0 for seconds in work.seconds.values())


def test_each_rank_records_its_exchanges_step_by_step(tmp_path: Path) -> None:
    evaluation = "model.eval()\nwith torch.no_grad():\n    model(torch.randn(8, 6))\nfinish()\n"
    program = GO_ALONE + PROGRAMS["a plain loop"] + evaluation
    program = program.replace("BatchNorm1d", "LayerNorm").replace("    go_alone()", "    pass")
    side_by_side.run(program, 2, tmp_path)
    parameter_bytes = 8 * (6 * 8 + 8 + 2 * 8 + 8 + 1)
    output_bytes = 8 * 7
    for process in read_run(tmp_path / "run-2").processes:
        work = process.shared_work
        assert work is not None
        *steps, last = work.laps
        assert [lap.number for lap in work.laps] == list(range(9))
        for lap in steps:
            assert (lap.calls, lap.rows, lap.backwards) == (1, 7, 1)
            assert (lap.gathers, lap.sums) == (1, 1)
            assert (lap.gathered_bytes, lap.summed_bytes) == (output_bytes, parameter_bytes)
            assert min(lap.shard_s, lap.waiting_s, lap.communication_s, lap.program_s) > 0
        assert [lap.meetings for lap in steps[1:7]] == [3] * 6
        assert (last.calls, last.rows, last.backwards) == (1, 8, 0)
        assert (last.gathers, last.sums, last.summed_bytes) == (1, 0, 0)
        ends_s = [lap.end_s for lap in work.laps]
        assert process.steps[0].at_s < ends_s[0]
        assert ends_s == sorted(ends_s)
        assert process.end is not None
        assert ends_s[-1] < process.end.at_s
