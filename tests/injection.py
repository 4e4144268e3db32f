"""A process that runs one small program again and again, each time with another failure of ours.

It has imported all that is needed and forks a child for every run. In the child a function of ours
raises as it is entered for the k-th time, wherever that is. What comes out is one line of JSON for
each run: what the program printed, and what became of its weights.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils import data

from flatout import knobs
from flatout.agent import guard, inputs, inspection, session
from flatout.kernels import extensions
from flatout.knobs import compile as compiling
from flatout.knobs.cross_entropy import cpu as cross_entropy
from flatout.knobs.elementwise import cpu as elementwise
from flatout.knobs.embedding import cpu as embedding
from flatout.knobs.random import cpu as random
from flatout.wire.request import GuardRequest, Request

PACKAGE = Path(knobs.__file__).parents[1]
STANDS_ON = {"loader": ("intercept/purity.py", "intercept/harmless.py")}
"""Files of ours that only these knobs reach."""

FOLDERS = tuple(f"{PACKAGE / name}{os.sep}" for name in ("agent", "intercept", "knobs"))
STEPS = 5
SECONDS = 60
"""For one run."""

NOTHING = {"fastpath": "off"}
"""It does nothing to the program, and is of a class that the guard watches over."""

Place = tuple[str, str, int]
"""Of a function: file, name, line."""


class Pictures(data.Dataset[tuple[torch.Tensor, int]]):
    """Images in files."""

    def __init__(self, folder: str) -> None:
        self.paths = [f"{folder}/{number}.jpg" for number in range(4)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[index]) as image:
            pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        return pixels.view(8, 8, 3).permute(2, 0, 1) / 255.0, index


class Net(nn.Module):
    """Something of everything; it counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.look_up, self.norm = nn.EmbeddingBag(10, 8), nn.BatchNorm2d(4)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.ConvTranspose2d(4, 2, 4, stride=2, padding=1)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.2, batch_first=True)
        self.gru, self.head = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 4)
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        images = F.gelu(self.norm(self.first(images)), approximate="tanh")
        rows = torch.tanh(self.last(F.max_pool2d(images, 2))).flatten(1).view(len(images), 16, 8)
        rows = rows + self.look_up(torch.arange(10).view(2, 5)).mean(0)
        rows = self.gru(self.layer(rows))[0]
        made: torch.Tensor = self.head(F.dropout(rows, 0.2, self.training).mean(1))
        return made


def program(folder: str, say: Callable[..., None]) -> list[torch.Tensor]:
    """Trains a net and a pair of networks, and evaluates; gives the weights."""
    torch.manual_seed(0)
    net, made, judge = Net(), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    of_made = torch.optim.SGD(made.parameters(), lr=0.01, momentum=0.9)
    of_judge = torch.optim.SGD(judge.parameters(), lr=0.01)
    tensors = data.TensorDataset(torch.randn(4, 4))
    stepped = []
    optimizer.register_step_post_hook(lambda *_: stepped.append(len(stepped)))
    for step in range(STEPS):
        for images, classes in data.DataLoader(Pictures(folder), batch_size=4):
            loss = F.cross_entropy(net(images), classes)
            optimizer.zero_grad(set_to_none=False)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
            say("loss", loss.item())
        for (noise,) in data.DataLoader(tensors, batch_size=2, shuffle=True):
            of_judge.zero_grad()
            F.softplus(judge(made(noise).detach()) - judge(noise)).mean().backward()
            of_judge.step()
            of_made.zero_grad()
            F.softplus(-judge(made(noise))).mean().backward()
            of_made.step()
        if step % 2:
            net.eval()
            say("eval", F.cross_entropy(net(images), classes).item())
            net.train()
    buffers: Any = net.norm.num_batches_tracked
    say("counts", [net.calls, len(stepped), int(buffers)])
    return [p.detach() for module in (net, made, judge) for p in module.parameters()]


def start(settings: Mapping[str, str], folder: str) -> None:
    """As the agent does, with a guard whose look at the losses is over within the run."""
    request = Request(settings=settings, guard=GuardRequest(steps=4, losses=()))
    session.Session(request, Path(folder)).start()


def place_of(code: CodeType) -> Place | None:
    file = code.co_filename
    if not file.startswith(FOLDERS) or code.co_name.startswith("<"):
        return None
    return file.removeprefix(f"{PACKAGE}{os.sep}"), code.co_name, code.co_firstlineno


def counting(counts: Counter[Place]) -> Callable[[FrameType, str, object], None]:
    def profile(frame: FrameType, event: str, argument: object) -> None:
        place = place_of(frame.f_code) if event == "call" else None
        if place is not None:
            counts[place] += 1

    return profile


RAISING = """
def raising(place_of, wanted, entries):
    left = entries
    def profile(frame, event, argument):
        nonlocal left
        if event == "call" and place_of(frame.f_code) == wanted:
            left -= 1
            if not left:
                raise RuntimeError("injected")
    return profile
"""
"""To be of our package, as a failure of ours is."""


def raising(wanted: Place, entries: int) -> Callable[[FrameType, str, object], None]:
    names: dict[str, Any] = {}
    exec(compile(RAISING, str(PACKAGE / "agent" / "injected.py"), "exec"), names)
    made: Callable[[FrameType, str, object], None]
    made = names["raising"](place_of, wanted, entries)
    return made


def run(
    settings: Mapping[str, str] | None, wanted: Place | None, entries: int, pictures: str
) -> dict[str, Any]:
    """One run, in a child."""
    folder = tempfile.mkdtemp()
    known = set(sys.modules)
    said: list[tuple[Any, ...]] = []
    counts: Counter[Place] = Counter()
    stderr = io.StringIO()
    error = None
    weights: list[torch.Tensor] = []
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stderr):
        if settings is not None:
            start(settings, folder)
        sys.setprofile(counting(counts) if wanted is None else raising(wanted, entries))
        try:
            weights = program(pictures, lambda *words: said.append(words))
            atexit._run_exitfuncs()
        except BaseException:  # noqa: BLE001 - it is the outcome
            error = traceback.format_exc()
        sys.setprofile(None)
    shutil.rmtree(folder, ignore_errors=True)
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(bytes(weight.contiguous().view(torch.uint8).flatten().tolist()))
    return {
        "settings": settings,
        "place": wanted,
        "entries": entries,
        "said": said,
        "weights": digest.hexdigest(),
        "finite": all(bool(weight.isfinite().all()) for weight in weights),
        "stderr": stderr.getvalue(),
        "error": error,
        "counts": sorted(counts.items()),
        "modules": sorted(sys.modules.keys() - known),
    }


def forked(*arguments: Any) -> tuple[int, int]:
    """A child for a run: its process, and where it writes what came of it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    signal.alarm(SECONDS)
    try:
        with os.fdopen(writing, "w") as file:
            json.dump(run(*arguments), file)
    finally:
        os._exit(0)


def outcomes(jobs: list[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Of all runs, two at a time."""
    going: list[tuple[int, int, tuple[Any, ...]]] = []
    left = list(reversed(jobs))
    while left or going:
        while left and len(going) < 2:
            job = left.pop()
            going.append((*forked(*job), job))
        child, reading, job = going.pop(0)
        with os.fdopen(reading) as file:
            text = file.read()
        _, status = os.waitpid(child, 0)
        if text and not status:
            yield json.loads(text)
        else:
            yield {"settings": job[0], "place": job[1], "entries": job[2], "status": status}


def main(entries_to_fail: str, *words: str) -> None:
    """Print the outcomes for each of some ``KNOB=SETTING``; for ``=``, those of the agent alone.

    Args:
        entries_to_fail: at which of its entries a function fails, each in a run of its own: "1,2".
        words: the settings.
    """
    failing = [int(number) for number in entries_to_fail.split(",")]
    torch.set_num_threads(1)
    for module, name in (
        (random, "SERIAL_BELOW"),
        (elementwise, "FEWEST"),
        (embedding, "FEWEST"),
        (cross_entropy, "FEWEST_LOGITS"),
    ):
        setattr(module, name, 1)
    for extension in ("replay", "steps"):
        extensions.load(extension)  # it would take longer than a child may
    compiling.OPTIONS = {"default": {"backend": "eager"}}
    assert inputs, inspection
    assert guard
    pictures = tempfile.mkdtemp()
    for number in range(4):
        Image.new("RGB", (8, 8), (60 * number, 90, 200 - 40 * number)).save(
            f"{pictures}/{number}.jpg"
        )
    for path in Path(pictures).iterdir():
        os.utime(path, (1e9, 1e9))
    for settings in ({}, None):
        (bare,) = outcomes([(settings, None, 0, pictures)])
        for module in bare.pop("modules"):
            with contextlib.suppress(ImportError):  # no child loses time on it
                importlib.import_module(module)
    print(json.dumps(bare))
    for word in words:
        name, _, setting = word.partition("=")
        settings = {name: setting} if name else NOTHING
        folders = (f"knobs/{name}", *STANDS_ON.get(name, ())) if name else ("agent/", "intercept/")
        (traced,) = outcomes([(settings, None, 0, pictures)])
        print(json.dumps(traced))
        jobs = [
            (settings, tuple(place), entries, pictures)
            for place, count in traced.get("counts", ())
            for entries in failing
            if place[0].startswith(folders) and entries <= count
        ]
        for outcome in outcomes(jobs):
            outcome.pop("counts", None)
            outcome.pop("modules", None)
            print(json.dumps(outcome), flush=True)
    shutil.rmtree(pictures)


if __name__ == "__main__":
    main(*sys.argv[1:])
