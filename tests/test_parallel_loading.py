"""Loaders of programs on several ranks: each sample is loaded once, and the program sees no more of
that than that it is faster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flatout.parallel import loading
from flatout.wire.request import Ranks, Request
from tests import side_by_side
from tests.test_parallel_programs import BEGIN

DATA = """
import collections
import random
import numpy
from torch.utils.data import Dataset
from flatout.parallel import loading
loading.WORTH_S = -1.0
fetched = 0
fetch_whole = loading._fetch_whole
def counted(fetcher, index):
    global fetched
    fetched += len(index)
    return fetch_whole(fetcher, index)
loading._fetch_whole = counted
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
def step(x):
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    show(loss.detach(), torch.rand(()), random.random(), numpy.random.rand())
class Data(Dataset):
    def __init__(self):
        self.x = torch.randn(60, 4)
    def __len__(self):
        return len(self.x)
    def __getitem__(self, index):
        return {item}
def begun(index):
    with open(f"samples-{torch.utils.data.get_worker_info().id}", "a") as file:
        file.write(f"{index}\\n")
    return index
"""


def assert_as_alone(found: list[list[float]], expected: list[list[float]]) -> None:
    """Compare what a rank has shown with what the program shows alone."""
    for line, values in zip(found, expected, strict=True):
        assert line == pytest.approx(values, rel=1e-9)


ROWS = {
    "a tensor": ("self.x[index] * 2", "x"),
    "numbers, texts and a dict": (
        "{'x': self.x[index], 'y': (index, 0.5, f'sample {index}'), 'z': self.x[index, 0].item()}",
        "x['x'] + sum(len(n) for n in x['y'][2]) + x['y'][0][:, None] * x['y'][1][:, None] "
        "+ x['z'][:, None]",
    ),
    "a named tuple": ("Pair(self.x[index], index)", "x.a + x.b[:, None]"),
    "random numbers": (
        "(self.x[index] + torch.rand(3).sum(), random.random(), torch.randn(2), torch.rand(()))",
        "x[0] + x[1][:, None] + x[2].sum(1, keepdim=True) + x[3][:, None]",
    ),
}


@pytest.mark.parametrize("what", ROWS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_fetch_rows_of_a_batch_each(what: str, ranks: int, tmp_path: Path) -> None:
    item, inputs = ROWS[what]
    program = (
        BEGIN
        + "import collections\nPair = collections.namedtuple('Pair', 'a b')\n"
        + DATA.replace("{item}", item)
        + f"""
loader = DataLoader(Data(), 7, shuffle=True)
for epoch in range(3):
    for x in loader:
        step({inputs})
parallel = agent._session._parallel
if parallel:
    (dataset,) = parallel._loading._datasets.values()
    sys.stderr.write(json.dumps([dataset.is_shared, dataset.failures, fetched]))
"""
    )
    (alone,) = side_by_side.run(program, 1, tmp_path)
    outcomes = side_by_side.run(program, ranks, tmp_path)
    expected, _, _ = json.loads(alone.stdout)
    assert len(expected) == 27
    total = 0
    for outcome in outcomes:
        assert outcome.status == 0, outcome.stderr
        found, shared, _ = json.loads(outcome.stdout)
        assert shared == 27
        assert_as_alone(found, expected)
        is_shared, failures, fetched = json.loads(outcome.stderr.splitlines()[-1])
        assert (is_shared, failures) == (True, 0)
        total += fetched
    # The first batch comes before the ranks have met, and others are timed; then each rank fetches
    # a sample to see which random numbers it draws.
    assert total == 180 - (1 + loading.TIMED_BATCHES) * 7 + ranks


WHOLE = {
    "samples that draw now more and now less": (
        "self.x[index] + torch.rand(1 + index % 2).sum()",
        None,
    ),
    "samples of several sizes": ("self.x[index, : 2 + index % 2]", "equal size"),
    "a sample that cannot be had": ("self.x[index + 25]", "IndexError"),
}


@pytest.mark.parametrize("what", WHOLE)
def test_what_ranks_cannot_share_out_is_as_alone(what: str, tmp_path: Path) -> None:
    item, error = WHOLE[what]
    program = (
        BEGIN
        + DATA.replace("{item}", item)
        + """
data = Data()
for x in DataLoader(data, 7, shuffle=True):
    step(x)
try:
    for x in DataLoader(data, 7):
        step(x)
except (IndexError, RuntimeError) as error:
    sys.stderr.write(f"{type(error).__name__} {error}")
"""
    )
    if error is not None:  # the first batches are fetched
        program = program.replace(
            "self.x[index", "self.x[index] if index < 35 else self.x[index", 1
        )
        program = program.replace("DataLoader(data, 7, shuffle=True)", "range(0)")
    (alone,) = side_by_side.run(program, 1, tmp_path)
    if error is not None:
        assert error in alone.stderr
    expected, _, _ = json.loads(alone.stdout)
    for outcome in side_by_side.run(program, 2, tmp_path):
        assert outcome.status == 0, outcome.stderr
        found, _, _ = json.loads(outcome.stdout)
        assert outcome.stderr.splitlines() == alone.stderr.splitlines()
        assert_as_alone(found, expected)


WORKERS = """
class Data(Data):
    def __getitem__(self, index):
        begun(index)
        {draws}
        return self.x[index] + {drawn}, str(index)
loader = DataLoader(Data(), 7, shuffle=True, num_workers=2, {options})
for epoch in range(2):
    for x, names in loader:
        step(x + sum(map(len, names)))
"""

DRAWS = {
    "nothing": ("pass", "0"),
    "from torch and random": ("pass", "torch.rand(()) + random.random()"),
}


@pytest.mark.parametrize("what", DRAWS)
@pytest.mark.parametrize("options", ["", "persistent_workers=True, prefetch_factor=3"])
def test_workers_of_rank_0_load_for_all(what: str, options: str, tmp_path: Path) -> None:
    draws, drawn = DRAWS[what]
    workers = WORKERS.format(draws=draws, drawn=drawn, options=options)
    program = BEGIN + DATA.replace("{item}", "None") + workers
    (alone,) = side_by_side.run(program, 1, tmp_path)
    outcomes = side_by_side.run(program, 2, tmp_path)
    expected, _, _ = json.loads(alone.stdout)
    for outcome in outcomes:
        assert outcome.status == 0, outcome.stderr
        found, shared, _ = json.loads(outcome.stdout)
        assert shared == 18
        assert outcome.stderr.splitlines() == alone.stderr.splitlines()
        assert_as_alone(found, expected)
    files = [sorted(folder.glob("samples-*")) for folder in sorted(tmp_path.glob("*-rank-*"))]
    counts = [sum(len(file.read_text().split()) for file in of_rank) for of_rank in files]
    assert counts == [120, 120, 0]


def test_data_that_only_workers_know_are_the_same_on_all_ranks(tmp_path: Path) -> None:
    """Without this, the ranks would load different data, and part."""
    workers = WORKERS.format(draws="pass", drawn="numpy.random.default_rng().random()", options="")
    program = BEGIN + DATA.replace("{item}", "None") + workers
    first, other = side_by_side.run(program, 2, tmp_path)
    assert (first.status, other.status) == (0, 0), first.stderr + other.stderr
    assert json.loads(first.stdout)[:2] == json.loads(other.stdout)[:2]


@pytest.mark.parametrize(
    "error", ["ValueError('sample 33')", "KeyError('33')", "Odd(1, 2)", "StopIteration"]
)
def test_an_error_in_a_worker_is_raised_on_all_ranks(error: str, tmp_path: Path) -> None:
    workers = WORKERS.format(draws=f"if index == 33: raise {error}", drawn="0", options="")
    before, _, loop = workers.replace("shuffle=True, num", "num").partition("for epoch")
    caught = "".join(f"    {line}\n" for line in f"for epoch{loop}".splitlines())
    program = (
        BEGIN
        + DATA.replace("{item}", "None")
        + "class Odd(Exception):\n"
        + "    def __init__(self, a, b): super().__init__(f'{a}{b}')\n"
        + before
        + f"try:\n{caught}except Exception as raised:\n"
        + "    sys.stderr.write(type(raised).__name__)\n"
        + "    show(33)\nstep(torch.ones(7, 4))\n"
    )
    (alone,) = side_by_side.run(program, 1, tmp_path)
    expected, _, _ = json.loads(alone.stdout)
    for outcome in side_by_side.run(program, 2, tmp_path):
        assert outcome.status == alone.status == 0, outcome.stderr
        # Workers that are still there at the end make torch print more, now and then.
        errors = (found.stderr.partition("Exception ignored")[0] for found in (outcome, alone))
        assert len(set(errors)) == 1, outcome.stderr
        found, _, _ = json.loads(outcome.stdout)
        assert_as_alone(found, expected)


def test_what_a_batch_holds_twice_is_one_tensor_on_all_ranks(tmp_path: Path) -> None:
    workers = WORKERS.format(draws="pass", drawn="0", options="collate_fn=twice")
    program = (
        BEGIN
        + DATA.replace("{item}", "None")
        + "def twice(samples):\n"
        + "    x = torch.stack([sample[0] for sample in samples]).unsqueeze(1)\n"
        + "    return {'x': x, 'again': x, 'y': x.view(-1, 1, 2, 2).permute(0, 2, 3, 1)}\n"
        + workers.partition("for epoch")[0]
        + """
for batch in loader:
    batch["x"] += 1
    step(batch["again"][:, 0])
    show(*batch["y"].stride(), batch["y"].sum())
"""
    )
    (alone,) = side_by_side.run(program, 1, tmp_path)
    expected, _, _ = json.loads(alone.stdout)
    for outcome in side_by_side.run(program, 2, tmp_path):
        assert outcome.status == 0, outcome.stderr
        found, _, _ = json.loads(outcome.stdout)
        assert_as_alone(found, expected)


def test_a_sampler_may_read_another_loader(tmp_path: Path) -> None:
    workers = WORKERS.format(draws="pass", drawn="0", options="sampler=Longest()")
    program = (
        BEGIN
        + DATA.replace("{item}", "None")
        + "class Longest:\n"
        + "    def __len__(self): return 60\n"
        + "    def __iter__(self):\n"
        + "        sizes = torch.cat([x[:, 0] for x in DataLoader(Sizes(), 5)])\n"
        + "        return iter(sizes.argsort().tolist())\n"
        + "class Sizes(Dataset):\n"
        + "    def __len__(self): return 60\n"
        + "    def __getitem__(self, index): return torch.full((1,), float(index * 7 % 60))\n"
        + workers.replace("shuffle=True, ", "")
    )
    (alone,) = side_by_side.run(program, 1, tmp_path)
    expected, _, _ = json.loads(alone.stdout)
    for outcome in side_by_side.run(program, 2, tmp_path):
        assert outcome.status == 0, outcome.stderr
        found, _, _ = json.loads(outcome.stdout)
        assert_as_alone(found, expected)


def test_a_loader_with_workers_in_another_thread_is_refused(tmp_path: Path) -> None:
    workers = WORKERS.format(draws="pass", drawn="0", options="")
    program = (
        BEGIN
        + DATA.replace("{item}", "None")
        + workers.partition("for epoch")[0]
        + """
import threading
iterator = iter(loader)
step(next(iterator)[0])
thread = threading.Thread(target=next, args=(iterator,))
thread.start()
thread.join()
"""
    )
    for outcome in side_by_side.run(program, 2, tmp_path):
        assert outcome.status == 1
        assert "in another thread" in outcome.stderr


def test_rank_0_goes_on_with_its_workers_alone(tmp_path: Path) -> None:
    workers = WORKERS.format(draws="pass", drawn="0", options="")
    program = (
        BEGIN
        + DATA.replace("{item}", "None")
        + workers
        + """
        if epoch == 1 and agent._session._parallel:
            agent._session._parallel.leave("it is time")
"""
    )
    (alone,) = side_by_side.run(program, 1, tmp_path)
    request = Request(seed=0, ranks=Ranks(2, 0, 0, goes_alone=True))
    first, other = side_by_side.run(program, 2, tmp_path, request=request)
    assert (first.status, other.status) == (0, 0), first.stderr + other.stderr
    found, shared, _ = json.loads(first.stdout)
    assert shared == 10
    assert_as_alone(found, json.loads(alone.stdout)[0])
