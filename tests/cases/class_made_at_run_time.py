"""What a program drops is freed: classes made at run time with what their methods hold, modules,
optimizers, loaders and datasets, each as early as without flatout."""
# long
# flatout run
# flatout run --set precision=bf16 --set memory_format=channels_last
# flatout run --set gradients=on_demand --set random=fast --set optimizer=onepass
# bare in a process of its own: when objects are collected depends on how many there are

import gc
import weakref
from typing import Any

import torch
from torch import nn

REFERENCES: dict[str, list[weakref.ref[Any]]] = {}


def noted(name: str, value: Any) -> Any:
    REFERENCES.setdefault(name, []).append(weakref.ref(value))
    return value


class Spoken:
    """Says when it goes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __del__(self) -> None:
        print(self.name, "is gone")


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), float(index))


def of_a_class_of_its_own() -> nn.Module:
    data = noted("data of a closure", torch.zeros(100))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.dropout = nn.Dropout(0.1)

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return super().__call__(x) + data[0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.dropout(torch.tanh(self.layer(x)))

    noted("class", Net)
    return Net()


def convolution() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 1), nn.Flatten())


MAKERS = {
    "own": of_a_class_of_its_own,
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "convolution": convolution,
}


def trained(name: str) -> None:
    """Train a net whose class may live in this call alone."""
    net = noted(name, MAKERS[name]())
    if name in ("own", "convolution"):  # the others lie in cycles of torch's making
        net.spoken = Spoken(name)
    noted(f"class of {name}", type(net))
    optimizer = noted("optimizer", torch.optim.Adam(net.parameters(), 0.01))
    dataset = noted("dataset", Data())
    loader = noted("loader", torch.utils.data.DataLoader(dataset, batch_size=2))
    for _ in range(3):
        for rows in loader:
            optimizer.zero_grad()
            noted("output", net(rows)).square().sum().backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()


def failed() -> None:
    """A net whose step raises, and one whose pass does."""
    net = noted("failed", nn.Linear(4, 4))

    def closure() -> torch.Tensor:
        raise KeyError

    optimizer = noted("failed optimizer", torch.optim.SGD(net.parameters(), 0.01))
    for call in (lambda: optimizer.step(closure), lambda: net(torch.ones(2, 5))):
        try:
            call()
        except (KeyError, RuntimeError) as error:
            print(type(error).__name__)


gc.disable()  # what goes before the end goes by itself
for name in MAKERS:
    for _ in range(3):
        trained(name)
        print("after", name)
    failed()
gc.collect()
for name, references in REFERENCES.items():
    alive = sum(reference() is not None for reference in references)
    print(name, "alive:", alive, "of", len(references))
