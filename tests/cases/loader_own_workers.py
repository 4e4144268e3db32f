"""Worker processes of the program's own, made anew each epoch, see what has changed since."""
# flatout run --set loader=workers
# flatout run --set loader=cache

import torch
from torch.utils.data import DataLoader, Dataset, Subset


class Points(Dataset):
    def __init__(self):
        self.x = torch.zeros(32, 2)
        self.inner = {"epoch": 0}

    def __len__(self):
        return 32

    def __getitem__(self, i):
        return self.x[i] + self.inner["epoch"]


if __name__ == "__main__":
    points = Points()
    loaders = [DataLoader(Subset(points, range(0, 32, 2)), 8, num_workers=w) for w in (0, 1)]
    for epoch in range(3):
        points.inner["epoch"] = epoch
        points.x.fill_(100 * epoch)
        print(epoch, [{float(b[0, 0]) for b in loader} for loader in loaders])
        print(torch.rand(1).numel(), [loader.persistent_workers for loader in loaders])
