"""Losses and gradients of one process and of several ranks, in float64."""

from __future__ import annotations

import pytest
import torch

from tests import side_by_side
from tests.ranks import gradients

PROGRAM = """
from flatout import agent
from flatout.parallel import joining, overlapping
from tests.ranks import gradients

if IS_OVER_GLOO:
    joining.share_memory = lambda *given: None
    begin = overlapping.Overlap._begin
    def begin_noted(overlap):
        begun.append(overlap)
        begin(overlap)
    overlapping.Overlap._begin = begin_noted
begun = []
gradients.give_rules()
found = {}
shared = agent._session._parallel._sharing.shared if agent._session._parallel else {}
for name in gradients.CASES:
    before = sum(shared.values())
    found[name] = gradients.run(name)
    found[name]["shared"] = torch.tensor(sum(shared.values()) - before)
    found[name]["begun"] = torch.tensor(len(begun))
    begun.clear()
torch.save(found, "results.pt")
print("done")
"""

WHOLE = {
    "hook_on_a_parameter",
    "optimizer_in_backward",
    "backward_inside_of_forward",
    "refused",
}
"""Cases in which no call can be shared out."""

TOLERANCE = 1e-10


@pytest.fixture(scope="module", params=["memory", "gloo"])
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[gradients.Results]]:
    """What the cases give alone, and on ranks that share memory, or average gradients over gloo
    while they compute others."""
    program = PROGRAM.replace("IS_OVER_GLOO", str(request.param == "gloo"))
    folder = tmp_path_factory.mktemp("gradients")
    found = {}
    for ranks in (1, 2, 3):
        outcomes = side_by_side.run(program, ranks, folder)
        for outcome in outcomes:
            lines = [line for line in outcome.stdout.splitlines() if "[Gloo]" not in line]
            assert (outcome.status, lines) == (0, ["done"]), outcome.stderr
        found[ranks] = [
            torch.load(folder / f"{ranks}-rank-{rank}" / "results.pt") for rank in range(ranks)
        ]
    for of_rank in found[2]:
        has_begun = sum(int(case["begun"]) for case in of_rank.values())
        assert bool(has_begun) == (request.param == "gloo")
    return found


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", gradients.CASES)
def test_gradients_are_those_of_one_process(
    name: str, ranks: int, results: dict[int, list[dict[str, gradients.Results]]]
) -> None:
    alone = results[1][0][name]
    for rank, of_rank in enumerate(results[ranks]):
        found = of_rank[name]
        assert bool(found["shared"]) == (name not in WHOLE)
        assert found.keys() == alone.keys(), rank
        for key, expected in alone.items():
            if key in ("shared", "begun"):
                continue
            error = (found[key].double() - expected.double()).abs().max()
            scale = expected.double().abs().max()
            assert error <= TOLERANCE * scale, (rank, key)
