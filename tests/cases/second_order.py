# flatout run --set replay=operators
# The residual of an equation needs gradients of gradients: they were added up in another order.
import torch
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(
    *(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh()),
    nn.Linear(20, 1),
)
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
for _ in range(150):
    x = torch.rand(500, 2, requires_grad=True)
    optimizer.zero_grad()
    u = net(x)
    ones = torch.ones_like(u)
    (slope,) = torch.autograd.grad(u, x, ones, create_graph=True)
    (curve,) = torch.autograd.grad(slope[:, 1].sum(), x, create_graph=True)
    loss = (slope[:, 0] + u[:, 0] * slope[:, 1] - 0.01 * curve[:, 1]).square().mean()
    loss = loss + net(x.detach()).square().mean()
    loss.backward()
    optimizer.step()
    print(loss.item().hex())
