"""Steps of optimizers with numbers that are not ordinary, and with parameters that share memory."""
# flatout run --set optimizer=onepass --set clipping=onepass

import math

import torch

OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {},
    "AdamW": {"weight_decay": 0.1},
    "RMSprop": {"centered": True},
    "Adagrad": {},
    "Adadelta": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
}


def rounded(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.3g}") for value in values.detach().double().flatten().tolist()]


for name, options in OPTIMIZERS.items():
    # A mask of -inf that is learned in part, as in some models of attention.
    mask = torch.nn.Parameter(torch.tensor([-math.inf, 0.5, math.inf, -0.0, 2.0, 2.0]))
    optimizer = getattr(torch.optim, name)([mask], **options)
    for step in range(3):
        mask.grad = torch.tensor([0.0, 1.0, 0.0, 0.0, 1e20, math.nan if step == 2 else 0.1])
        torch.nn.utils.clip_grad_norm_([mask], 1e30)
        optimizer.step()
    print(
        name, rounded(mask), [rounded(x) for x in optimizer.state[mask].values() if x is not None]
    )

for name in ("SGD", "AdamW"):
    # Two layers with one weight, and two with a part of one.
    torch.manual_seed(0)
    flat = torch.randn(120_000)
    tied = [torch.nn.Parameter(flat[part]) for part in (slice(0, 80_000), slice(40_000, None))]
    optimizer = getattr(torch.optim, name)(tied, **OPTIMIZERS[name])
    for _ in range(3):
        for parameter in tied:
            parameter.grad = torch.ones_like(parameter) + parameter.detach()
        optimizer.step()
    print(name, "tied", flat.double().sum().item())
