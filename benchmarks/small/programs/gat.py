"""A graph attention network by PyTorch Geometric, trained on one graph.

python gat.py --steps 300 --seed 1
"""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.nn import GATConv

NODES, FEATURES, CLASSES = 1500, 64, 7


def make_graph() -> Data:
    """Nodes of seven classes with edges mostly inside of a class."""
    y = torch.randint(CLASSES, (NODES,))
    x = torch.randn(CLASSES, FEATURES)[y] + 3 * torch.randn(NODES, FEATURES)
    ends = torch.randint(NODES, (2, 60_000))
    is_kept = (y[ends[0]] == y[ends[1]]) | (torch.rand(ends.size(1)) < 0.02)
    return Data(x=x, y=y, edge_index=ends[:, is_kept], train_mask=torch.rand(NODES) < 0.5)


class GAT(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = GATConv(FEATURES, 8, heads=8, dropout=0.6)
        self.conv2 = GATConv(64, CLASSES, heads=1, concat=False, dropout=0.6)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        x = F.dropout(x, p=0.6, training=self.training)
        x = F.elu(self.conv1(x, edge_index))
        x = F.dropout(x, p=0.6, training=self.training)
        return self.conv2(x, edge_index)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    data = make_graph()
    model = GAT()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005, weight_decay=5e-4)
    for step in range(arguments.steps):
        model.train()
        optimizer.zero_grad()
        out = model(data.x, data.edge_index)
        loss = F.cross_entropy(out[data.train_mask], data.y[data.train_mask])
        loss.backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            found = model(data.x, data.edge_index).argmax(1)
            is_right = (found == data.y)[~data.train_mask].float().mean()
        if step % 10 == 0:
            print(f"step {step} loss {loss.item():.4f} {is_right.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
