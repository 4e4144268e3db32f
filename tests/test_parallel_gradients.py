"""Losses and gradients of one process and of several ranks, in float64."""

from __future__ import annotations


import pytest
import torch

from tests import side_by_side
from tests.ranks import gradients

PROGRAM = """
from tests.ranks import gradients
torch.save({name: gradients.run(name) for name in gradients.CASES}, "results.pt")
print("done")
"""

TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[gradients.Results]]:
    folder = tmp_path_factory.mktemp("gradients")
    found = {}
    for ranks in (1, 2, 3):
        outcomes = side_by_side.run(PROGRAM, ranks, folder)
        for outcome in outcomes:
            assert (outcome.status, outcome.stdout) == (0, "done\n"), outcome.stderr
        found[ranks] = [
            torch.load(folder / f"{ranks}-rank-{rank}" / "results.pt") for rank in range(ranks)
        ]
    return found


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", gradients.CASES)
def test_gradients_are_those_of_one_process(
    name: str, ranks: int, results: dict[int, list[dict[str, gradients.Results]]]
) -> None:
    alone = results[1][0][name]
    for rank, of_rank in enumerate(results[ranks]):
        found = of_rank[name]
        assert found.keys() == alone.keys(), rank
        for key, expected in alone.items():
            error = (found[key].double() - expected.double()).abs().max()
            scale = expected.double().abs().max()
            assert error <= TOLERANCE * scale, (rank, key)
