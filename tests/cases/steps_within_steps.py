"""Optimizers of flatout.optim whose closures step others, in several threads, and raise."""
# flatout run
# flatout run --set optimizer=onepass

import threading

import torch

from flatout.optim import AdamW


def train(name: str, make: type[torch.optim.Optimizer]) -> None:
    outer, inner = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    first, second = AdamW([outer], 0.1), make([inner], lr=0.1)

    def closure() -> torch.Tensor:
        second.zero_grad()
        inner.square().sum().backward()
        second.step()
        first.zero_grad()
        loss = (outer * inner.detach()).sum()
        loss.backward()
        return loss

    for _ in range(3):
        first.step(closure)
    results[name] = [round(x, 4) for x in (*outer.tolist(), *inner.tolist())]


results: dict[str, list[float]] = {}
makes = {"ours": AdamW, "torch's": torch.optim.AdamW, "sgd": torch.optim.SGD}
threads = [threading.Thread(target=train, args=pair) for pair in makes.items()]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(sorted(results.items()))

parameter = torch.nn.Parameter(torch.ones(4))
optimizer = AdamW([parameter], 0.1)
for _ in range(2):
    try:
        optimizer.step(lambda: 1 / 0)
    except ZeroDivisionError as error:
        print(error, torch.is_grad_enabled())

double = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
theirs = torch.optim.Adam([double], 0.1)
double.grad = torch.ones_like(double)
theirs.step()
print([round(x, 6) for x in double.tolist()])
