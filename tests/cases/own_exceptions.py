"""Exceptions that come out of a forward pass: what they are, where they began, how often it ran."""
# flatout run
# flatout run --set precision=bf16
# flatout run --set precision=safe --set memory_format=channels_last
# flatout run --set evaluation=no_grad --set attention=fast --set optimizer=fused

import signal
import traceback

import torch
from torch import nn


class SkipError(Exception):
    """The batch is not to be learned from."""


class OutOfTimeError(Exception):
    """The deadline has passed."""


def ring(number, frame):
    raise OutOfTimeError


def stopped():
    yield
    raise SkipError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        self.calls = 0

    def forward(self, x, what=None):
        self.calls += 1
        x = self.head(self.norm(self.convolution(x)).mean((2, 3)))
        if what == "alarm":
            signal.raise_signal(signal.SIGALRM)
        elif what == "generator":
            for _ in stopped():
                pass
        elif what == "context":
            try:
                {}["missing"]
            except KeyError:
                raise SkipError from None
        elif what == "shapes":
            x @ torch.ones(3, 3)
        elif what == "lookup":
            [].pop()
        elif what is not None:
            raise what
        return x


def described(error):
    frames = traceback.extract_tb(error.__traceback__)
    places = [(frame.filename.rpartition("/")[2], frame.name) for frame in frames]
    context = type(error.__context__).__name__
    return type(error).__name__, str(error), context, error.__cause__, places


signal.signal(signal.SIGALRM, ring)
torch.manual_seed(0)
net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
known = ValueError("known")
kinds = [
    *(SkipError("this one"), known, KeyboardInterrupt(), SystemExit(3), GeneratorExit()),
    *(StopIteration(1), "alarm", "generator", "context", "lookup", StopAsyncIteration(), "shapes"),
]
for round_ in range(3):
    for kind in kinds:
        net(torch.randn(8, 3, 6, 6)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        try:
            raise LookupError("handled while it runs")
        except LookupError:
            try:
                net(torch.randn(8, 3, 6, 6), what=kind)
            except BaseException as error:  # noqa: BLE001
                print(round_, *described(error), error is kind)
                error.__traceback__ = error.__context__ = None
print(net.calls, net.norm.num_batches_tracked.item())
