"""Plain DistributedDataParallel on gloo, as torchrun starts it."""

import torch
import torch.distributed as dist
from common import digits
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(
    nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
data = TensorDataset(*digits())
sampler = DistributedSampler(data, seed=0)
loader = DataLoader(data, batch_size=16, sampler=sampler)
for epoch in range(2):
    sampler.set_epoch(epoch)
    for x, y in loader:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0:
            print("loss", repr(loss.item()))
    dist.all_reduce(loss.detach())
    if dist.get_rank() == 0:
        print("epoch", epoch, "sum", repr(loss.item()), flush=True)
if dist.get_rank() == 0:
    torch.save(model.module.state_dict(), "model.pt")
# A rank that ends right after its last reduction may abort, without flatout too: gloo's thread then
# lets go of the tensor while the interpreter goes (github.com/pytorch/pytorch/pull/179291).
dist.barrier()
dist.destroy_process_group()
