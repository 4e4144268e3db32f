"""Training programs that look at tensors of a forward pass in ways other than what it returns.

Each prints the types that it finds, and what NumPy makes of them.
"""
# long
# flatout run --set precision=bf16
# flatout run --set precision=safe

import collections
import dataclasses
import io
import queue
import types
import warnings

import torch
from torch import nn

warnings.simplefilter("ignore")
torch.manual_seed(0)
BATCH = torch.randn(16, 8)
KEPT = []
WAITING = queue.SimpleQueue()


class Squared(torch.autograd.Function):
    """An operator of the program's own, which works with NumPy."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 2)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(2 * x.detach().numpy() * grad.numpy())


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    hidden: torch.Tensor


class Slotted:
    __slots__ = ("hidden",)


class Net(nn.Module):
    """Two layers, and something done with what lies between them."""

    def __init__(self, act, layers=None):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.act, self.passes, self.cache = act, 0, None
        self.register_buffer("mean", None)

    def forward(self, *given, **options):
        hidden = self.first(BATCH)
        self.passes += 1
        other = self.act(self, hidden, *given, **options)
        output = self.second(torch.relu(hidden))
        return output if other is None else other(output)


def types_in(value, depth=0):
    if isinstance(value, torch.Tensor):
        return [f"{value.dtype} {value.detach().numpy().dtype}"]
    if isinstance(value, torch.distributions.Distribution):
        return types_in(vars(value), depth)
    if isinstance(value, dict):
        return [t for item in value.values() for t in types_in(item, depth + 1)]
    if isinstance(value, (list, tuple, set, collections.deque)):
        return [t for item in value for t in types_in(item, depth + 1)]
    if hasattr(value, "hidden"):
        return types_in(value.hidden, depth)
    return types_in(vars(value), depth) if hasattr(value, "__dict__") and depth < 3 else []


def first_tensor(value):
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, torch.distributions.Normal):
        return value.loc
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set, collections.deque)):
        return first_tensor(next(iter(value)))
    if hasattr(value, "hidden"):
        return value.hidden
    if callable(value):
        return value()
    if hasattr(value, "__next__"):
        return next(value)
    return first_tensor(vars(value))


def trained(name, net, *given, steps=4, look=lambda net: None, **options):
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        output = net(*given, **options)
        loss = first_tensor(output).square().mean()
        loss.backward()
        optimizer.step()
        seen += types_in(output) + types_in(look(net)) + [str(loss.dtype)]
    print(f"{name}: {sorted(set(seen))}")


def keep_on_module(net, hidden):
    net.cache = hidden


def keep_later(net, hidden):
    if net.passes > 3:
        net.cache = hidden.mean(0)


def keep_running_mean(net, hidden):
    mean = hidden.detach().mean(0)
    net.mean = mean if net.mean is None else 0.9 * net.mean + 0.1 * mean


def fill(net, hidden, out):
    out.append(hidden)


def yielded(output):
    yield output


def returns(make):
    return lambda net, hidden: make


def checked(net, hidden):
    assert hidden.dtype is torch.float32


def auxiliary(net, hidden):
    net.cache = [hidden.softmax(-1).mean()]


def slotted(output):
    made = Slotted()
    made.hidden = output
    return made


Pair = collections.namedtuple("Pair", "first second")
normal = torch.distributions.Normal
trained("attribute", Net(keep_on_module), look=lambda net: net.cache)
trained("attribute, later", Net(keep_later), steps=6, look=lambda net: net.cache)
trained("loss beside", Net(auxiliary), look=lambda net: net.cache)
averaging = Net(keep_running_mean)
trained("running mean", averaging, look=lambda net: net.mean)
saved = io.BytesIO()
torch.save(averaging.state_dict(), saved)
saved.seek(0)
print("saved:", {name: t.dtype for name, t in torch.load(saved).items()})
trained("global list", Net(lambda net, h: KEPT.append(h)), look=lambda net: KEPT)
trained("queue", Net(lambda net, h: WAITING.put(h)), look=lambda net: WAITING.get())
filled = []
trained("argument", Net(fill), filled, look=lambda net: filled)
trained("option", Net(fill), out=filled, look=lambda net: filled)
table = {}
trained("dict", Net(lambda net, h, into: into.update(a=h)), table, look=lambda net: table)
for name, make in {
    "namespace": lambda output: types.SimpleNamespace(a=output),
    "set": lambda output: {output},
    "deque": lambda output: collections.deque([output]),
    "distribution": lambda output: normal(output, 1.0),
    "named tuple": lambda output: Pair(output, output.detach()),
    "frozen": Frozen,
    "slots": slotted,
    "nested": lambda output: {"a": [(output, Pair(output, {output}))]},
    "closure": lambda output: lambda: output,
    "iterator": lambda output: iter([output]),
    "generator": yielded,
}.items():
    trained(name, Net(returns(make)))
trained("type asked for", Net(checked))
trained("own operator", Net(returns(Squared.apply)))
hooked = Net(lambda net, h: None)
handle = hooked.first.register_forward_hook(lambda m, i, output: KEPT.append(output.detach()))
trained("hook", hooked, look=lambda net: KEPT[-1])
late = Net(lambda net, h: None)
trained("before a hook", late)
late.second.register_forward_pre_hook(lambda m, given: KEPT.append(given[0]))
late.first.register_full_backward_hook(lambda m, i, o: KEPT.append(o[0]))
trained("after a hook", late, look=lambda net: KEPT[-2:])
