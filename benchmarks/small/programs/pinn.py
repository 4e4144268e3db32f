"""A physics-informed network for Burgers' equation, with second derivatives by autograd.

python pinn.py --steps 1000 --seed 1
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

VISCOSITY = 0.01 / torch.pi


def residual_of(model: nn.Module, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What the equation leaves at the points."""
    u = model(torch.cat([t, x], 1))
    ones = torch.ones_like(u)
    u_t, u_x = torch.autograd.grad(u, (t, x), ones, create_graph=True)
    (u_xx,) = torch.autograd.grad(u_x, x, ones, create_graph=True)
    return u_t + u * u_x - VISCOSITY * u_xx


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    model = nn.Sequential(
        nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh()
    )
    model.append(nn.Linear(20, 1))
    x_start = torch.linspace(-1, 1, 100).unsqueeze(1)
    u_start = -torch.sin(torch.pi * x_start)
    start = torch.cat([torch.zeros_like(x_start), x_start], 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(arguments.steps):
        t = torch.rand(500, 1, requires_grad=True)
        x = (2 * torch.rand(500, 1) - 1).requires_grad_()
        optimizer.zero_grad()
        loss = residual_of(model, t, x).square().mean()
        loss = loss + (model(start) - u_start).square().mean()
        loss.backward()
        optimizer.step()
        if step % 25 == 0:
            print(f"step {step} loss {loss.item():.5f}", flush=True)


if __name__ == "__main__":
    main()
