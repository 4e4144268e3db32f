"""A GPT with dropout on bytes, in float32: AdamW, clipping, and the loss printed now and then."""

import argparse

import torch
from common import DEVICE, be_deterministic, standard_library
from torch import nn
from torch.nn import functional as F

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--context", type=int, default=512)
parser.add_argument("--layers", type=int, default=6)
parser.add_argument("--width", type=int, default=512)
parser.add_argument("--dropout", type=float, default=0.1)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--deterministic", action="store_true")
arguments = parser.parse_args()


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = width // 64, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, 64)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        x = x + self.projection(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = arguments.width
        self.tokens, self.positions = nn.Embedding(128, width), nn.Embedding(1024, width)
        self.blocks = nn.Sequential(
            *(Block(width, arguments.dropout) for _ in range(arguments.layers))
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        return self.head(self.norm(self.blocks(self.tokens(inputs) + self.positions(positions))))


if arguments.deterministic:
    be_deterministic()
torch.manual_seed(arguments.seed)
text = standard_library()
model = GPT().to(DEVICE)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
offsets = torch.arange(arguments.context + 1)
for step in range(arguments.steps):
    starts = torch.randint(len(text) - arguments.context - 1, (arguments.batch_size, 1))
    window = text[starts + offsets].to(DEVICE)
    logits = model(window[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step} loss {loss.item():.6f}", flush=True)
total = sum(p.detach().double().sum().item() for p in model.parameters())
print(f"weights {total:.9f}")
