"""A small training for each knob, in which the knob has something to do.

As a program, it is a process that has imported torch and forks a child for each training that it is
told of, one line of JSON each: with the settings of a request, from a checkpoint, to another.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import distributed, nn
from torch.nn import functional as F
from torch.utils import data

from flatout.agent.session import Session
from flatout.intercept import handled_calls
from flatout.knobs.decode import images
from flatout.wire.request import Request

STEPS, BATCH = 20, 32


class Exercise:
    """Classifies random vectors by a small network: something for every knob of whole processes."""

    shape: tuple[int, ...] = (16,)
    samples, classes, learning_rate = 128, 10, 0.003
    steps = STEPS
    sets_to_none = True

    def network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, self.classes))

    def optimizers(self, net: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(net.parameters(), lr=self.learning_rate)]

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Features, and labels that depend on them."""
        x = torch.randn(self.samples, *self.shape)
        return x, (x.flatten(1) @ torch.randn(x[0].numel(), 10)).argmax(1)

    def dataset(self, folder: Path) -> data.Dataset[Any]:
        return data.TensorDataset(*self.tensors())

    def step(self, net: Any, optimizers: list[Any], x: torch.Tensor, y: torch.Tensor) -> float:
        """One step of training; returns the loss."""
        (optimizer,) = optimizers
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad(set_to_none=self.sets_to_none)
        loss.backward()
        self.before_update(net)
        optimizer.step()
        return loss.item()

    def before_update(self, net: nn.Module) -> None:
        pass

    def evaluate(self, net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
        net.eval()
        with torch.no_grad():
            loss = F.cross_entropy(net(x), y).item()
        net.train()
        return loss


class Attends(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(16, 48), nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(len(x), -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        dropout = 0.1 if self.training else 0.0
        found = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        made: torch.Tensor = self.head((x + found.transpose(1, 2).flatten(2)).mean(1))
        return made


class Attention(Exercise):
    shape = (12, 16)

    def network(self) -> nn.Module:
        return Attends(self.classes)


class Clipping(Exercise):
    def before_update(self, net: nn.Module) -> None:
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)


class Compile(Exercise):
    """Long enough for the search for outermost modules, after which they are compiled, to end."""

    samples, steps = 600 * BATCH, 600


class Replay(Exercise):
    """Likewise; with what keeps state in its buffers, and draws random numbers."""

    samples, steps = 600 * BATCH, 600

    def network(self) -> nn.Module:
        return nn.Sequential(super().network(), nn.BatchNorm1d(self.classes), nn.Dropout(0.1))


class Convolution(Exercise):
    """Begins as generators do: a transposed convolution of images of one pixel."""

    shape = (16, 1, 1)

    def network(self) -> nn.Module:
        grown = nn.ConvTranspose2d(16, 8, 4)
        return nn.Sequential(grown, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, self.classes))


class CrossEntropy(Exercise):
    classes, samples = 1 << 13, 64

    def network(self) -> nn.Module:
        return nn.Linear(16, self.classes)


class Pictures(data.Dataset[tuple[torch.Tensor, int]]):
    """Images in files, of one colour for each class."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.paths = [folder / f"{number}.jpg" for number in range(64)]
        for number, path in enumerate(self.paths):
            if not path.exists():
                grey = 20 * (number % 10)
                Image.new("RGB", (128, 128), (grey, 255 - grey, 90)).save(path)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[index]) as image:
            pixels = torch.frombuffer(bytearray(image.resize((2, 2)).tobytes()), dtype=torch.uint8)
        return pixels / 255, index % 10


class OfOneProcess(Exercise):
    """Averages gradients as in a job of several processes."""

    def network(self) -> nn.Module:
        if not distributed.is_initialized():
            stdout = os.dup(1)
            os.dup2(2, 1)  # torch 2.9's gloo prints that it is connected
            distributed.init_process_group(
                "gloo", store=distributed.HashStore(), rank=0, world_size=1
            )
            os.dup2(stdout, 1)
            os.close(stdout)
        return nn.parallel.DistributedDataParallel(super().network())


class Decode(Exercise):
    def network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, self.classes))

    def dataset(self, folder: Path) -> data.Dataset[Any]:
        images.SETTLED_S = 0.0  # the files have just been written
        return Pictures(folder)


class Elementwise(Exercise):
    def network(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(16, 2048), nn.GELU(approximate="tanh"), nn.Linear(2048, self.classes)
        )


class Embedding(Exercise):
    def network(self) -> nn.Module:
        return nn.Sequential(nn.EmbeddingBag(1000, 64, mode="sum"), nn.Linear(64, self.classes))

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        words = torch.randint(1000, (self.samples, 50))
        return words, words.sum(1) % 10


class Evaluation(Exercise):
    def evaluate(self, net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
        net.eval()
        loss = sum(F.cross_entropy(net(x), y).item() for _ in range(4)) / 4
        net.train()
        return loss


class FastPath(Exercise):
    shape = (12, 16)

    def network(self) -> nn.Module:
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        return nn.Sequential(layer, nn.Flatten(), nn.Linear(12 * 16, self.classes))


class Gradients(Exercise):
    """Two networks against each other: the loss of the first gives gradients to the second."""

    learning_rate = 0.01

    def network(self) -> nn.Module:
        makes = nn.Linear(16, 16)
        judges = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
        return nn.ModuleDict({"makes": makes, "judges": judges})

    def optimizers(self, net: Any) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.SGD(net[name].parameters(), lr=self.learning_rate)
            for name in ("makes", "judges")
        ]

    def step(self, net: Any, optimizers: list[Any], x: torch.Tensor, y: torch.Tensor) -> float:
        of_makes, of_judges = optimizers
        of_judges.zero_grad()
        judged = net["judges"](net["makes"](x).detach()) - net["judges"](x)
        loss = F.softplus(judged).mean()
        loss.backward()
        of_judges.step()
        of_makes.zero_grad()
        F.softplus(-net["judges"](net["makes"](x))).mean().backward()
        of_makes.step()
        return loss.item()

    def evaluate(self, net: Any, x: torch.Tensor, y: torch.Tensor) -> float:
        with torch.no_grad():
            judged = net["judges"](net["makes"](x)) - net["judges"](x)
        return F.softplus(judged).mean().item()


class MemoryFormat(Exercise):
    shape = (3, 8, 8)

    def network(self) -> nn.Module:
        first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        ends = (nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 16, self.classes))
        return nn.Sequential(first, nn.BatchNorm2d(16), nn.ReLU(), second, nn.ReLU(), *ends)


class Random(Exercise):
    def network(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(16, 128), nn.Tanh(), nn.Dropout(0.1), nn.Linear(128, self.classes)
        )


class Recurs(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(8, 16, batch_first=True), nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(self.gru(x)[0].mean(1))
        return made


class Recurrent(Exercise):
    shape, learning_rate = (6, 8), 0.01

    def network(self) -> nn.Module:
        return Recurs(self.classes)


class ZeroGrad(Exercise):
    sets_to_none = False


EXERCISES: dict[str, Exercise] = {
    "allocator": Exercise(),
    "attention": Attention(),
    "clipping": Clipping(),
    "compile": Compile(),
    "code_pages": Exercise(),
    "convolution": Convolution(),
    "cross_entropy": CrossEntropy(),
    "ddp": OfOneProcess(),
    "decode": Decode(),
    "denormals": Exercise(),
    "elementwise": Elementwise(),
    "embedding": Embedding(),
    "evaluation": Evaluation(),
    "fastpath": FastPath(),
    "gc": Exercise(),
    "gradients": Gradients(),
    "loader": Exercise(),
    "memory_format": MemoryFormat(),
    "mkl": Exercise(),
    "optimizer": Exercise(),
    "precision": Exercise(),
    "random": Random(),
    "ranks": Exercise(),
    "recurrent": Recurrent(),
    "replay": Replay(),
    "threads": Exercise(),
    "zero_grad": ZeroGrad(),
}
"""By knob: all those that there are for the CPU."""


def train(exercise: Exercise, resumed: str | None, pictures: Path) -> dict[str, Any]:
    """Train, from a checkpoint or from the start; returns what a checkpoint has, and the losses."""
    torch.manual_seed(0)
    dataset, net = exercise.dataset(pictures), exercise.network()
    optimizers = exercise.optimizers(net)
    if resumed is not None:
        saved = torch.load(resumed)
        net.load_state_dict(saved["net"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        torch.set_rng_state(saved["rng"])
    losses: list[float] = []
    while len(losses) < exercise.steps:
        for x, y in data.DataLoader(dataset, batch_size=BATCH, shuffle=True):
            losses.append(exercise.step(net, optimizers, x, y))
    x, y = next(iter(data.DataLoader(dataset, batch_size=exercise.samples)))
    losses.append(exercise.evaluate(net, x, y))
    return {
        "net": net.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "rng": torch.get_rng_state(),
        "losses": losses,
    }


def run(job: dict[str, Any]) -> None:
    """One training under a request, whose record and checkpoint go into ``job["folder"]``."""
    folder = Path(job["folder"])
    if "threads" in job["settings"]:
        os.environ.pop("OMP_NUM_THREADS", None)
    session = Session(Request(settings=job["settings"]), folder)
    session.start()
    made = train(EXERCISES[job["knob"]], job["resumed"], folder.parent / "pictures")
    session.finish("exit")
    made["engaged"] = handled_calls.counts[job["knob"]]
    torch.save(made, folder / "saved.pt")


def outcome(job: dict[str, Any]) -> str:
    """Run a job; returns what a user would see of a failure, besides what torch says of itself."""
    said, failure = io.StringIO(), ""
    with contextlib.redirect_stderr(said):
        try:
            run(job)
        except BaseException:  # noqa: BLE001 - it is the outcome
            failure = traceback.format_exc()
    return failure + "".join(line for line in said.getvalue().splitlines() if "flatout:" in line)


def forked(job: dict[str, Any]) -> str:
    """``outcome`` of a job in a child."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            with os.fdopen(writing, "w") as file:
                file.write(outcome(job))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    return said or (f"it ended with {status}" if status else "")


def main() -> None:
    torch.set_num_threads(1)
    importlib.import_module(
        "torch._dynamo"
    )  # as an optimizer's first step does; no child loses time
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(outcome(job) if job["starts_anew"] else forked(job)), flush=True)


if __name__ == "__main__":
    main()
