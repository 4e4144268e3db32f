"""Where a turn begins and ends, and what it was doing: on events with made-up times.

A program is written as a string of events, one letter each, 1 ms apart unless noted:

    D  fetch a batch (2 ms)                   F  forward, gradients on, training mode (4 ms)
    X  find a loader exhausted (2 ms)         C  a closure's optimizer step, with F and B twice
    e  forward, gradients off, evaluation     g  forward, gradients on, evaluation mode
    n  forward, gradients off, training mode  B  backward (3 ms)
    O  optimizer step (2 ms)                  .  1 ms of something else

A digit after F, e, g, n, O, D or X names the module, the optimizer or the loader.
"""

from __future__ import annotations

import pytest

from flatout.wire.turns import PHASES, Turn, Turns

MS = 1_000_000


class Program:
    def __init__(self, *, optimizer_exists: bool = True) -> None:
        self.now = 0
        self.closed: list[Turn] = []
        self.turns = Turns(self.closed.append, optimizer_exists)

    def wait(self, ms: int) -> int:
        self.now += ms * MS
        return self.now

    def play(self, events: str) -> Program:
        letters = list(events.replace(" ", ""))
        while letters:
            letter = letters.pop(0)
            which = int(letters.pop(0)) if letters and letters[0].isdigit() else 1
            self.event(letter, which)
        return self

    def event(self, letter: str, which: int) -> None:
        turns = self.turns
        if letter in "DX":
            turns.fetch_begins(self.wait(1), which)
            turns.fetch_ends(self.wait(2), which, letter == "X")
        elif letter == "C":
            turns.update_begins(self.wait(1), which)
            self.play("FBFB")
            turns.update_ends(self.wait(2), which)
        elif letter in "Fegn":
            turns.forward_begins(self.wait(1), which, grad=letter in "Fg", training=letter in "Fn")
            turns.forward_ends(self.wait(4))
        elif letter == "B":
            turns.backward_begins(self.wait(1), loss=1.0)
            turns.backward_ends(self.wait(3))
        elif letter == "O":
            turns.update_begins(self.wait(1), which)
            turns.update_ends(self.wait(2), which)
        else:
            self.wait(1)

    def kinds(self) -> str:
        self.turns.finish()
        return "".join(turn.kind[0] for turn in self.closed)

    def counts(self) -> list[tuple[int, int, int]]:
        """Forwards, backwards and updates of each training step."""
        self.turns.finish()
        return [
            (turn.forwards, turn.backwards, turn.updates)
            for turn in self.closed
            if turn.kind == "step"
        ]


@pytest.mark.parametrize(
    ("loop", "steps", "counts"),
    [
        pytest.param("DFBO", 5, (1, 1, 1), id="loader"),
        pytest.param("FBO", 5, (1, 1, 1), id="no loader"),
        pytest.param("..FBO..", 5, (1, 1, 1), id="no loader, own batches"),
        pytest.param("DF1B F1B O1 F1B O2", 4, (3, 3, 2), id="GAN with a loader"),
        pytest.param("DF1B F1B F1B O1 F1B O2", 4, (4, 4, 2), id="GAN with a gradient penalty"),
        pytest.param("D1D2FBO", 4, (1, 1, 1), id="two loaders"),
        pytest.param("D1FB D2FBO", 4, (2, 2, 1), id="a loss for each of two loaders"),
        pytest.param("D1D2 FBFBO", 4, (2, 2, 1), id="a loss for each of two loaders, at once"),
        pytest.param("DDFBO", 4, (1, 1, 1), id="two batches of a loader, one loss"),
        pytest.param("DFBBO", 4, (1, 2, 1), id="two losses of one forward call"),
        pytest.param("DFBFBFBFBFBO", 4, (5, 5, 1), id="adversarial examples of a batch"),
        pytest.param("FBFBFBO", 4, (3, 3, 1), id="three losses without a loader"),
        pytest.param("F1BF2BF1BF2BO", 4, (4, 4, 1), id="losses of two modules without a loader"),
        pytest.param("DC", 4, (2, 2, 1), id="closure"),
        pytest.param("C", 4, (2, 2, 1), id="closure without a loader"),
        pytest.param("DF1F1BO", 4, (2, 1, 1), id="siamese"),
        pytest.param("De2F1BO", 4, (2, 1, 1), id="teacher in evaluation mode"),
        pytest.param("DO1O1O1O1O2", 4, (0, 0, 5), id="critic steps within a batch"),
    ],
)
def test_training_steps_are_the_turns_of_the_loop(
    loop: str, steps: int, counts: tuple[int, int, int]
) -> None:
    program = Program().play(loop * steps)
    assert program.kinds() == "s" * steps
    assert program.counts() == [counts] * steps


@pytest.mark.parametrize(
    ("cycle", "micro_batch", "last"),
    [
        pytest.param("DFB" * 8 + "O", (1, 1, 0), (1, 1, 1), id="loader"),
        pytest.param("DFB" * 2 + "O", (1, 1, 0), (1, 1, 1), id="two micro-batches"),
        pytest.param("DDDD FBFBFBFB O", (1, 1, 0), (1, 1, 1), id="batches fetched together"),
        pytest.param("FB" * 8 + "O", (1, 1, 0), (1, 1, 1), id="no loader"),
        pytest.param("..FB" * 8 + "O", (1, 1, 0), (1, 1, 1), id="no loader, own batches"),
        pytest.param("DF1BF2B" * 3 + "O", (2, 2, 0), (2, 2, 1), id="two losses of a micro-batch"),
        pytest.param("D1D2FB" * 4 + "O", (1, 1, 0), (1, 1, 1), id="two loaders"),
        pytest.param("De2F1B" * 4 + "O", (2, 1, 0), (2, 1, 1), id="teacher"),
        pytest.param("DF1B" * 4 + "O1 F2BO2", (1, 1, 0), (2, 2, 2), id="two optimizers"),
    ],
)
def test_micro_batches_are_steps_from_the_second_cycle_on(
    cycle: str, micro_batch: tuple[int, int, int], last: tuple[int, int, int]
) -> None:
    program = Program().play(cycle * 4)
    first, *counts = program.counts()
    passes = first[1] - (last[1] - micro_batch[1])
    size = passes // micro_batch[1]
    assert counts == ([micro_batch] * (size - 1) + [last]) * 3
    assert program.turns.micro_batches == size


def test_fewer_micro_batches_at_the_end_of_an_epoch() -> None:
    epoch = ("DFB" * 4 + "O") * 3 + "DFB" * 2 + "O" + "X" + "De1" * 2 + "X"
    program = Program().play(epoch * 2)
    assert program.counts()[1:] == (
        ([(1, 1, 0)] * 3 + [(1, 1, 1)]) * 2
        + [(1, 1, 0), (1, 1, 1)]
        + ([(1, 1, 0)] * 3 + [(1, 1, 1)]) * 3
        + [(1, 1, 0), (1, 1, 1)]
    )
    assert program.kinds().count("e") == 4


def test_micro_batches_that_no_optimizer_step_follows_are_steps() -> None:
    program = Program().play(("DFB" * 4 + "O") * 2 + "DFB" * 2)
    assert program.counts()[-2:] == [(1, 1, 0), (1, 1, 0)]


def test_a_longer_accumulation_after_a_warmup_without() -> None:
    program = Program().play("DFBO" * 6 + ("DFB" * 2 + "O") * 2 + ("DFB" * 4 + "O") * 2)
    assert program.counts()[:7] == [(1, 1, 1)] * 6 + [(2, 2, 1)]
    assert program.counts()[7:] == [
        *[(1, 1, 0), (1, 1, 1)],
        *[*[(1, 1, 0)] * 3, (1, 1, 1)] * 2,
    ]


def test_losses_of_a_gan_are_not_micro_batches_at_the_end_of_an_epoch() -> None:
    # The exhausted loader is no batch, nor are the two batches of the validation in between.
    epoch = "DF1B F1B O1 F1B O2" * 3 + "X" + "De1" * 2 + "X"
    program = Program().play(epoch * 3)
    assert program.counts() == [(3, 3, 2)] * 9


def test_the_next_batch_fetched_before_the_step_makes_whole_steps_after_the_first() -> None:
    program = Program().play("FBD.O" * 5)
    assert program.counts()[1:-1] == [(1, 1, 1)] * 3
    assert len(program.counts()) == 5


def test_two_optimizers_without_a_loader_are_one_step_once_the_cycle_is_known() -> None:
    program = Program().play("F1B O1 F2B O2" * 6)
    assert program.counts()[2:] == [(2, 2, 2)] * 5


def test_stages_of_training_one_after_the_other_are_not_taken_for_a_cycle() -> None:
    program = Program().play("FBO1" * 40 + "FBO2" * 40 + "FBO1" * 40)
    counts = program.counts()
    assert counts[:80] == [(1, 1, 1)] * 80
    assert counts[-5:] == [(1, 1, 1)] * 5


@pytest.mark.parametrize("loop", ["DFB.", "FB.", ".F.B."])
def test_updates_by_hand_make_a_step_of_each_backward(loop: str) -> None:
    program = Program(optimizer_exists=False).play(loop * 5)
    assert program.counts() == [(1, 1, 0)] * 5


@pytest.mark.parametrize(
    "evaluation",
    ["De1" * 3, "Dg1" * 3, "e1" * 3, ".e1." * 3, "Dn1" * 3],
    ids=["loader", "gradients left on", "no loader", "own batches", "left in training mode"],
)
def test_evaluation_between_epochs_is_kept_apart(evaluation: str) -> None:
    epoch = "DFBO" * 4
    program = Program().play(epoch + evaluation + epoch + evaluation + epoch)
    kinds = program.kinds()
    assert program.counts() == [(1, 1, 1)] * 12
    assert kinds.replace("e", "") == "s" * 12
    assert kinds.count("e") == 6


@pytest.mark.parametrize("first", ["De1De1", "e1e1"])
def test_a_sanity_check_before_training_is_no_training(first: str) -> None:
    program = Program().play(first + "DFBO" * 3)
    assert program.kinds() == "eesss"


def test_evaluation_inside_a_loop_without_a_loader() -> None:
    program = Program().play("FBO" * 3 + "e1e1" + "FBO" * 3)
    assert program.kinds() == "ssseesss"
    assert program.counts() == [(1, 1, 1)] * 6


@pytest.mark.parametrize("loop", ["De1", "e1", "DF1", "F1", "De1e2"])
def test_inference_is_one_turn_for_each_root_forward(loop: str) -> None:
    program = Program(optimizer_exists=False).play(loop * 6)
    assert program.kinds() == "e" * 6


def test_closure_time_is_forward_and_backward_not_optimizer() -> None:
    program = Program()
    turns = program.turns
    for _ in range(2):
        turns.fetch_begins(program.wait(1))
        turns.fetch_ends(program.wait(2))
        turns.update_begins(program.wait(1), 1)
        for _ in range(3):
            program.event("F", 1)
            program.event("B", 1)
        turns.update_ends(program.wait(5), 1)
    turns.finish()
    first = dict(zip(PHASES, program.closed[0].phases_ns, strict=True))
    assert first["forward"] == 3 * 4 * MS
    assert first["backward"] == 3 * 3 * MS
    assert first["optimizer"] == (3 * (1 + 1) + 5) * MS
    assert program.counts() == [(3, 3, 1)] * 2


def test_phases_are_exclusive_and_sum_to_the_turn() -> None:
    program = Program().play("DFBO...DFBO")
    program.turns.finish()
    turn = program.closed[0]
    assert dict(zip(PHASES, (ns / MS for ns in turn.phases_ns), strict=True)) == {
        "data": 2,
        "transfer": 0,
        "forward": 4,
        "loss": 1,
        "backward": 3,
        "optimizer": 2,
        "other": 1 + 1 + 4,  # before forward, before the optimizer, after it
    }
    assert sum(turn.phases_ns) == turn.end_ns - turn.start_ns


def test_functional_operations_between_two_modules_are_forward() -> None:
    program = Program().play("DF1..F2BO D")
    assert program.closed[0].phases_ns[PHASES.index("forward")] == (4 + 3 + 4) * MS


def test_optimizer_steps_inside_backward_make_one_step_of_it() -> None:
    program = Program()
    turns = program.turns
    for _ in range(3):
        program.event("F", 1)
        turns.backward_begins(program.wait(1))
        for optimizer in range(5):
            program.event("O", optimizer)
        turns.backward_ends(program.wait(1))
    assert program.counts() == [(1, 1, 5)] * 3


def test_an_optimizer_step_left_by_an_exception_does_not_spoil_the_next() -> None:
    program = Program().play("DFBODFB")
    program.turns.update_begins(program.wait(1), 1)  # its end never comes
    program.play("DFBO" * 3)
    assert program.counts()[-1] == (1, 1, 1)


def test_page_faults_of_short_turns_are_spread_over_them():
    program = Program()
    program.turns.store_usage(100, 0, 2**20)
    program.play("DFBO DFBO DFBO")
    program.turns.store_usage(160, 3, 2**21)
    program.play("DFBO D")
    assert [turn.minor_faults for turn in program.closed] == [None, None, 30, None]
    assert [turn.major_faults for turn in program.closed] == [None, None, 1.5, None]
    assert [turn.peak_rss_bytes for turn in program.closed] == [2**20, 2**20, 2**21, 2**21]
