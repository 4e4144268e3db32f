"""A graph attention network of PyTorch Geometric that classifies the nodes of a graph."""

# /// script
# dependencies = ["torch_geometric"]
#
# [tool.field]
# title = "PyTorch Geometric, graph attention network"
# command = ["{python}", "{file}", "--seed", "{seed}"]
# result = 'Final Train: ([\d.]+), Val: ([\d.]+), Test: ([\d.]+), Loss: ([\d.]+)'
# clock = 'Total time: ([\d.]+)s'
# ///

import argparse
import time

import torch
import torch.nn.functional as F
from torch_geometric.data import Data
from torch_geometric.nn import GATConv
from torch_geometric.transforms import Compose, NormalizeFeatures, RandomNodeSplit
from torch_geometric.utils import erdos_renyi_graph, stochastic_blockmodel_graph

CLASSES, NODES_PER_CLASS, FEATURES = 7, 300, 300


class GAT(torch.nn.Module):
    """Two layers of attention, with the widths of the paper's network for Cora."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int, heads: int) -> None:
        super().__init__()
        self.conv1 = GATConv(in_channels, hidden, heads, dropout=0.6)
        self.conv2 = GATConv(hidden * heads, out_channels, heads=1, concat=False, dropout=0.6)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        """Return the class scores of all nodes."""
        x = F.dropout(x, p=0.6, training=self.training)
        x = F.elu(self.conv1(x, edge_index))
        x = F.dropout(x, p=0.6, training=self.training)
        return self.conv2(x, edge_index)


def make_graph() -> Data:
    """Return a graph whose nodes have more edges within their class, and weak features."""
    torch.manual_seed(0)
    probabilities = torch.full((CLASSES, CLASSES), 0.0005).fill_diagonal_(0.01)
    edges = stochastic_blockmodel_graph([NODES_PER_CLASS] * CLASSES, probabilities)
    noise = erdos_renyi_graph(CLASSES * NODES_PER_CLASS, 0.001)
    y = torch.arange(CLASSES).repeat_interleave(NODES_PER_CLASS)
    x = torch.rand(CLASSES * NODES_PER_CLASS, FEATURES)
    x[torch.arange(len(y)), y] += 2.0
    data = Data(x=x, y=y, edge_index=torch.cat([edges, noise], dim=1))
    return Compose([NormalizeFeatures(), RandomNodeSplit(num_val=500, num_test=1000)])(data)


def main() -> None:
    """Train, with a test after each epoch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=200)
    args = parser.parse_args()
    data = make_graph()
    torch.manual_seed(args.seed)
    model = GAT(FEATURES, 8, CLASSES, heads=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005, weight_decay=5e-4)
    start_s = time.time()
    for epoch in range(1, args.epochs + 1):
        model.train()
        optimizer.zero_grad()
        out = model(data.x, data.edge_index)
        loss = F.cross_entropy(out[data.train_mask], data.y[data.train_mask])
        loss.backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            right = model(data.x, data.edge_index).argmax(dim=-1) == data.y
        accuracies = [
            float(right[mask].float().mean())
            for mask in (data.train_mask, data.val_mask, data.test_mask)
        ]
        train, val, test = accuracies
        if epoch % 50 == 0:
            print(f"Epoch: {epoch:03d}, Loss: {loss:.4f}, Val: {val:.4f}, Test: {test:.4f}")
    print(f"Total time: {time.time() - start_s:.4f}s")
    print(f"Final Train: {train:.4f}, Val: {val:.4f}, Test: {test:.4f}, Loss: {loss:.4f}")


if __name__ == "__main__":
    main()
