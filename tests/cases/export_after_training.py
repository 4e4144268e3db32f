"""A model that is trained, and then handed over in each form that torch has for that."""
# long
# flatout run --set precision=bf16
# flatout run --set precision=safe

import copy
import warnings

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

warnings.simplefilter("ignore")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Linear(64, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)).flatten(1))


torch.manual_seed(0)
net, x = Net(), torch.randn(8, 1, 6, 6)
optimizer = torch.optim.SGD(net.parameters(), 0.01)
for _ in range(4):
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()
net.eval()
exact = nn.functional.linear(
    torch.relu(nn.functional.conv2d(x, net.first.weight, net.first.bias)).flatten(1),
    net.second.weight,
    net.second.bias,
)
forms = {
    "traced": lambda: torch.jit.trace(net, x),
    "scripted": lambda: torch.jit.script(net),
    "exported": lambda: torch.export.export(net, (x,)).module(),
    "decomposed": lambda: torch.export.export(net, (x,)).run_decompositions().module(),
    "proxies": lambda: make_fx(net)(x),
    "symbols": lambda: fx.symbolic_trace(net),
    "gradients": lambda: make_fx(lambda x: torch.func.grad(lambda x: net(x).sum())(x)),
}
for name, make in forms.items():
    form = make()
    text = str(getattr(form, "inlined_graph", getattr(form, "graph", "")))
    words = [word for word in ("autocast", "BFloat16", "bfloat16", "Half") if word in text]
    print(name, words)
for name in ("traced", "scripted"):
    with torch.no_grad():
        print(name, torch.equal(forms[name]()(x), exact))
print(torch.func.vmap(net)(x[:, None]).dtype, torch.func.jvp(net, (x,), (x,))[1].dtype)
print(torch.func.functional_call(net, dict(net.named_parameters()), (x,)).dtype)
print({value.dtype for value in copy.deepcopy(net).state_dict().values()})
