"""A program that does its own mixed precision: float16 autocast and a GradScaler."""

import torch
from common import DEVICE, digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
model = nn.Sequential(
    nn.Flatten(), nn.Linear(784, 1024), nn.GELU(), nn.Dropout(0.1), nn.Linear(1024, 10)
).to(DEVICE)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
scaler = torch.amp.GradScaler(DEVICE.type)
loader = DataLoader(TensorDataset(*digits()), 128, shuffle=True, pin_memory=True)
for epoch in range(4):
    for x, y in loader:
        x, y = x.to(DEVICE, non_blocking=True), y.to(DEVICE, non_blocking=True)
        with torch.autocast(DEVICE.type, torch.float16):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    print(f"epoch {epoch} loss {loss.item():.6f} scale {scaler.get_scale()}", flush=True)
