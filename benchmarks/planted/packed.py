"""A frozen recurrent encoder on packed sequences in front of what is trained: about half."""

import torch
from torch import nn
from truth import Truth

torch.manual_seed(0)
truth = Truth()
encoder = nn.LSTM(64, 256, bidirectional=True).requires_grad_(False)
head = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 8))
optimizer = torch.optim.SGD(head.parameters(), lr=1e-3)
for _ in range(100_000):
    optimizer.zero_grad()
    sequences = [torch.randn(40 - n, 64) for n in range(16)]
    packed = nn.utils.rnn.pack_sequence(sequences)
    with truth.part():
        output, _ = encoder(packed)
    padded, _ = nn.utils.rnn.pad_packed_sequence(output)
    head(padded).square().mean().backward()
    optimizer.step()
    truth.step()
